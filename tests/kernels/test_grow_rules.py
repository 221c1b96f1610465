"""Beam and global re-rank against sorting: what the kernels' own reference must do."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_tree import Candidate, ancestor_word, rerank_reference

from jakiro_vllm.kernels.grow import Beam, Pool, expand, rerank
from jakiro_vllm.tree.batch import TreeBatch

INF = float("inf")
#: Log-probabilities that add up exactly, so that scores tie often; 0 ties a child with its parent.
COARSE = (0.0, 0.0, -0.25, -0.5, -1.0, -INF)


Level = tuple[int, int]


def grow(batch: int, top_k: int, depth: int, width: int, log_prob: object, seed: int) -> tuple[Pool, list[Level]]:
    """Grows levels from drawn log-probabilities, as drafting does; returns which candidates each level has."""
    rng = random.Random(seed)
    sizes = [width]
    for _ in range(depth - 1):
        sizes.append(min(top_k, sizes[-1]) * width)
    pool, beam = Pool.empty(batch, sum(sizes), "cpu"), Beam.root(batch, "cpu")
    levels: list[Level] = []
    first = 0
    for size in sizes:
        parents = beam.tokens.shape[1]
        tokens = torch.tensor(
            [[rng.sample(range(1000), width) for _ in range(parents)] for _ in range(batch)], dtype=torch.int64
        )
        drawn = [
            [sorted((log_prob(rng) for _ in range(width)), reverse=True) for _ in range(parents)] for _ in range(batch)
        ]
        beam = expand(pool, beam, tokens, torch.tensor(drawn), first, min(top_k, size))
        levels.append((first, first + size))
        first += size
    return pool, levels


def coarse(rng: random.Random) -> float:
    return rng.choice(COARSE)


def fine(rng: random.Random) -> float:
    return -rng.expovariate(1.0)


def candidates_of(pool: Pool, levels: list[Level], row: int) -> list[Candidate]:
    depths = [depth for depth, (first, end) in enumerate(levels, start=1) for _ in range(first, end)]
    columns = (pool.tokens[row].tolist(), pool.scores[row].tolist(), pool.parent_ids[row].tolist())
    return [Candidate(*values, depth) for *values, depth in zip(*columns, depths, strict=True)]


def check_rerank(grown: tuple[Pool, list[Level]], budget: int) -> TreeBatch:
    """Compares the re-ranked trees with the reference, and checks what every tree promises."""
    pool, levels = grown
    batch, total = pool.scores.shape
    roots = torch.arange(2000, 2000 + batch)
    trees = TreeBatch(*rerank(pool, roots, budget, len(levels)))
    assert trees.width == 1 + min(budget, total)
    for row in range(batch):
        candidates = candidates_of(pool, levels, row)
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
        # The best first: so every prefix is the best tree of its size.
        assert trees.scores is not None
        assert trees.scores[row, :count].tolist() == [0.0, *(candidates[i].score for i in kept)]
        assert trees.scores[row, count:].isneginf().all()
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
    pool = Pool.empty(1, 3, "cpu")
    beam = expand(pool, Beam.root(1, "cpu"), torch.tensor([[[10, 11]]]), torch.tensor([[[0.0, -1.0]]]), 0, 1)
    expand(pool, beam, torch.tensor([[[12]]]), torch.tensor([[[-1.0]]]), 2, 0)
    assert check_rerank((pool, [(0, 2), (2, 3)]), 2).tokens.tolist() == [[2000, 10, 11]]


def test_a_budget_above_the_candidates_keeps_them_all() -> None:
    trees = check_rerank(grow(2, 3, 2, 3, fine, seed=1), 63)
    assert trees.num_nodes.tolist() == [1 + 3 + 9] * 2


def test_impossible_candidates_are_never_kept() -> None:
    """Each tree has its own number of candidates; a root without any is a tree of one node."""
    log_probs = torch.tensor([[[-1.0, -INF, -INF]], [[-INF, -INF, -INF]], [[-1.0, -2.0, -3.0]]])
    pool = Pool.empty(3, 3, "cpu")
    expand(pool, Beam.root(3, "cpu"), torch.arange(9).view(3, 1, 3), log_probs, 0, 0)
    trees = check_rerank((pool, [(0, 3)]), 2)
    assert trees.num_nodes.tolist() == [2, 1, 3]


def test_the_best_candidates_become_the_beam(generator: torch.Generator) -> None:
    pool, width = Pool.empty(3, 25, "cpu"), 5
    tokens, log_probs = torch.arange(15).view(3, 1, 5), -torch.rand(3, 1, 5, generator=generator)
    parents = expand(pool, Beam.root(3, "cpu"), tokens, log_probs, 0, 4)
    tokens, log_probs = torch.arange(60).view(3, 4, 5), -torch.rand(3, 4, 5, generator=generator)
    beam = expand(pool, parents, tokens, log_probs, 5, 4, first_slot=4)
    for row in range(3):
        scores = pool.scores[row, 5:]
        order = sorted(range(20), key=lambda i, scores=scores: -float(scores[i]))[:4]
        assert beam.ids[row].tolist() == [5 + i for i in order]
        assert beam.scores[row].tolist() == [float(scores[i]) for i in order]
        assert beam.tokens[row].tolist() == [20 * row + i for i in order]
        # Which node of the beam before proposed it, and as which of its candidates.
        assert beam.origins[row].tolist() == [i // width for i in order]
        assert beam.choices[row].tolist() == [i % width for i in order]
        # Itself and its parent, in the slots that the draft gives them.
        assert parents.words[row].tolist() == [1, 2, 4, 8]
        assert beam.words[row].tolist() == [1 << i // width | 1 << 4 + j for j, i in enumerate(order)]


def test_expanding_adds_to_the_parents_scores() -> None:
    pool = Pool.empty(1, 6, "cpu")
    beam = expand(pool, Beam.root(1, "cpu"), torch.tensor([[[3, 4]]]), torch.tensor([[[-1.0, -3.0]]]), 0, 2)
    expand(pool, beam, torch.tensor([[[5, 6], [7, 8]]]), torch.tensor([[[-0.5, -2.0], [-0.25, -INF]]]), 2, 0)
    assert pool.scores.tolist() == [[-1.0, -3.0, -1.5, -3.0, -3.25, -INF]]
    assert pool.parent_ids.tolist() == [[-1, -1, 0, 0, 1, 1]]
    assert pool.tokens.tolist() == [[3, 4, 5, 6, 7, 8]]


def test_candidates_found_for_other_nodes() -> None:
    """The last level's: each child takes those of the node that it came from."""
    pool = Pool.empty(1, 8, "cpu")
    beam = expand(pool, Beam.root(1, "cpu"), torch.tensor([[[3, 4, 5, 6]]]), torch.zeros(1, 1, 4), 0, 2)
    tokens = torch.tensor([[[10, 11], [20, 21], [30, 31]]])
    expand(pool, beam, tokens, -tokens.float(), 4, 0, rows=torch.tensor([[2, 0]]))
    assert pool.tokens[0, 4:].tolist() == [30, 31, 10, 11]
    assert pool.scores[0, 4:].tolist() == [-30.0, -31.0, -10.0, -11.0]
    assert pool.parent_ids[0, 4:].tolist() == [0, 0, 1, 1]


def test_the_root_is_no_candidate() -> None:
    beam = Beam.root(2, "cpu")
    assert beam.ids.tolist() == [[-1], [-1]]
    assert beam.scores.tolist() == [[0.0], [0.0]]
    assert beam.words.tolist() == [[0], [0]]


def test_ties_are_dangerous() -> None:
    """With the other order of ties a child would be kept without its parent: the tests above can fail."""
    candidates = candidates_of(*grow(1, 2, 4, 2, lambda rng: 0.0, seed=0), 0)
    kept = sorted(range(len(candidates)), key=lambda i: (-candidates[i].score, -i))[:3]
    assert any(candidates[i].parent not in [*kept, -1] for i in kept)
    assert kept != rerank_reference(candidates, 3)
