"""Attention of whole batches against the reference, row by row in float64.

T packed rows, R requests, H query heads, G KV heads, D head size, P pages of B slots.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from jakiro_vllm.kernels import batch_attention as wrapper
from jakiro_vllm.kernels.batch_attention import BatchRows, Scratch, batch_attention
from jakiro_vllm.kernels.batch_attention.reference import batch_attention_reference

triton_kernel = pytest.importorskip("jakiro_vllm.kernels.batch_attention.triton_kernel", reason="needs Triton")

NAN = float("nan")
#: What outputs hold before a launch; no result has it.
UNWRITTEN = -77.0
#: By the query's dtype: float32 sums hundreds of products in another order; the others round weights and results to
#: 8 and 11 bits.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
#: ``(context, words)``: committed tokens, and an ancestor word per row.
Request = tuple[int, list[int]]


def tree(nodes: int, rng: random.Random, reach: int = 64) -> list[int]:
    """Words of a random tree whose nodes' parents are at most ``reach`` before them; 1 makes a chain."""
    words = [1]
    for node in range(1, nodes):
        words.append(words[rng.randrange(max(0, node - reach), node)] | 1 << node)
    return words


def signed(word: int) -> int:
    """64 bits as an int64."""
    return word - (1 << 64) if word >> 63 else word


@dataclass
class Case:
    """Arguments of a call; ``check`` compares implementations on them."""

    query: Tensor
    key_pages: Tensor
    value_pages: Tensor
    rows: BatchRows
    scale: float
    options: dict[str, Any]

    def run(self, function: Callable[..., Tensor], dtype: torch.dtype, **options: Any) -> Tensor:
        """The outputs in ``dtype``, UNWRITTEN where none was written."""
        out = torch.full(self.query.shape, UNWRITTEN, dtype=dtype)
        found = function(
            self.query, self.key_pages, self.value_pages, self.rows, self.scale, out, **self.options, **options
        )
        assert found is out
        return out

    def expected(self) -> Tensor:
        """The reference's outputs, float64."""
        return self.run(batch_attention_reference, torch.float64)

    def check(self, **options: Any) -> None:
        """The kernel and the reference agree, and write the requests' rows and no others."""
        found, expected = self.run(triton_kernel.launch, self.query.dtype, **options), self.expected()
        owned = torch.zeros(len(expected), dtype=torch.bool)
        owned[int(self.rows.row_starts[0]) : int(self.rows.row_starts[-1])] = True
        assert not expected[owned].isnan().any(), "the case lets a row see what is poisoned"
        assert (found[~owned] == UNWRITTEN).all()
        torch.testing.assert_close(found[owned].double(), expected[owned], rtol=0, atol=TOLERANCE[self.query.dtype])


def make_case(
    requests: Sequence[Request],
    heads: int = 4,
    kv_heads: int = 1,
    dim: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    pages_dtype: torch.dtype | None = None,
    layout: str = "rows first",
    window: int = -1,
    softcap: float = 0.0,
    scratch: tuple[int, int] | None = None,
    spare: tuple[int, int] = (0, 0),
    seed: int = 0,
) -> Case:
    """A batch whose memory is NaN but for what rows see.

    Args:
        requests: see ``Request``.
        heads: H.
        kv_heads: G.
        dim: D.
        page_size: B.
        dtype: of queries and results.
        pages_dtype: of the pages, where not the same.
        layout: of the pages: "rows first" as ``[P, 2, B, G, D]``, "heads first" as ``[P, G, B, 2 * D]``.
        window: as ``batch_attention``.
        softcap: likewise.
        scratch: slots, and how many are used; the nodes of trees are there instead of in the pages.
        spare: rows of no request before and after the others.
        seed: of everything random.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [len(words) for _, words in requests]
    starts = torch.tensor([0, *counts]).cumsum(0).int() + spare[0]
    num_rows = int(starts[-1]) + spare[1]
    words = torch.zeros(num_rows, dtype=torch.int64)
    depths = torch.zeros(num_rows, dtype=torch.int32)

    columns = max(context + max(len(named), 64) for context, named in requests)
    width = -(-columns // page_size)
    needed = len(requests) * width
    order = torch.randperm(needed + 1, generator=generator).int()
    tables, poisoned = order[:-1].view(len(requests), width), order[-1]
    flat = torch.randn((needed + 1) * page_size, 2, kv_heads, dim, generator=generator)
    visible = torch.zeros((needed + 1) * page_size, dtype=torch.bool)
    nodes = torch.randn(2, len(requests), scratch[0] if scratch else 0, kv_heads, dim, generator=generator)
    nodes_visible = torch.zeros(nodes.shape[1:3], dtype=torch.bool)
    for r, (context, named) in enumerate(requests):
        seen: set[int] = set()
        for i, word in enumerate(named):
            depth = word.bit_count() - 1 if word else i
            row = int(starts[r]) + i
            words[row], depths[row] = signed(word), depth
            own = [j for j in range(64) if word >> j & 1]
            seen.update(range(max(0, context + depth - window + 1) if window > 0 else 0, context))
            if scratch:
                nodes_visible[r, [j for j in own if j < scratch[1]]] = True
            else:
                seen.update(context + j for j in own)
            if not word and not scratch:
                seen.update(range(context, context + i + 1))
        index = torch.tensor(sorted(seen), dtype=torch.int64)
        visible[tables[r, index // page_size].long() * page_size + index % page_size] = True
        tables[r, [page for page in range(width) if not any(c // page_size == page for c in seen)]] = poisoned
    flat[~visible] = NAN
    nodes[:, ~nodes_visible] = NAN

    pages = flat.view(-1, page_size, 2, kv_heads, dim)
    if layout == "rows first":
        keys, values = pages.transpose(1, 2).contiguous().to(pages_dtype or dtype).unbind(1)
    else:
        joined = pages.permute(0, 3, 1, 2, 4).flatten(3).contiguous().to(pages_dtype or dtype)
        keys, values = joined.transpose(1, 2).split(dim, dim=-1)
    options: dict[str, Any] = {"window": window, "softcap": softcap}
    if pages_dtype is not None:
        options |= {"key_scale": torch.tensor([0.7]), "value_scale": torch.tensor([1.6])}
    if scratch:
        options["scratch"] = Scratch(*nodes.to(dtype), scratch[1])
    query = torch.randn(num_rows, heads + 1, dim + 16, generator=generator).to(dtype)[:, :heads, :dim]
    rows = BatchRows(tables, starts, torch.tensor([c for c, _ in requests]).int(), words, depths, max(1, *counts, 1))
    return Case(query, keys, values, rows, 1.5 / math.sqrt(dim), options)


def mixed(rng: random.Random) -> list[Request]:
    """Trees, decoding, a prompt's end and padding in one launch."""
    return [(37, tree(9, rng)), (50, [0]), (21, [0] * 20), (0, []), (16, tree(12, rng, reach=1)), (3, [0])]


BATCHES: dict[str, list[Request]] = {
    "one-node tree": [(20, [1])],
    "one-node tree, empty context": [(0, [1])],
    "tree at a page's end": [(32, tree(7, random.Random(1)))],
    "tree over three pages": [(15, tree(30, random.Random(2)))],
    "63 nodes": [(5, tree(63, random.Random(3)))],
    "64 nodes": [(5, tree(64, random.Random(4)))],
    "chain of 64": [(1, tree(64, random.Random(5), reach=1))],
    "last rows of a tree": [(40, tree(64, random.Random(6))[50:])],
    "rows that name few nodes": [(18, [1 << 63, 1 << 9 | 1 << 31, 1 << 40])],
    "decode, ragged contexts": [(context, [0]) for context in (0, 1, 15, 16, 17, 100)],
    "prompt": [(0, [0] * 50)],
    "prompt's second chunk": [(33, [0] * 21)],
    "padding only": [(0, []), (0, [])],
    "padding around": [(9, []), (30, tree(4, random.Random(7))), (0, [])],
    "mixed": mixed(random.Random(8)),
}


@pytest.fixture(autouse=True)
def poisoned_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """New floating-point memory holds NaN."""
    real = torch.empty

    def empty(*sizes: Any, **options: Any) -> Tensor:
        found = real(*sizes, **options)
        return found.fill_(NAN) if found.is_floating_point() else found

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 takes the programs of bfloat16: what GPUs mostly run, to the last digits, and fewer tiles."""
    kind, rows = triton_kernel._kind, triton_kernel.block_rows
    monkeypatch.setattr(triton_kernel, "_kind", lambda block, dim, dtype: kind(block, dim, torch.bfloat16))
    monkeypatch.setattr(
        triton_kernel,
        "block_rows",
        lambda most, group, dim, dtype, *rest: rows(most, group, dim, torch.bfloat16, *rest),
    )


@pytest.fixture(autouse=True)
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile's columns are worth a split, so that short contexts are split, too."""
    monkeypatch.setattr(triton_kernel, "least_columns", lambda block: 32)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("name", BATCHES)
def test_batches(name: str, splits: int) -> None:
    make_case(BATCHES[name]).check(splits=splits)


@pytest.mark.parametrize("used", [0, 1, 21, 63, 64])
@pytest.mark.parametrize("splits", [1, 2])
def test_scratch(used: int, splits: int, rng: random.Random) -> None:
    """Rows are a tree's frontier: nodes that are not written yet are named by no other's row."""
    requests = [(context, [*tree(64, rng)[max(0, used - 4) : used], 0]) for context in (0, 7, 40)]
    make_case(requests, scratch=(64, used)).check(splits=splits)


def test_scratch_ends_before_what_words_name() -> None:
    make_case([(12, [0b1011, 0b111])], scratch=(8, 2)).check()


def test_a_row_that_sees_nothing_gets_zeros() -> None:
    case = make_case([(0, [0, 1]), (0, [2])], scratch=(4, 1))
    out = case.run(triton_kernel.launch, torch.float32, splits=2)
    assert out[[0, 2]].count_nonzero() == 0
    assert out[1].count_nonzero() > 0


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("spoilt", [[0], [1, 4], [6]], ids=["long", "tree", "nothing seen"])
def test_nan_stays_in_its_row(splits: int, spoilt: list[int]) -> None:
    """A row that sees nothing gets zeros whatever its query."""
    case = make_case([(300, [0]), (20, tree(5, random.Random(0))), (0, [0])], scratch=(8, 5))
    expected = case.run(triton_kernel.launch, torch.float32, splits=splits)
    case.query[spoilt] = NAN
    found = case.run(triton_kernel.launch, torch.float32, splits=splits)
    others = [row for row in range(len(found)) if row not in spoilt]
    assert expected.isfinite().all()
    assert torch.equal(found[others], expected[others])
    assert torch.equal(found[6], torch.zeros_like(found[6]))
    assert found[[row for row in spoilt if row != 6]].isnan().all()


@pytest.mark.parametrize("scratch", [None, (8, 5)], ids=["pages", "scratch"])
def test_splits_follow_contexts(
    scratch: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    """Block tables are wide and most contexts short: splits without columns write nothing and are not merged."""
    monkeypatch.setattr(triton_kernel, "least_columns", lambda block: 128)
    taken, new = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: taken.append(new(*sizes, **options)) or taken[-1])
    case = make_case([(500, [0]), (120, tree(5, rng)), (0, tree(3, rng)), (1000, [0])], scratch=scratch)
    case.check(splits=8)
    partial, stats = taken
    active = torch.tensor([4] + [1] * 8 + [8])
    assert torch.equal(stats[-1], active[:, None].expand(-1, 4).float())
    written = ~partial.isnan().flatten(2).all(-1)
    assert torch.equal(written, torch.arange(8)[:, None] < active)


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(4, 4), (6, 2), (7, 1), (16, 2), (71, 1)], ids=lambda number: str(number)
)
def test_groups(heads: int, kv_heads: int, rng: random.Random) -> None:
    make_case([(20, tree(5, rng)), (5, [0])], heads, kv_heads).check(splits=2)


@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 192, 256])
def test_head_sizes(dim: int, rng: random.Random) -> None:
    make_case([(20, tree(5, rng))], 2, 1, dim).check(splits=2)


@pytest.mark.parametrize(
    ("page_size", "layout"), [(16, "rows first"), (16, "heads first"), (48, "rows first"), (544, "heads first")]
)
def test_pages(page_size: int, layout: str, rng: random.Random) -> None:
    requests = [(530, tree(30, rng)), (47, [0, 0])]
    make_case(requests, kv_heads=2, page_size=page_size, layout=layout).check(splits=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("rows", ["few rows", "many rows"])
def test_dtypes(dtype: torch.dtype, splits: int, rows: str, rng: random.Random) -> None:
    requests = [(150, tree(3, rng)), (9, [0])] if rows == "few rows" else [(300, tree(33, rng)), (100, [0] * 40)]
    make_case(requests, dtype=dtype, dim=64).check(splits=splits)


@pytest.mark.parametrize("pages_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("scratch", [None, (16, 9)], ids=["pages", "scratch"])
def test_fp8_pages(
    pages_dtype: torch.dtype, dtype: torch.dtype, scratch: tuple[int, int] | None, rng: random.Random
) -> None:
    requests = [(40, tree(9, rng)), (70, [0])]
    case = make_case(requests, dtype=dtype, pages_dtype=pages_dtype, scratch=scratch, softcap=3.0)
    case.check(splits=2)
    del case.options["softcap"]
    case.check()


@pytest.mark.parametrize(("window", "softcap"), [(20, 0.0), (33, 2.0)], ids=["20", "33 softcap"])
@pytest.mark.parametrize("scratch", [None, (64, 20)], ids=["pages", "scratch"])
def test_windows(window: int, scratch: tuple[int, int] | None, softcap: float, rng: random.Random) -> None:
    """Whole pages before the window are poisoned; prompts outgrow it."""
    requests = [(90, tree(20, rng)), (150, [0]), (10, [0] * 40), (4, [0])]
    make_case(requests, window=window, scratch=scratch, softcap=softcap).check(splits=2)


@pytest.mark.parametrize("spare", [(7, 5), (40, 40)], ids=str)
@pytest.mark.parametrize("max_rows", [20, 400], ids=["even", "ragged"])
def test_rows_of_no_request_are_left_alone(spare: tuple[int, int], max_rows: int, rng: random.Random) -> None:
    case = make_case(mixed(rng), spare=spare)
    case.rows = replace(case.rows, max_rows=max_rows)
    case.check(splits=2)


def test_a_slice_of_the_requests(rng: random.Random) -> None:
    """The others' rows are left alone."""
    case = make_case(mixed(rng))
    rows = case.rows
    case.rows = replace(
        rows,
        block_tables=rows.block_tables[1:4],
        row_starts=rows.row_starts[1:5],
        context_lens=rows.context_lens[1:4],
    )
    case.check(splits=2)


def test_many_requests(rng: random.Random) -> None:
    """More than the search for a program's request reads at a time."""
    requests: list[Request] = [(rng.randrange(3), [0] * (rng.random() < 0.1)) for _ in range(270)]
    case = make_case([*requests, (2, [0] * 30)], heads=1, kv_heads=1)
    assert len(requests) > 256
    case.check()


CONFIGURATIONS = [
    pytest.param(kind, config, id=f"{kind} {config.kwargs} {config.num_warps} warps")
    for kind, configs in triton_kernel._CONFIGS.items()
    for config in configs
]


@pytest.mark.parametrize(("kind", "config"), CONFIGURATIONS)
@pytest.mark.parametrize("window", [-1, 100], ids=["all", "window"])
def test_configurations(
    kind: str, config: Any, window: int, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    """In float32, and so to the last digits, with some tiles that all rows see whole."""

    class Configured:
        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
            return lambda *arguments, **options: triton_kernel.attend[grid](*arguments, **options, **config.kwargs)

    blocks = {"low": 16, "middle": 64, "high": 128, "wide low": 16, "wide": 64, "float": 16}
    monkeypatch.setattr(triton_kernel, "_tuned_attend", lambda chosen: Configured())
    monkeypatch.setattr(triton_kernel, "block_rows", lambda *sizes: blocks[kind])
    requests = [(140, tree(20, rng)), (90, [0] * 40)]
    make_case(requests, 2, 1, window=window).check(splits=2)


@pytest.mark.parametrize("seed", range(12))
def test_random_batches(seed: int) -> None:
    """Everything at once."""
    rng = random.Random(seed)
    requests: list[Request] = []
    for _ in range(rng.randrange(1, 6)):
        context = rng.choice([0, rng.randrange(20), rng.randrange(200)])
        kind = rng.choice(["tree", "tree", "decode", "prompt", "nothing"])
        rows = {"decode": 1, "prompt": rng.randrange(2, 40), "nothing": 0}.get(kind, 0)
        requests.append((context, tree(rng.randrange(1, 64), rng) if kind == "tree" else [0] * rows))
    group, kv_heads = rng.choice([1, 2, 3, 4, 8]), rng.choice([1, 2])
    dtype = rng.choice(list(TOLERANCE))
    case = make_case(
        requests,
        group * kv_heads,
        kv_heads,
        dim=rng.choice([16, 24, 32, 64]),
        page_size=rng.choice([16, 32, 112]),
        dtype=dtype,
        pages_dtype=rng.choice([None, None, torch.float8_e4m3fn]),
        layout=rng.choice(["rows first", "heads first"]),
        window=rng.choice([-1, -1, 70]),
        softcap=rng.choice([0.0, 0.0, 5.0]),
        scratch=rng.choice([None, None, (64, rng.randrange(65))]),
        spare=(rng.randrange(3), rng.randrange(3)),
        seed=seed,
    )
    case.check(splits=rng.choice([1, 2, 8]))


def without_poison(case: Case) -> Case:
    """Nothing is NaN, so that a wrong mask gives wrong numbers."""
    return replace(case, key_pages=case.key_pages.nan_to_num(0.5), value_pages=case.value_pages.nan_to_num(0.5))


@pytest.mark.parametrize("broken", ["causal words", "all nodes", "no window", "longer context", "poisoned node"])
def test_negative_controls(broken: str, rng: random.Random) -> None:
    """Each rule matters: the comparison fails where it is broken."""
    window = 20 if broken == "no window" else -1
    case = without_poison(make_case([(30, tree(12, rng)), (25, tree(5, rng))], window=window))
    case.check()
    expected, words = case.expected(), case.rows.ancestors
    if broken == "causal words":
        case.rows = replace(case.rows, ancestors=torch.zeros_like(words))
    elif broken == "all nodes":
        case.rows = replace(case.rows, ancestors=torch.full_like(words, 31))
    elif broken == "no window":
        case.options["window"] = -1
    elif broken == "longer context":
        case.rows = replace(case.rows, context_lens=case.rows.context_lens + 1)
    else:
        page, slot = case.rows.block_tables[0, 32 // 16], 32 % 16
        case.value_pages[page, slot] = NAN
    found = case.run(triton_kernel.launch, torch.float32)
    assert not (found - expected).abs().max() < 0.01


def test_splits_fill_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough programs where there is enough to read, never too many, and a power of two."""
    monkeypatch.undo()
    count = triton_kernel.count_splits
    assert count(1000, 128, 64, 1 << 20, 132) == 1
    assert count(16, 128, 64, 1 << 20, 132) == 8
    assert count(1, 16, 1, 1 << 20, 132) == triton_kernel.MOST_SPLITS
    assert count(1, 16, 1, 600, 132) == 2, "a split must have some columns"
    assert count(1, 128, 64, 1100, 132) == 2, "and more where its results are large"
    assert count(1, 16, 1, 16, 132) == 1
    assert count(1, 128, 4096, 1 << 20, 132) == 1, "partial results of a prompt are large"
    before = triton_kernel.MOST_SPLITS
    for programs in range(1, 300):
        splits = count(programs, 64, 64, 1 << 20, 132)
        assert splits.bit_count() == 1
        assert splits == 1 or programs * splits <= 2 * 132
        assert splits <= before, "warming up relies on it"
        before = splits


def test_a_program_holds_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rows = triton_kernel.block_rows
    assert rows(61, 1, 128, torch.bfloat16, False) == 64
    assert rows(64, 4, 128, torch.bfloat16, False) == 128
    assert rows(1, 8, 128, torch.bfloat16, False) == 16
    assert rows(64, 4, 256, torch.bfloat16, False) == 64
    assert rows(64, 4, 128, torch.float32, False) == 16
    assert rows(1, 71, 128, torch.float32, True) == 128, "a row's heads stay together"


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "reference"])
def test_the_wrapper(triton: bool, monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
    monkeypatch.setattr(wrapper, "runs_triton", lambda tensor: triton)
    case = make_case(mixed(rng), kv_heads=2)
    found = case.run(batch_attention, torch.float32)
    assert (found - case.expected()).abs().max() < TOLERANCE[torch.float32]


def test_nothing_to_do() -> None:
    case = make_case([(3, [0])])
    case.query, case.rows = case.query[:0], replace(case.rows, ancestors=torch.zeros(0).long(), depths=torch.zeros(0))
    assert case.run(batch_attention, torch.float32).shape == (0, 4, 16)


def change(case: Case, name: str, value: Any) -> None:
    """Sets an attribute of the case, of its rows or an option."""
    if name in ("query", "key_pages", "value_pages", "scale"):
        setattr(case, name, value)
    elif name == "scratch":
        case.options[name] = value
    else:
        case.rows = replace(case.rows, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("query", torch.zeros(3, 4, 16, dtype=torch.float64), r"query must be .* got \[3, 4, 16\] torch.float64"),
        ("query", torch.zeros(3, 64), r"query must be \[T, H, D\]"),
        ("query", torch.zeros(3, 5, 16), "1 to 128 per KV head, got 5 for 2 KV heads"),
        ("query", torch.zeros(3, 258, 16), "1 to 128 per KV head, got 258 for 2"),
        ("key_pages", torch.zeros(9, 16, 2, 8), r"key_pages must be \[P, B, G, 16\].*got \[9, 16, 2, 8\]"),
        ("value_pages", torch.zeros(9, 16, 2, 32)[..., ::2], "value_pages must be .* contiguous heads"),
        ("value_pages", torch.zeros(9, 16, 1, 16), "alike for keys and values"),
        ("key_pages", torch.zeros(9, 16, 2, 16).half(), "key_pages must be torch.float32 as the query.*float16"),
        ("scale", 0.0, "scale must be positive, got 0.0"),
        ("row_starts", torch.zeros(5).int(), "1 contexts need 2 row starts and 1 block tables, got 5 and 1"),
        ("ancestors", torch.zeros(2).long(), r"one entry for each row, got \[2\] and \[3\]"),
        ("ancestors", torch.zeros(3).int(), "ancestors must be int64, got torch.int32"),
        ("depths", torch.zeros(6).int()[::2], "depths must be contiguous"),
        ("max_rows", 0, "max_rows must be at least 1, got 0"),
        ("scratch", Scratch(torch.zeros(1, 8, 2, 16), torch.zeros(1, 8, 2, 16), 9), r"within the 8 slots, got 9"),
        ("scratch", Scratch(torch.zeros(1, 8, 2, 16), torch.zeros(1, 8, 1, 16), 3), r"scratch.values must be \[1, 8"),
    ],
)
def test_errors(name: str, value: Any, sentence: str) -> None:
    case = make_case([(3, [0, 0, 0])], kv_heads=2)
    case.key_pages = case.value_pages = torch.zeros(9, 16, 2, 16)
    change(case, name, value)
    with pytest.raises(ValueError, match=sentence):
        case.run(batch_attention, torch.float32)


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        (torch.zeros(3, 4, 8), r"out must be \[3, 4, 16\].*got \[3, 4, 8\]"),
        (torch.zeros(3, 4, 16).long(), "out must be .* got .* torch.int64"),
    ],
    ids=["shape", "dtype"],
)
def test_errors_of_out(out: Tensor, sentence: str) -> None:
    case = make_case([(3, [0, 0, 0])])
    with pytest.raises(ValueError, match=sentence):
        batch_attention(case.query, case.key_pages, case.value_pages, case.rows, case.scale, out)


def test_head_sizes_have_a_limit() -> None:
    case = make_case([(3, [0])], dim=272)
    with pytest.raises(ValueError, match=r"head size must be in \[1, 256\], got 272"):
        case.run(batch_attention, torch.float32)


def test_old_gpus_have_no_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: True))
    case = make_case([(3, [0])], pages_dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"need compute capability 8.9 or newer, got \(8, 0\); use float8_e5m2"):
        case.run(batch_attention, torch.float32)
