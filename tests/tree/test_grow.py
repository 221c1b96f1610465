"""Beam and global re-rank against sorting."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_tree import Candidate, ancestor_word, rerank_reference
from torch import Tensor

from jakiro_vllm.tree.batch import TreeBatch
from jakiro_vllm.tree.grow import Level, expand, rerank, root_beam

INF = float("inf")
#: Log-probabilities that add up exactly, so that scores tie often; 0 ties a child with its parent.
COARSE = (0.0, 0.0, -0.25, -0.5, -1.0, -INF)


def grow(batch: int, top_k: int, depth: int, width: int, log_prob: object, seed: int) -> list[Level]:
    """Grows levels from drawn log-probabilities, as drafting does."""
    rng = random.Random(seed)
    levels: list[Level] = []
    beam = root_beam(batch, "cpu")
    for _ in range(depth):
        parents = beam.tokens.shape[1]
        tokens = torch.tensor(
            [[rng.sample(range(1000), width) for _ in range(parents)] for _ in range(batch)], dtype=torch.int64
        )
        drawn = [
            [sorted((log_prob(rng) for _ in range(width)), reverse=True) for _ in range(parents)] for _ in range(batch)
        ]
        first_id = sum(level.tokens.shape[1] for level in levels)
        levels.append(expand(beam, tokens, torch.tensor(drawn), first_id))
        beam = levels[-1].best(top_k)
    return levels


def coarse(rng: random.Random) -> float:
    return rng.choice(COARSE)


def fine(rng: random.Random) -> float:
    return -rng.expovariate(1.0)


def candidates_of(levels: list[Level], row: int) -> list[Candidate]:
    return [
        Candidate(token, score, parent, depth)
        for depth, level in enumerate(levels, start=1)
        for token, score, parent in zip(
            level.tokens[row].tolist(), level.scores[row].tolist(), level.parent_ids[row].tolist(), strict=True
        )
    ]


def check_rerank(levels: list[Level], budget: int) -> TreeBatch:
    """Compares the re-ranked trees with the reference, and checks what every tree promises."""
    batch = levels[0].tokens.shape[0]
    roots = torch.arange(2000, 2000 + batch)
    trees = rerank(levels, roots, budget)
    total = sum(level.tokens.shape[1] for level in levels)
    assert trees.width == 1 + min(budget, total)
    for row in range(batch):
        candidates = candidates_of(levels, row)
        kept = rerank_reference(candidates, budget)
        node_of = {-1: 0} | {candidate: node for node, candidate in enumerate(kept, start=1)}
        count = len(kept) + 1
        assert int(trees.num_nodes[row]) == count
        assert trees.tokens[row, :count].tolist() == [2000 + row, *(candidates[i].token for i in kept)]
        assert trees.depths[row, :count].tolist() == [0, *(candidates[i].depth for i in kept)]
        # Fails with a KeyError if a parent were lost.
        parents = [-1, *(node_of[candidates[i].parent] for i in kept)]
        assert trees.parents[row, :count].tolist() == parents
        # Topological: so every prefix holds the parents and the ancestors of all its nodes.
        assert all(parent < node for node, parent in enumerate(parents))
        assert trees.ancestors[row, :count].tolist() == [ancestor_word(node, parents) for node in range(count)]
        # Padding is no token that a target could sample.
        assert (trees.tokens[row, count:] == -1).all()
    return trees


@pytest.mark.parametrize("budget", [1, 5, 24, 63])
@pytest.mark.parametrize("draw", [coarse, fine], ids=["ties", "distinct"])
@pytest.mark.parametrize(("top_k", "depth"), [(1, 1), (1, 6), (8, 6), (4, 3), (10, 2)])
def test_rerank(top_k: int, depth: int, draw: object, budget: int) -> None:
    check_rerank(grow(3, top_k, depth, top_k, draw, seed=0), budget)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    top_k=st.integers(1, 5),
    width=st.integers(1, 5),
    depth=st.integers(1, 5),
    budget=st.integers(1, 63),
    ties=st.booleans(),
)
def test_rerank_of_any_levels(
    seed: int, batch: int, top_k: int, width: int, depth: int, budget: int, ties: bool
) -> None:
    check_rerank(grow(batch, top_k, depth, width, coarse if ties else fine, seed), budget)


def test_a_parent_comes_before_a_child_that_is_certain() -> None:
    """Probability one all the way: the budget cuts the chain from below."""
    levels = grow(2, 1, 6, 1, lambda rng: 0.0, seed=0)
    trees = check_rerank(levels, 3)
    assert trees.parents.tolist() == [[-1, 0, 1, 2]] * 2
    assert trees.depths.tolist() == [[0, 1, 2, 3]] * 2


def test_a_tie_between_levels_keeps_the_earlier_one() -> None:
    """Root's children score (0, -1); the first child's child scores -1 as well, and comes later."""
    beam = root_beam(1, "cpu")
    first = expand(beam, torch.tensor([[[10, 11]]]), torch.tensor([[[0.0, -1.0]]]), 0)
    second = expand(first.best(1), torch.tensor([[[12]]]), torch.tensor([[[-1.0]]]), 2)
    assert check_rerank([first, second], 2).tokens.tolist() == [[2000, 10, 11]]


def test_a_budget_above_the_candidates_keeps_them_all() -> None:
    trees = check_rerank(grow(2, 3, 2, 3, fine, seed=1), 63)
    assert trees.num_nodes.tolist() == [1 + 3 + 9] * 2


def test_impossible_candidates_are_never_kept() -> None:
    """Each tree has its own number of candidates; a root without any is a tree of one node."""
    log_probs = torch.tensor([[[-1.0, -INF, -INF]], [[-INF, -INF, -INF]], [[-1.0, -2.0, -3.0]]])
    level = expand(root_beam(3, "cpu"), torch.arange(9).view(3, 1, 3), log_probs, 0)
    trees = check_rerank([level], 2)
    assert trees.num_nodes.tolist() == [2, 1, 3]


def test_the_best_candidates_become_the_beam() -> None:
    levels = grow(3, 4, 2, 5, fine, seed=2)
    for row in range(3):
        beam = levels[1].best(4)
        order = sorted(range(20), key=lambda i: -float(levels[1].scores[row, i]))[:4]
        assert beam.ids[row].tolist() == [5 + i for i in order]
        assert beam.scores[row].tolist() == [float(levels[1].scores[row, i]) for i in order]
        assert beam.tokens[row].tolist() == [int(levels[1].tokens[row, i]) for i in order]
        # Which node of the beam before proposed it, and as which of its candidates.
        assert beam.origins[row].tolist() == [i // 5 for i in order]
        assert beam.choices[row].tolist() == [i % 5 for i in order]
    assert levels[0].best(99).tokens.shape == (3, 5)


def test_expanding_adds_to_the_parents_scores() -> None:
    beam = expand(root_beam(1, "cpu"), torch.tensor([[[3, 4]]]), torch.tensor([[[-1.0, -3.0]]]), 0).best(2)
    level = expand(beam, torch.tensor([[[5, 6], [7, 8]]]), torch.tensor([[[-0.5, -2.0], [-0.25, -INF]]]), 2)
    assert level.scores.tolist() == [[-1.5, -3.0, -3.25, -INF]]
    assert level.parent_ids.tolist() == [[0, 0, 1, 1]]
    assert level.tokens.tolist() == [[5, 6, 7, 8]]


def test_the_root_is_no_candidate() -> None:
    beam = root_beam(2, "cpu")
    assert beam.ids.tolist() == [[-1], [-1]]
    assert beam.scores.tolist() == [[0.0], [0.0]]


def lose_parents(levels: list[Level], roots: Tensor, budget: int) -> list[int]:
    """Negative control: a re-rank that lets later candidates win ties."""
    candidates = candidates_of(levels, 0)
    order = sorted(range(len(candidates)), key=lambda i: (-candidates[i].score, -i))
    return order[:budget]


def test_ties_are_dangerous() -> None:
    """With the other order of ties a child would be kept without its parent: the tests above can fail."""
    levels = grow(1, 2, 4, 2, lambda rng: 0.0, seed=0)
    kept = lose_parents(levels, torch.zeros(1), 3)
    candidates = candidates_of(levels, 0)
    assert any(candidates[i].parent not in [*kept, -1] for i in kept)
    assert kept != rerank_reference(candidates, 3)
