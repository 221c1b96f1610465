"""Flat arrays of token trees."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_tree import SHAPES, ancestor_word, depths_of, make_batch, random_parents

from jakiro_vllm.tree.batch import TreeBatch, ancestor_words, chains, make_trees


def assert_same(found: TreeBatch, expected: TreeBatch) -> None:
    """Equal in every valid node."""
    assert torch.equal(found.num_nodes, expected.num_nodes)
    for i, count in enumerate(expected.num_nodes.tolist()):
        for name in ("tokens", "parents", "depths", "ancestors"):
            assert torch.equal(getattr(found, name)[i, :count], getattr(expected, name)[i, :count]), name


@pytest.mark.parametrize("size", [1, 2, 17, 63, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_ancestor_words(shape: str, size: int, rng: random.Random) -> None:
    trees = [random_parents(shape, size, rng) for _ in range(4)]
    depth = max(max(depths_of(parents)) for parents in trees)
    expected = [[ancestor_word(node, parents) for node in range(size)] for parents in trees]
    assert ancestor_words(torch.tensor(trees), depth).tolist() == expected
    # A looser bound changes nothing; a tighter one loses the root.
    assert ancestor_words(torch.tensor(trees), depth + 5).tolist() == expected
    if depth:
        assert ancestor_words(torch.tensor(trees), depth - 1).tolist() != expected


@given(st.data())
def test_ancestor_words_of_any_tree(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 64))
    parents = [-1] + [data.draw(st.integers(0, node - 1)) for node in range(1, size)]
    found = ancestor_words(torch.tensor([parents]), size)[0].tolist()
    assert found == [ancestor_word(node, parents) for node in range(size)]


def test_the_last_node_has_the_sign_bit() -> None:
    words = ancestor_words(torch.tensor([[-1] + [0] * 63]), 1)[0].tolist()
    assert words[63] == -(1 << 63) + 1
    assert all(word > 0 for word in words[:63])


def test_more_nodes_than_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 64 nodes, got 65"):
        ancestor_words(torch.zeros(1, 65, dtype=torch.int64), 1)


@pytest.mark.parametrize("width", [1, 2, 30, 64])
def test_chains(width: int, generator: torch.Generator) -> None:
    counts = torch.tensor([1, width, (width + 1) // 2])
    tokens = torch.randint(0, 99, (3, width), generator=generator)
    expected = make_batch(
        [(range(-1, n - 1), row[:n]) for n, row in zip(counts.tolist(), tokens.tolist(), strict=True)]
    )
    assert_same(chains(tokens, counts), expected)


def test_make_trees_adds_the_words(rng: random.Random) -> None:
    expected = make_batch([(random_parents("random", n, rng), range(n)) for n in (9, 1, 5)])
    depth = int(expected.depths.max())
    found = make_trees(expected.tokens, expected.parents, expected.depths, expected.num_nodes, depth)
    assert_same(found, expected)


def test_select_and_truncate(rng: random.Random) -> None:
    described = [(random_parents("random", n, rng), [rng.randrange(50) for _ in range(n)]) for n in (9, 1, 5, 12)]
    trees = make_batch(described)
    assert (trees.batch_size, trees.width) == (4, 12)
    rows = [3, 0, 0]
    assert_same(trees.select(torch.tensor(rows)), make_batch([described[i] for i in rows], width=12))
    limits = [4, 7, 5, 1]
    cut = make_batch([(p[:n], t[:n]) for (p, t), n in zip(described, limits, strict=True)], width=12)
    # A limit above a tree's size leaves it whole.
    assert_same(trees.truncate(torch.tensor(limits)), cut)
    assert trees.num_nodes.tolist() == [9, 1, 5, 12]
