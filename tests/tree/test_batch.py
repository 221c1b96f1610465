"""Flat arrays of token trees."""

from __future__ import annotations

import random

import pytest
import torch
from reference_tree import ancestor_word, depths_of, make_batch, random_parents

from jakiro_vllm.tree.batch import TreeBatch, chains, row_topology


def assert_same(found: TreeBatch, expected: TreeBatch) -> None:
    """Equal in every valid node."""
    assert torch.equal(found.num_nodes, expected.num_nodes)
    for i, count in enumerate(expected.num_nodes.tolist()):
        for name in ("tokens", "parents", "depths", "ancestors"):
            assert torch.equal(getattr(found, name)[i, :count], getattr(expected, name)[i, :count]), name


@pytest.mark.parametrize("width", [1, 2, 30, 64])
def test_chains(width: int, generator: torch.Generator) -> None:
    counts = torch.tensor([1, width, (width + 1) // 2])
    tokens = torch.randint(0, 99, (3, width), generator=generator)
    expected = make_batch(
        [(range(-1, n - 1), row[:n]) for n, row in zip(counts.tolist(), tokens.tolist(), strict=True)]
    )
    assert_same(chains(tokens, counts), expected)


def test_select(rng: random.Random) -> None:
    described = [(random_parents("random", n, rng), [rng.randrange(50) for _ in range(n)]) for n in (9, 1, 5, 12)]
    trees = make_batch(described)
    assert (trees.batch_size, trees.width) == (4, 12)
    rows = [3, 0, 0]
    assert_same(trees.select(torch.tensor(rows)), make_batch([described[i] for i in rows], width=12))


def test_rows_of_a_step(rng: random.Random) -> None:
    """A prompt chunk, a tree, plain decoding, a tree cut short, a chain: words and depths of trees, else the index."""
    described = [(random_parents("random", n, rng), range(n)) for n in (1, 9, 1, 12, 3)]
    described[3] = (described[3][0][:5], range(5))
    described[4] = ([-1, 0, 1], range(3))
    trees = make_batch(described, width=12)
    counts = [20, 9, 1, 5, 3]
    branches = [False, True, False, True, False]
    requests = torch.tensor([r for r, count in enumerate(counts) for _ in range(count)])
    offsets = torch.tensor([i for count in counts for i in range(count)])
    ancestors, depths = row_topology(trees, torch.tensor(branches), requests, offsets)
    expected_words, expected_depths = [], []
    for (parents, _), count, is_tree in zip(described, counts, branches, strict=True):
        expected_words += [ancestor_word(i, parents) if is_tree else 0 for i in range(count)]
        expected_depths += depths_of(parents) if is_tree else range(count)
    assert ancestors.tolist() == expected_words
    assert depths.tolist() == expected_depths
