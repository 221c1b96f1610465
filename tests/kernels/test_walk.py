"""The verification walk against a loop over sequences and steps.

B sequences, N nodes, S steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from reference_tree import SHAPES, random_parents
from torch import Tensor

from jakiro_vllm.kernels import native
from jakiro_vllm.kernels import walk as wrapper
from jakiro_vllm.kernels.walk import native as compiled
from jakiro_vllm.kernels.walk import walk_greedy, walk_samples
from jakiro_vllm.kernels.walk.reference import walk_samples_reference
from jakiro_vllm.kernels.walk.triton_kernel import launch_walk, walk_into

Result = tuple[Tensor, Tensor, Tensor]
INF, NAN = float("inf"), float("nan")
#: What outputs hold before a launch; no result has it.
UNWRITTEN = -77
needs_compiler = pytest.mark.skipif(native.library() is None, reason="needs a C++ compiler")


def launch_compiled(*arguments: Any) -> Result:
    """The compiled kernel, whose allocations hold what no result has."""
    library, empty = native.library(), torch.empty
    assert library is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(UNWRITTEN))
        return compiled.walk_samples(library, *arguments)


IMPLEMENTATIONS = [
    pytest.param(launch_walk, id="triton"),
    pytest.param(launch_compiled, id="native", marks=needs_compiler),
    pytest.param(walk_samples_reference, id="reference"),
]


@dataclass
class Trees:
    """A batch; past ``num_nodes`` every column tempts with a child of the root that holds the root's sample."""

    tokens: Tensor
    parents: Tensor
    num_nodes: Tensor
    sampled: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the walk's order."""
        return self.tokens, self.parents, self.num_nodes, self.sampled


def make_trees(parents: list[list[int]], width: int, rng: random.Random, vocabulary: int = 5) -> Trees:
    """Trees with few different tokens, so that siblings share them; the target often follows a child."""
    batch = len(parents)
    tokens = torch.tensor([[rng.randrange(vocabulary) for _ in range(width)] for _ in range(batch)])
    sampled = torch.full((batch, width), 2**62 - 1)
    above = torch.zeros(batch, width, dtype=torch.int64)
    for b, tree in enumerate(parents):
        above[b, : len(tree)] = torch.tensor(tree)
        for node in range(len(tree)):
            children = [n for n in range(len(tree)) if tree[n] == node]
            follows = children and rng.random() < 0.8
            sampled[b, node] = tokens[b, rng.choice(children)] if follows else rng.randrange(vocabulary)
        tokens[b, len(tree) :] = sampled[b, 0]
    return Trees(tokens, above, torch.tensor([len(tree) for tree in parents]), sampled)


def expected(trees: Trees, max_depth: int) -> Result:
    """Node by node."""
    batch, steps = trees.tokens.shape[0], max_depth + 1
    path, emitted = torch.zeros(batch, steps, dtype=torch.int64), torch.full((batch, steps), -1)
    num_accepted = torch.zeros(batch, dtype=torch.int64)
    for b in range(batch):
        node = 0
        for step in range(steps):
            token = int(trees.sampled[b, node])
            path[b, step], emitted[b, step], num_accepted[b] = node, token, step
            children = [
                n
                for n in range(int(trees.num_nodes[b]))
                if trees.parents[b, n] == node and trees.tokens[b, n] == token and token != -1
            ]
            if not children:
                break
            node = children[0]
    return path, emitted, num_accepted


def check(trees: Trees, max_depth: int) -> Result:
    """Compares kernels and reference with the loop."""
    batch = trees.tokens.shape[0]
    wanted = expected(trees, max_depth)
    path, emitted = (torch.full((batch, max_depth + 1), UNWRITTEN) for _ in range(2))
    num_accepted = torch.full((batch,), UNWRITTEN)
    walk_into(*trees.arguments, path, emitted, num_accepted)
    others = [walk_samples_reference, *([launch_compiled] if native.library() else [])]
    for found in ((path, emitted, num_accepted), *(other(*trees.arguments, max_depth) for other in others)):
        for tensor, want in zip(found, wanted, strict=True):
            assert tensor.dtype == torch.int64
            torch.testing.assert_close(tensor, want, rtol=0, atol=0)
    return wanted


@pytest.mark.parametrize("max_depth", [1, 6, 16])
@pytest.mark.parametrize("width", [1, 7, 25, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_batches(shape: str, width: int, max_depth: int, rng: random.Random) -> None:
    counts = [1, width, *(rng.randint(1, width) for _ in range(3))]
    check(make_trees([random_parents(shape, count, rng) for count in counts], width, rng), max_depth)


def test_trees_are_followed_to_some_depth(rng: random.Random) -> None:
    """The random trees above would be poor ones if most walks ended at the root."""
    trees = make_trees([random_parents("narrow", 25, rng) for _ in range(32)], 25, rng)
    _, _, num_accepted = check(trees, 6)
    assert set(num_accepted.tolist()) >= {0, 1, 2, 3, 4}


def test_nodes_past_the_end_are_no_children(rng: random.Random) -> None:
    """Negative control: told that they are valid, the walk takes them."""
    trees = make_trees([random_parents("star", 4, rng) for _ in range(6)], 9, rng, vocabulary=100)
    trees.sampled[:, 0] = 100  # held by the columns past the end only
    trees.tokens[:, 4:] = 100
    trees.sampled[:, 4:] = 101
    _, _, num_accepted = check(trees, 2)
    assert num_accepted.tolist() == [0] * 6
    trees.num_nodes += 5
    _, _, num_accepted = check(trees, 2)
    assert (num_accepted > 0).all()


def test_the_first_of_equal_children_is_taken() -> None:
    trees = Trees(
        tokens=torch.tensor([[9, 4, 3, 3, 5]]),
        parents=torch.tensor([[-1, 0, 0, 0, 3]]),
        num_nodes=torch.tensor([5]),
        sampled=torch.tensor([[3, 0, 5, 5, 0]]),
    )
    path, emitted, _ = check(trees, 3)
    assert path.tolist() == [[0, 2, 0, 0]], "node 3, which goes on to 4, is the second one with token 3"
    assert emitted.tolist() == [[3, 5, -1, -1]]


def test_placeholders_match_nothing() -> None:
    trees = Trees(
        tokens=torch.tensor([[7, -1, -1], [-1, 8, 8]]),
        parents=torch.tensor([[-1, 0, 1], [-1, 0, 1]]),
        num_nodes=torch.tensor([3, 3]),
        sampled=torch.tensor([[-1, -1, -1], [8, -1, 8]]),
    )
    path, emitted, num_accepted = check(trees, 2)
    assert path.tolist() == [[0, 0, 0], [0, 1, 0]]
    assert emitted.tolist() == [[-1, -1, -1], [8, -1, -1]]
    assert num_accepted.tolist() == [0, 1]


def test_the_walk_ends_at_the_depth_limit() -> None:
    chain = Trees(
        tokens=torch.arange(20).unsqueeze(0),
        parents=torch.arange(-1, 19).unsqueeze(0),
        num_nodes=torch.tensor([20]),
        sampled=torch.arange(1, 21).unsqueeze(0),
    )
    for max_depth in (0, 1, 5, 16):
        path, emitted, num_accepted = check(chain, max_depth)
        assert path.tolist() == [list(range(max_depth + 1))]
        assert emitted.tolist() == [list(range(1, max_depth + 2))]
        assert num_accepted.tolist() == [max_depth]


@pytest.mark.parametrize("layout", ["rows of a wider buffer", "columns"])
def test_strides(layout: str, rng: random.Random) -> None:
    trees = make_trees([random_parents("binary", 11, rng) for _ in range(4)], 11, rng)
    for name in ("tokens", "parents", "sampled"):
        tensor = getattr(trees, name)
        if layout == "columns":
            setattr(trees, name, tensor.t().contiguous().t())
        else:
            wide = torch.full((4, 17), UNWRITTEN)
            wide[:, 3:14] = tensor
            setattr(trees, name, wide[:, 3:14])
    check(trees, 6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_sequences(implementation: Callable[..., Result]) -> None:
    none = torch.empty(0, 8, dtype=torch.int64)
    found = implementation(none, none, none[:, 0], none, 4)
    assert [list(tensor.shape) for tensor in found] == [[0, 5], [0, 5], [0]]


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_the_wrapper_picks(on_gpu: bool, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper, "runs_triton", lambda tensor: on_gpu)
    launched = []
    monkeypatch.setattr("jakiro_vllm.kernels.walk.triton_kernel.walk_into", lambda *given: launched.append(given))
    trees = make_trees([random_parents("random", 12, rng) for _ in range(3)], 12, rng)
    found = walk_samples(*trees.arguments, 6)
    assert len(launched) == on_gpu
    if not on_gpu:
        assert all(torch.equal(a, b) for a, b in zip(found, expected(trees, 6), strict=True))


@dataclass
class Logits:
    """Logits of a batch of trees, some rows in between belonging to none; few different ones, so that they tie."""

    rows: Tensor
    starts: Tensor

    @classmethod
    def of(cls, trees: Trees, vocabulary: int, dtype: torch.dtype, rng: random.Random) -> Logits:
        gaps = [rng.randrange(3) for _ in range(trees.tokens.shape[0])]
        counts = trees.num_nodes.tolist()
        starts = [sum(counts[:b]) + sum(gaps[: b + 1]) for b in range(len(counts))]
        total = sum(counts) + sum(gaps)
        wide = torch.full((total, vocabulary + 5), NAN).to(dtype)  # what lies between rows is not to be read
        rows = wide[:, :vocabulary]
        for row in range(total):
            rows[row] = torch.tensor([rng.choice((-1.0, 0.0, -0.0, 2.0, -INF)) for _ in range(vocabulary)]).to(dtype)
        return cls(rows, torch.tensor(starts, dtype=torch.int64))


def greedy(trees: Trees, logits: Logits) -> Trees:
    """The same trees, sampled with ``argmax``."""
    sampled = torch.full_like(trees.sampled, UNWRITTEN)
    for b, count in enumerate(trees.num_nodes.tolist()):
        start = int(logits.starts[b])
        sampled[b, :count] = logits.rows[start : start + count].argmax(dim=1)
    return Trees(trees.tokens, trees.parents, trees.num_nodes, sampled)


@pytest.fixture(params=["native", "reference"])
def greedy_walk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """``walk_greedy`` by one implementation."""
    if request.param == "reference":
        monkeypatch.setattr(wrapper, "compiled", lambda *tensors: None)
    elif native.library() is None:
        pytest.skip("needs a C++ compiler")
    else:
        monkeypatch.setattr("jakiro_vllm.kernels.walk.reference.walk_greedy_reference", None)
    return walk_greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("vocabulary", [1, 5, 16, 67])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_highest_logits_are_followed(
    threads: int, vocabulary: int, dtype: torch.dtype, greedy_walk: Callable[..., Result], rng: random.Random
) -> None:
    trees = make_trees([random_parents("random", n, rng) for n in (1, 12, 25, 7)], 25, rng, min(vocabulary, 3))
    logits = Logits.of(trees, vocabulary, dtype, rng)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = greedy_walk(trees.tokens, trees.parents, trees.num_nodes, logits.rows, logits.starts, 6)
    finally:
        torch.set_num_threads(before)
    for tensor, want in zip(found, expected(greedy(trees, logits), 6), strict=True):
        assert torch.equal(tensor, want)


@pytest.mark.parametrize("length", [1, 17, 4096])
def test_a_nan_is_higher_than_all_numbers(length: int, greedy_walk: Callable[..., Result], rng: random.Random) -> None:
    """As in ``argmax``; the first of several."""
    one = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(20):
        row = torch.tensor([[rng.choice((1.0, 3.0, INF, -INF)) for _ in range(length)]])
        for _ in range(rng.randrange(3)):
            row[0, rng.randrange(length)] = NAN
        _, emitted, _ = greedy_walk(one, one - 1, one[0] + 1, row, one[0], 0)
        assert emitted.item() == row.argmax()


def test_threads_share_a_large_vocabulary(generator: torch.Generator) -> None:
    logits = torch.randn(8, 40_000, generator=generator)
    one = torch.zeros(8, 1, dtype=torch.int64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _, emitted, _ = walk_greedy(one, one - 1, one[:, 0] + 1, logits, torch.arange(8), 0)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(emitted[:, 0], logits.argmax(dim=1))


@pytest.mark.parametrize("start", [-1, 1])
def test_rows_that_are_not_there_are_refused(start: int, greedy_walk: Callable[..., Result]) -> None:
    nodes = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(IndexError, match="among 3 rows"):
        greedy_walk(nodes, nodes - 1, nodes[:, 0] + 3, torch.zeros(3, 4), torch.tensor([start]), 2)


def test_logits_of_integers_are_refused() -> None:
    nodes = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\[L, V\] of a floating dtype, got torch.int64"):
        walk_greedy(nodes, nodes - 1, nodes[:, 0] + 3, nodes, nodes[:, 0], 2)


def test_control_a_tie_that_goes_to_the_later_token_is_seen(rng: random.Random) -> None:
    """Negative control."""
    trees = make_trees([random_parents("random", 12, rng) for _ in range(6)], 12, rng, 3)
    logits = Logits.of(trees, 5, torch.float32, rng)
    flipped = Logits(logits.rows.flip(1), logits.starts)
    sampled = greedy(trees, flipped)
    sampled.sampled = 4 - sampled.sampled
    found = walk_greedy(trees.tokens, trees.parents, trees.num_nodes, logits.rows, logits.starts, 6)
    assert not torch.equal(found[1], expected(sampled, 6)[1])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens": torch.zeros(2, 65, dtype=torch.int64)}, r"N in \[1, 64\], got \[2, 65\]"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens must be \[B, N\]"),
        ({"parents": torch.zeros(2, 4, dtype=torch.int64)}, r"parents must be \[2, 3\], got \[2, 4\]"),
        ({"sampled": torch.zeros(1, 3, dtype=torch.int64)}, r"sampled must be \[2, 3\], got \[1, 3\]"),
        ({"num_nodes": torch.zeros(3, dtype=torch.int64)}, r"num_nodes must be \[2\], got \[3\]"),
        ({"sampled": torch.zeros(2, 3, dtype=torch.int32)}, "sampled must be int64, got torch.int32"),
        ({"parents": torch.zeros(2, 3, dtype=torch.int64, device="meta")}, "parents must be on .* cpu, got meta"),
        ({"max_depth": -1}, "max_depth must be at least 0, got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(changes: dict[str, Tensor | int], sentence: str) -> None:
    nodes = torch.zeros(2, 3, dtype=torch.int64)
    given = {"tokens": nodes, "parents": nodes, "num_nodes": nodes[:, 0], "sampled": nodes, "max_depth": 2}
    with pytest.raises(ValueError, match=sentence):
        walk_samples(**(given | changes))
