"""Beam and re-rank against loops over candidates: the kernels in Triton's interpreter, and the reference.

B sequences, K beam nodes, W candidates per node, M candidates of all levels, N nodes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
import triton.language as tl
from reference_tree import Candidate, ancestor_word, rerank_reference
from torch import Tensor

from jakiro_vllm.kernels import grow as wrapper
from jakiro_vllm.kernels.grow import Beam, Pool, expand, rerank, triton_kernel

INF = float("inf")
NAN = float("nan")
#: What integers hold before a launch; no result has it.
UNWRITTEN = -77
#: Log-probabilities that add up exactly, so that scores tie often; 0 ties a child with its parent.
COARSE = (0.0, 0.0, -0.25, -0.5, -1.0, -INF)


def coarse(rng: random.Random) -> float:
    return rng.choice(COARSE)


def fine(rng: random.Random) -> float:
    return -rng.expovariate(1.0)


@pytest.fixture(params=[True, False], ids=["triton", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The wrapper runs the kernels, whose allocations hold rubbish, or the reference."""
    if request.param:
        use_triton(monkeypatch)
    return "triton" if request.param else "reference"


def use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def filled(*size: int, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(NAN if tensor.is_floating_point() else UNWRITTEN)

    monkeypatch.setattr(wrapper, "runs_triton", lambda tensor: True)
    monkeypatch.setattr(torch, "empty", filled)


def rubbish_pool(batch: int, total: int) -> Pool:
    integers = torch.full((2, batch, total), UNWRITTEN)
    return Pool(torch.full((batch, total), NAN), integers[0], integers[1])


@dataclass
class LevelInputs:
    """What ``expand`` takes beside the pool."""

    beam: Beam
    tokens: Tensor
    log_probs: Tensor
    first_id: int
    count: int
    first_slot: int
    rows: Tensor | None = None

    def run(self, pool: Pool) -> Beam:
        """The next beam."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return expand(pool, **options)


def expected_beam(given: LevelInputs, pool: Pool) -> Beam:
    """Candidate by candidate; writes the level to the pool."""
    batch, parents = given.beam.scores.shape
    width = given.tokens.shape[2]
    found: list[list[list[float]]] = []
    for b in range(batch):
        candidates = []
        for k in range(parents):
            row = k if given.rows is None else int(given.rows[b, k])
            for w in range(width):
                score = float(given.beam.scores[b, k] + given.log_probs[b, row, w])  # rounded to fp32
                candidates.append((score, int(given.tokens[b, row, w]), k, w))
        for i, (score, token, k, _) in enumerate(candidates):
            pool.scores[b, given.first_id + i] = score
            pool.tokens[b, given.first_id + i] = token
            pool.parent_ids[b, given.first_id + i] = given.beam.ids[b, k]
        best = sorted(range(len(candidates)), key=lambda i: (-candidates[i][0], i))[: given.count]
        words = []
        for position, i in enumerate(best):
            word = int(given.beam.words[b, candidates[i][2]]) % 2**64 | 1 << (given.first_slot + position)
            words.append(word - 2**64 if word >= 2**63 else word)
        score, token, origin, choice = ([candidates[i][part] for i in best] for part in range(4))
        found.append([token, score, [given.first_id + i for i in best], origin, choice, words])
    columns = [[row[part] for row in found] for part in range(6)]
    dtypes = [torch.float32 if field.name == "scores" else torch.int64 for field in fields(Beam)]
    return Beam(*(torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True)))


def check_level(given: LevelInputs, total: int) -> Beam:
    """Compares beam and pool, the pool's other columns included."""
    batch = given.beam.scores.shape[0]
    pool, wanted_pool = rubbish_pool(batch, total), rubbish_pool(batch, total)
    found, wanted = given.run(pool), expected_beam(given, wanted_pool)
    for field in fields(Beam):
        tensor, expected = getattr(found, field.name), getattr(wanted, field.name)
        assert tensor.dtype == expected.dtype, field.name
        assert tensor.tolist() == expected.tolist(), field.name
    torch.testing.assert_close(pool.scores, wanted_pool.scores, rtol=0.0, atol=0.0, equal_nan=True)
    assert torch.equal(pool.tokens, wanted_pool.tokens)
    assert torch.equal(pool.parent_ids, wanted_pool.parent_ids)
    return found


def draw(shape: tuple[int, ...], log_prob: Callable[[random.Random], float], rng: random.Random) -> Tensor:
    size = torch.Size(shape)
    return torch.tensor([log_prob(rng) for _ in range(size.numel())], dtype=torch.float32).view(size)


def make_level(
    batch: int,
    parents: int,
    width: int,
    log_prob: Callable[[random.Random], float],
    rng: random.Random,
    found: int | None = None,
    **options: Any,
) -> LevelInputs:
    """A random level; with ``found``, candidates of as many nodes, of which those that are not named are NaN."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    shape = (batch, parents)
    beam = Beam(
        tokens=integers(2**31, *shape),
        scores=draw(shape, log_prob, rng),
        ids=integers(100, *shape),
        origins=integers(9, *shape),
        choices=integers(9, *shape),
        words=integers(2**20, *shape),
    )
    rows = None if found is None else integers(found, *shape)
    per_node = (batch, found or parents, width)
    log_probs = draw(per_node, log_prob, rng)
    if rows is not None:
        unnamed = torch.ones(per_node[:2], dtype=torch.bool).scatter(1, rows, False)
        log_probs[unnamed] = NAN
    values = {"first_id": 3, "count": min(4, parents * width), "first_slot": 20} | options
    return LevelInputs(beam, integers(2**31, *per_node), log_probs, rows=rows, **values)


DRAWS = [pytest.param(coarse, id="ties"), pytest.param(fine, id="distinct")]


@pytest.mark.parametrize("log_prob", DRAWS)
@pytest.mark.parametrize("gathered", [False, True], ids=["own", "gathered"])
def test_levels(
    gathered: bool, log_prob: Callable[[random.Random], float], implementation: str, rng: random.Random
) -> None:
    for _ in range(12):
        parents, width = rng.randint(1, 12), rng.randint(1, 12)
        size = parents * width
        given = make_level(
            rng.randint(1, 5),
            parents,
            width,
            log_prob,
            rng,
            found=rng.randint(1, 12) if gathered else None,
            first_id=rng.randint(0, 9),
            count=rng.randint(0, min(63, size)),
            first_slot=rng.randint(0, 1),
        )
        check_level(given, given.first_id + size + rng.randint(0, 5))


@pytest.mark.parametrize(
    ("parents", "width", "count", "first_slot"),
    [(1, 1, 1, 0), (1, 1, 1, 63), (1, 63, 63, 1), (63, 63, 63, 0), (64, 64, 0, 0), (12, 1, 12, 52)],
    ids=["one", "last slot", "one parent", "most", "no beam", "chains"],
)
def test_sizes_of_levels(
    parents: int, width: int, count: int, first_slot: int, implementation: str, rng: random.Random
) -> None:
    given = make_level(1, parents, width, fine, rng, first_id=0, count=count, first_slot=first_slot)
    check_level(given, parents * width)


def test_views_are_read_as_they_are(implementation: str, rng: random.Random) -> None:
    """Inputs with strides of their own, such as a beam that all sequences share."""
    given = make_level(3, 4, 5, fine, rng, found=6)
    assert given.rows is not None
    shared = Beam(*(getattr(given.beam, field.name)[:1].expand(3, -1) for field in fields(Beam)))
    transposed = given.tokens.mT.contiguous().mT, given.log_probs.mT.contiguous().mT
    log_probs = transposed[1].nan_to_num(0.0)
    check_level(
        replace(given, beam=shared, tokens=transposed[0], log_probs=log_probs, rows=given.rows[:1].expand(3, -1)), 40
    )


def test_a_beam_without_candidates_is_filled_up(implementation: str, rng: random.Random) -> None:
    given = make_level(2, 3, 4, lambda rng: -INF, rng, count=5)
    assert check_level(given, 20).choices.tolist() == [[0, 1, 2, 3, 0]] * 2


def test_the_root_has_no_slot(implementation: str) -> None:
    pool = Pool.empty(2, 3, "cpu")
    log_probs = torch.tensor([[[-1.0, -2.0, -0.5]], [[-0.5, -INF, -0.25]]])
    beam = expand(pool, Beam.root(2, "cpu"), torch.arange(6).view(2, 1, 3), log_probs, 0, 2)
    assert pool.parent_ids.tolist() == [[-1] * 3] * 2
    assert pool.scores.tolist() == log_probs.squeeze(1).tolist()
    assert beam.ids.tolist() == [[2, 0], [2, 0]]
    assert beam.tokens.tolist() == [[2, 0], [5, 3]]
    assert beam.words.tolist() == [[1, 2]] * 2


def grow(
    batch: int, top_k: int, depth: int, log_prob: Callable[[random.Random], float], rng: random.Random, twice: bool
) -> Pool:
    """Grows as drafting does; with ``twice`` the last level's candidates are those of each node's parent."""
    sizes = [top_k] + [top_k * top_k] * (depth - 1)
    pool = rubbish_pool(batch, sum(sizes))
    beam, parents = Beam.root(batch, "cpu"), 1
    for level in range(depth):
        rows = beam.origins if twice and level == depth - 1 > 0 else None
        shape = (batch, beam.tokens.shape[1] if rows is None else parents, top_k)
        parents = beam.tokens.shape[1]
        tokens = torch.tensor([rng.randrange(1000) for _ in range(batch * shape[1] * top_k)]).view(shape)
        log_probs = draw(shape, log_prob, rng).sort(dim=2, descending=True).values
        last = level == depth - 1
        first_id, first_slot = sum(sizes[:level]), level * top_k
        beam = expand(pool, beam, tokens, log_probs, first_id, 0 if last else top_k, 0 if last else first_slot, rows)
    assert not pool.scores.isnan().any()
    return pool


def candidates_of(pool: Pool, row: int) -> list[Candidate]:
    """One sequence's candidates, each one's depth counted from its parent's."""
    found: list[Candidate] = []
    columns = pool.tokens[row].tolist(), pool.scores[row].tolist(), pool.parent_ids[row].tolist()
    for token, score, parent in zip(*columns, strict=True):
        found.append(Candidate(token, score, parent, 1 if parent < 0 else found[parent].depth + 1))
    return found


def check_rerank(pool: Pool, budget: int, max_depth: int) -> tuple[Tensor, ...]:
    """Compares every column, padding included, with trees made candidate by candidate."""
    batch, total = pool.scores.shape
    roots = torch.arange(2000, 2000 + batch)
    trees = rerank(pool, roots, budget, max_depth)
    width = 1 + min(budget, total)
    names = ("tokens", "parents", "depths", "ancestors")
    assert all(tensor.dtype == torch.int64 for tensor in trees[:5])
    for row in range(batch):
        candidates = candidates_of(pool, row)
        kept = rerank_reference(candidates, budget)
        node_of = {-1: 0} | {candidate: node for node, candidate in enumerate(kept, start=1)}
        parents = [-1, *(node_of[candidates[i].parent] for i in kept)]  # a KeyError if a parent were lost
        assert all(parent < node for node, parent in enumerate(parents))
        count, padding = len(kept) + 1, width - len(kept) - 1
        parents += [0] * padding
        wanted = (
            [2000 + row, *(candidates[i].token for i in kept)] + [-1] * padding,
            parents,
            [0, *(candidates[i].depth for i in kept)] + [1] * padding,
            [ancestor_word(node, parents) for node in range(width)],
        )
        for name, tensor, expected in zip(names, trees, wanted, strict=False):
            assert tensor[row].tolist() == expected, name
        assert int(trees[4][row]) == count
        assert trees[5][row].tolist() == [0.0, *(candidates[i].score for i in kept)] + [-INF] * padding
    return trees


@pytest.mark.parametrize("budget", [1, 5, 16, 63])
@pytest.mark.parametrize("log_prob", DRAWS)
@pytest.mark.parametrize(("top_k", "depth"), [(1, 1), (1, 6), (8, 4), (4, 3), (12, 2)])
def test_rerank(
    top_k: int,
    depth: int,
    log_prob: Callable[[random.Random], float],
    budget: int,
    implementation: str,
    rng: random.Random,
) -> None:
    pool = grow(3, top_k, depth, log_prob, rng, twice=budget % 2 == 0)
    check_rerank(pool, budget, depth)


def descendants(batch: int, total: int, fan: int, deepest: int, rng: random.Random) -> Pool:
    """Candidates whose parents lie up to ``fan`` before them, or above the candidate that would be too deep."""
    pool = rubbish_pool(batch, total)
    for b in range(batch):
        above: list[tuple[float, int]] = []  # score and depth
        for i in range(total):
            parent = rng.randrange(max(-1, i - fan), i) if i else -1
            if parent >= 0 and above[parent][1] == deepest:
                parent = -1
            score, depth = above[parent] if parent >= 0 else (0.0, 0)
            # Multiples of 1/16 are exact in fp32.
            above.append((score - rng.randrange(3) / 16, depth + 1))
            pool.scores[b, i], pool.parent_ids[b, i], pool.tokens[b, i] = above[i][0], parent, rng.randrange(2**40)
    return pool


@pytest.mark.parametrize(
    ("batch", "total", "fan", "deepest", "budget"),
    [(1, 4096, 40, 16, 63), (5, 63, 1, 63, 63), (2, 200, 3, 63, 63), (3, 33, 5, 2, 31), (2, 17, 4, 8, 16)],
    ids=["most candidates", "chains", "narrow", "flat", "half"],
)
def test_rerank_of_any_trees(
    batch: int, total: int, fan: int, deepest: int, budget: int, implementation: str, rng: random.Random
) -> None:
    check_rerank(descendants(batch, total, fan, deepest, rng), budget, deepest)


def test_the_deepest_chain_has_all_bits(implementation: str, rng: random.Random) -> None:
    trees = check_rerank(descendants(1, 63, 1, 63, rng), 63, 63)
    assert trees[3][0, 63] == -1  # all 64


def test_a_parent_comes_before_a_child_that_is_certain(implementation: str, rng: random.Random) -> None:
    """Probability one all the way: the budget cuts the chain from below."""
    trees = check_rerank(grow(2, 1, 6, lambda rng: 0.0, rng, twice=False), 3, 6)
    assert trees[1].tolist() == [[-1, 0, 1, 2]] * 2


def test_impossible_candidates_are_never_kept(implementation: str) -> None:
    """Each tree has its own number of candidates; a root without any is a tree of one node."""
    scores = torch.tensor([[-1.0, -INF, -INF], [-INF, -INF, -INF], [-1.0, -2.0, -0.0]])
    pool = Pool(scores, torch.arange(9).view(3, 3), torch.full((3, 3), -1))
    assert check_rerank(pool, 2, 1)[4].tolist() == [2, 1, 3]


def test_no_sequences(implementation: str) -> None:
    pool = Pool.empty(0, 6, "cpu")
    beam = expand(pool, Beam.root(0, "cpu"), torch.zeros(0, 1, 6, dtype=torch.int64), torch.zeros(0, 1, 6), 0, 2)
    assert beam.scores.shape == (0, 2)
    assert [list(tensor.shape) for tensor in rerank(pool, torch.zeros(0).long(), 4, 1)] == [
        *[[0, 5]] * 4,
        [0],
        [0, 5],
    ]


def test_shapes_are_known_without_values() -> None:
    """On the device ``meta`` reading a value fails."""
    pool, beam = Pool.empty(2, 12, "meta"), Beam.root(2, "meta")
    tokens = torch.zeros(2, 1, 3, dtype=torch.int64, device="meta")
    beam = expand(pool, beam, tokens, tokens.float(), 0, 3)
    tokens = tokens.expand(2, 3, 3)
    assert expand(pool, beam, tokens, tokens.float(), 3, 0, rows=beam.origins).tokens.shape == (2, 0)
    assert rerank(pool, tokens[:, 0, 0], 8, 2)[0].shape == (2, 9)


# Negative controls: what the comparisons above must notice.


@pytest.fixture
def last_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal scores, the later candidate wins."""

    def last_best(values: Any, index: Any) -> tuple[Any, Any]:
        best = tl.max(values, axis=0)
        return best, tl.max(tl.where(values == best, index, -1), axis=0)

    use_triton(monkeypatch)
    monkeypatch.setattr(triton_kernel, "first_best", last_best)


@pytest.mark.usefixtures("last_first")
def test_control_the_order_of_ties_decides_the_beam(rng: random.Random) -> None:
    with pytest.raises(AssertionError):
        check_level(make_level(2, 3, 3, lambda rng: 0.0, rng), 20)


@pytest.mark.usefixtures("last_first")
def test_control_the_order_of_ties_decides_the_tree(rng: random.Random) -> None:
    """The chain's children would be kept without their parents."""
    chain = grow(1, 1, 6, lambda rng: 0.0, rng, twice=False)
    with pytest.raises(AssertionError):
        check_rerank(chain, 3, 6)


def test_control_a_level_needs_its_gather(implementation: str, rng: random.Random) -> None:
    given = make_level(2, 4, 3, fine, rng, found=4, count=6)
    given.log_probs.nan_to_num_(-1.0)
    with_rows = check_level(given, 20)
    without = check_level(replace(given, rows=None), 20)
    assert not torch.equal(with_rows.tokens, without.tokens)


# The wrapper.


def small() -> Iterator[Any]:
    yield Pool.empty(2, 15, "cpu")
    yield Beam(*(torch.zeros(2, 3, dtype=torch.float32 if f.name == "scores" else torch.int64) for f in fields(Beam)))
    yield torch.zeros(2, 3, 4, dtype=torch.int64)
    yield torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens": torch.zeros(2, 2, 4).long()}, r"tokens must be \[2, 3, W\] for the beam, got \[2, 2, 4\]"),
        ({"log_probs": torch.zeros(2, 3, 5)}, r"log_probs must be \[2, 3, 4\] as the tokens, got \[2, 3, 5\]"),
        ({"rows": torch.zeros(2, 4).long()}, r"rows must be \[2, 3\] for the beam, got \[2, 4\]"),
        ({"rows": torch.zeros(2, 3)}, "rows must be int64, got torch.float32"),
        ({"log_probs": torch.zeros(2, 3, 4).double()}, "log_probs must be float32, got torch.float64"),
        ({"tokens": torch.zeros(2, 3, 0).long(), "log_probs": torch.zeros(2, 3, 0)}, "1 to 4096 candidates, got 3 x 0"),
        ({"first_id": 4}, r"room for 2 x 12 candidates from 4, it has \[2, 15\]"),
        ({"count": 13}, r"count must be in \[0, 12\], got 13"),
        ({"first_slot": 63}, r"slots must be in \[0, 63\], got 63 to 64"),
        ({"pool": Pool(*(x.mT for x in (torch.zeros(15, 2), *torch.zeros(2, 15, 2).long())))}, "must be contiguous"),
    ],
    ids=["tokens", "log_probs", "rows", "dtype of rows", "dtype", "no candidates", "room", "count", "slots", "views"],
)
def test_expand_refuses(changes: dict[str, Any], sentence: str) -> None:
    options: dict[str, Any] = dict(zip(("pool", "beam", "tokens", "log_probs"), small(), strict=True))
    options |= {"first_id": 3, "count": 2, "first_slot": 5}
    expand(**options)
    with pytest.raises(ValueError, match=sentence):
        expand(**options | changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pool": Pool.empty(2, 4097, "cpu")}, "1 to 4096 candidates, got 4097"),
        ({"root_tokens": torch.zeros(3).long()}, r"root_tokens must be \[2\] for the pool, got \[3\]"),
        ({"root_tokens": torch.zeros(2)}, "root_tokens must be int64, got torch.float32"),
        ({"node_budget": 64}, r"node_budget must be in \[1, 63\], got 64"),
        ({"node_budget": 0}, r"node_budget must be in \[1, 63\], got 0"),
        ({"max_depth": 0}, "max_depth must be at least 1, got 0"),
    ],
    ids=["candidates", "roots", "dtype", "budget", "no budget", "depth"],
)
def test_rerank_refuses(changes: dict[str, Any], sentence: str) -> None:
    pool = Pool(torch.zeros(2, 3), torch.zeros(2, 3).long(), torch.full((2, 3), -1))
    options: dict[str, Any] = {"pool": pool, "root_tokens": torch.zeros(2).long(), "node_budget": 2, "max_depth": 1}
    rerank(**options)
    with pytest.raises(ValueError, match=sentence):
        rerank(**options | changes)
