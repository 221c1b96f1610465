"""Which rows stay, and where, against a loop."""

from __future__ import annotations

import random

import pytest
import torch
from reference_tree import path_to, random_parents

from jakiro_vllm.cache.commit import committed_rows, moved_rows
from jakiro_vllm.tree.walk import Accepted


def accepted_of(paths: list[list[int]]) -> Accepted:
    """The walk's result for paths from the root; tokens do not matter here."""
    width = max(len(path) for path in paths)
    padded = torch.tensor([path + [0] * (width - len(path)) for path in paths])
    counts = torch.tensor([len(path) for path in paths])
    return Accepted(padded, torch.zeros_like(padded), counts - 1)


def check(prefixes: list[int], sizes: list[int], paths: list[list[int]]) -> None:
    """``sizes``: nodes per tree, of which ``paths`` are accepted."""
    starts, row = [], 0
    for prefix, size in zip(prefixes, sizes, strict=True):
        starts.append(row)
        row += prefix + size
    sources, destinations, requests, offsets, last = [], [], [], [], []
    moved: list[tuple[int, int]] = []
    for i, (start, prefix, path) in enumerate(zip(starts, prefixes, paths, strict=True)):
        tree = [start + prefix + node for node in path]
        rows = [start + j for j in range(prefix)] + tree
        moved += [(s, start + prefix + j) for j, s in enumerate(tree) if s != start + prefix + j]
        sources += rows
        destinations += range(start, start + len(rows))
        requests += [i] * len(rows)
        offsets += range(len(rows))
        last.append(len(sources) - 1)
    accepted = accepted_of(paths)
    found = committed_rows(torch.tensor(starts), torch.tensor(prefixes), accepted.num_accepted, accepted.path)
    assert found.sources.tolist() == sources
    assert found.destinations.tolist() == destinations
    assert found.requests.tolist() == requests
    assert found.offsets.tolist() == offsets
    assert found.last.tolist() == last
    trees = torch.tensor(starts) + torch.tensor(prefixes)
    assert list(zip(*(t.tolist() for t in moved_rows(trees, accepted)), strict=True)) == moved
    # Never into a row that still has to be read: slots are left of what lands in them.
    assert all(destination < source for source, destination in moved)


@pytest.mark.parametrize(
    ("prefixes", "sizes", "paths"),
    [
        pytest.param([0], [1], [[0]], id="plain-decoding"),
        pytest.param([6], [1], [[0]], id="prompt-chunk"),
        pytest.param([0], [5], [[0]], id="nothing-accepted"),
        pytest.param([0], [5], [[0, 1, 2, 3, 4]], id="chain-accepted"),
        pytest.param([0], [9], [[0, 2, 5, 8]], id="branch-accepted"),
        pytest.param([0], [9], [[0, 1, 5]], id="first-nodes-stay"),
        pytest.param([0, 7, 0, 0, 3], [4, 1, 1, 9, 1], [[0, 3], [0], [0], [0, 1, 8], [0]], id="mixed-step"),
        pytest.param([2, 0], [6, 3], [[0, 4, 5], [0, 2]], id="prefix-before-a-tree"),
    ],
)
def test_committed_rows(prefixes: list[int], sizes: list[int], paths: list[list[int]]) -> None:
    check(prefixes, sizes, paths)


def test_random_steps(rng: random.Random) -> None:
    for _ in range(100):
        prefixes = [rng.choice([0, 0, 0, 1, 20]) for _ in range(rng.randint(1, 6))]
        trees = [random_parents(rng.choice(["random", "narrow"]), rng.randint(1, 64), rng) for _ in prefixes]
        paths = [path_to(rng.randrange(len(parents)), parents) for parents in trees]
        check(prefixes, [len(parents) for parents in trees], paths)


def test_only_rows_out_of_place_move() -> None:
    sources, destinations = moved_rows(torch.tensor([0, 7]), accepted_of([[0, 1, 4], [0]]))
    assert (sources.tolist(), destinations.tolist()) == ([4], [2])
