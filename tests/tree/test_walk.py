"""Verification against a loop per request; what its output is distributed as is in ``test_oracle``."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from reference_tree import SHAPES, depths_of, make_batch, path_to, random_parents, walk_reference
from torch import Tensor

from jakiro_vllm.tree.batch import TreeBatch
from jakiro_vllm.tree.walk import Accepted, walk

Tree = tuple[list[int], list[int]]


class Script:
    """Samples that are written down beforehand; remembers how it was asked.

    Entries of inactive requests are answered with what would be accepted, to see that nobody listens.
    """

    def __init__(self, trees: TreeBatch, samples: Sequence[Sequence[int]]) -> None:
        self.trees = trees
        self.samples = torch.tensor(samples)
        self.calls: list[tuple[int, list[int], list[bool]]] = []

    def __call__(self, step: int, nodes: Tensor, active: Tensor) -> Tensor:
        assert step == len(self.calls), "one call per level, in order"
        assert nodes.dtype == torch.int64
        assert active.dtype == torch.bool
        self.calls.append((step, nodes.tolist(), active.tolist()))
        tempting = self.trees.tokens[:, -1].clamp(min=0)
        return self.samples[:, step].where(active, tempting)


def check(trees: Sequence[Tree], samples: Sequence[Sequence[int]], max_depth: int) -> Accepted:
    """Walks a batch, and every request of it by itself."""
    batch = make_batch(trees)
    script = Script(batch, samples)
    accepted = walk(batch, script, max_depth)
    expected = [walk_reference(*tree, row, max_depth) for tree, row in zip(trees, samples, strict=True)]
    longest = max(len(emitted) for _, emitted in expected)
    assert accepted.path.shape == accepted.tokens.shape == (len(trees), longest)
    for i, (path, emitted) in enumerate(expected):
        assert accepted.path[i].tolist() == path + [0] * (longest - len(path))
        assert accepted.tokens[i].tolist() == emitted + [-1] * (longest - len(emitted))
        assert int(accepted.num_accepted[i]) == len(emitted) - 1 == len(path) - 1

    assert len(script.calls) == longest <= max_depth + 1
    for step, nodes, active in script.calls:
        assert active == [step < len(emitted) for _, emitted in expected]
        for i, (path, _) in enumerate(expected):
            if active[i]:
                assert nodes[i] == path[step]
    return accepted


def random_tree(shape: str, size: int, vocab: int, rng: random.Random) -> Tree:
    """Tokens may repeat, among siblings too."""
    return random_parents(shape, size, rng), [rng.randrange(vocab) for _ in range(size)]


@pytest.mark.parametrize("vocab", [2, 4, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_random_trees(shape: str, vocab: int, rng: random.Random) -> None:
    lengths = set()
    for size in (1, 2, 9, 40, 64):
        trees = [random_tree(shape, rng.randint(1, size), vocab, rng) for _ in range(12)]
        depth = max(max(depths_of(parents)) for parents, _ in trees)
        samples = [[rng.randrange(vocab) for _ in range(depth + 1)] for _ in trees]
        lengths |= set(check(trees, samples, depth).num_accepted.tolist())
    assert 0 in lengths
    assert len(lengths) > 1 or vocab == 50


def test_all_accepted_and_none_accepted(rng: random.Random) -> None:
    """Side by side, so that the batch goes on for one request alone."""
    parents, tokens = random_parents("narrow", 30, rng), list(range(30))
    deepest = max(range(30), key=lambda node: len(path_to(node, parents)))
    path = path_to(deepest, parents)
    follow = [tokens[node] for node in path[1:]] + [99]
    nothing = [99] * len(path)
    accepted = check([(parents, tokens)] * 3, [nothing, follow, nothing], len(path) - 1)
    assert accepted.num_accepted.tolist() == [0, len(path) - 1, 0]
    accepted = check([(parents, tokens)] * 2, [nothing, nothing], len(path) - 1)
    assert accepted.tokens.tolist() == [[99], [99]]


def test_a_token_elsewhere_in_the_tree_is_not_a_child() -> None:
    """Nodes 1 and 2 are siblings, 3 is under 1: after 2, the token of 3 is a bonus token."""
    check([([-1, 0, 0, 1], [0, 5, 6, 7])], [[6, 7, 8]], 2)


def test_the_root_is_nobodys_child() -> None:
    check([([-1, 0], [5, 6])], [[5, 5]], 1)


def test_duplicate_siblings_lead_to_the_first() -> None:
    accepted = check([([-1, 0, 0, 1, 2], [0, 5, 5, 6, 7])], [[5, 7, 7]], 2)
    assert accepted.path.tolist() == [[0, 1]]


def test_placeholders_are_never_accepted() -> None:
    """-1 stands for no token; tokens behind it are out of reach."""
    check([([-1, 0, 1, 2], [3, 5, -1, 7]), ([-1, 0, 1, 2], [3, -1, 5, 7])], [[5, 7, 7, 7], [5, 7, 7, 7]], 3)


def test_columns_behind_a_tree_are_not_its_nodes() -> None:
    """Padding repeats tokens that would be accepted."""
    whole = ([-1, 0, 0, 1], [0, 5, 6, 5])
    batch = make_batch([whole])
    for count in (1, 2, 3, 4):
        short = replace(batch, num_nodes=torch.tensor([count]))
        samples = [[5, 5, 5]]
        path, emitted = walk_reference(whole[0][:count], whole[1][:count], samples[0], 2)
        accepted = walk(short, Script(short, samples), 2)
        assert accepted.path.tolist() == [path]
        assert accepted.tokens.tolist() == [emitted]


@pytest.mark.parametrize("max_depth", [0, 1, 3, 9])
def test_never_deeper_than_told(max_depth: int, rng: random.Random) -> None:
    trees = [(list(range(-1, 7)), [1] * 8) for _ in range(2)]
    check(trees, [[1] * 10, [1] * 2 + [0] * 8], max_depth)
