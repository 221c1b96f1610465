"""Trees, node by node: random ones, and what re-ranking and the walk must do with them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jakiro_vllm.tree.batch import TreeBatch

SHAPES = ("random", "chain", "star", "binary", "narrow")


def random_parents(shape: str, num_nodes: int, rng: random.Random) -> list[int]:
    """Parents of a tree in topological order, -1 for the root."""
    parents = [-1]
    for node in range(1, num_nodes):
        parents.append(
            {
                "random": rng.randrange(node),
                "chain": node - 1,
                "star": 0,
                "binary": (node - 1) // 2,
                "narrow": rng.randrange(max(0, node - 3), node),  # deep, with short side branches
            }[shape]
        )
    return parents


def path_to(node: int, parents: Sequence[int]) -> list[int]:
    """The nodes from the root to ``node``, both included."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def depths_of(parents: Sequence[int]) -> list[int]:
    """Edges from the root."""
    return [len(path_to(node, parents)) - 1 for node in range(len(parents))]


def ancestor_word(node: int, parents: Sequence[int]) -> int:
    """The path's bits as a signed 64-bit integer."""
    word = sum(1 << j for j in path_to(node, parents))
    return word - (1 << 64) if word >= 1 << 63 else word


def make_batch(trees: Sequence[tuple[Sequence[int], Sequence[int]]], width: int | None = None) -> TreeBatch:
    """Builds a batch from ``(parents, tokens)`` per tree; columns past a tree hold conspicuous rubbish."""
    width = width or max(len(parents) for parents, _ in trees)
    tokens = torch.full((len(trees), width), 7, dtype=torch.int64)
    parents_, depths, words = torch.zeros_like(tokens), torch.ones_like(tokens), torch.zeros_like(tokens)
    for i, (parents, names) in enumerate(trees):
        count = len(parents)
        tokens[i, :count] = torch.tensor(names)
        parents_[i, :count] = torch.tensor(parents)
        depths[i, :count] = torch.tensor(depths_of(parents))
        words[i, :count] = torch.tensor([ancestor_word(node, parents) for node in range(count)])
    return TreeBatch(tokens, parents_, depths, words, torch.tensor([len(parents) for parents, _ in trees]))


@dataclass
class Candidate:
    """One node that drafting proposed; ``parent`` indexes the same list, -1 for the root."""

    token: int
    score: float
    parent: int
    depth: int


def rerank_reference(candidates: Sequence[Candidate], budget: int) -> list[int]:
    """Which candidates a tree keeps: the best, and of equal ones the earlier."""
    possible = [i for i, candidate in enumerate(candidates) if candidate.score != float("-inf")]
    return sorted(possible, key=lambda i: (-candidates[i].score, i))[:budget]


def walk_reference(
    parents: Sequence[int], tokens: Sequence[int], samples: Sequence[int], max_depth: int
) -> tuple[list[int], list[int]]:
    """Follows ``samples[step]`` down one tree.

    Returns:
        ``(path, emitted)``: nodes from the root, and tokens, the bonus token last.
    """
    path, emitted = [0], []
    for step in range(max_depth + 1):
        emitted.append(samples[step])
        children = [n for n in range(len(parents)) if parents[n] == path[-1] and tokens[n] == samples[step]]
        if not children or step == max_depth:
            break
        path.append(children[0])
    return path, emitted
