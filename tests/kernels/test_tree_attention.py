"""Tree attention over pages that vLLM's own operator wrote, against the dense float64 reference.

Every test runs with the compiled kernel and with the one in PyTorch, unless it says otherwise.

J sequences, H query heads, G KV heads, D head size, P pages of B slots.
"""

from __future__ import annotations

import ctypes
import platform
import random
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_tree import SHAPES, ancestor_word, depths_of, path_to, random_parents
from torch import Tensor

from jakiro_vllm.kernels import native
from jakiro_vllm.kernels.tree_attention import PagedCache, TreeJobs, cpu_kernel, tree_attention
from jakiro_vllm.kernels.tree_attention.native import Call
from jakiro_vllm.kernels.tree_attention.reference import tree_attention_reference

#: Inputs are rounded to the dtype before both sides see them. What is left is the rounding of the output,
#: half a unit in the last of 8 (bf16) or 11 (fp16) bits, and fp32 sums in another order.
TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-8, "atol": 2e-5},
    torch.float16: {"rtol": 2**-11, "atol": 2e-5},
}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
#: What rows outside all jobs hold before and after.
UNTOUCHED = 123.0


@pytest.fixture(autouse=True, params=["native", "pytorch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernel works; the other must not be called."""
    chosen: str = request.param
    if chosen == "pytorch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("needs a C++ compiler")
    else:
        monkeypatch.setattr(cpu_kernel, "attend", unexpected)
    return chosen


def unexpected(*arguments: Any) -> None:
    """Stands in for the kernel in PyTorch."""
    raise AssertionError("the compiled kernel was left out")


#: For tests of what only the compiled kernel does.
native_only = pytest.mark.parametrize("kernel", ["native"], indirect=True)


@pytest.fixture
def threads() -> Iterator[None]:
    """More threads than a small problem has items, so that contexts are divided among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def vllm_operators() -> Any:
    """vLLM's operators, or a skip where its CPU build is not installed."""
    ops = pytest.importorskip("vllm._custom_ops", reason="needs vLLM")
    if not hasattr(torch.ops._C, "cpu_attn_reshape_and_cache"):
        pytest.skip("needs vLLM's CPU build")
    return ops


@dataclass(frozen=True)
class Layout:
    """How vLLM lays out KV pages: its name for the instruction set decides."""

    isa: str = "vec"
    block: int = 32
    dim: int = 64
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """The kernel's name for the layout."""
        return "amx" if self.isa == "amx" else "vec"

    def __str__(self) -> str:
        return f"{self.isa}-block{self.block}-dim{self.dim}-{NAMES[self.dtype]}"


#: Every layout that vLLM's CPU backend chooses from instruction set, block size, head size and dtype.
LAYOUTS = [
    *(
        Layout("vec", block, dim, dtype)
        for block in (32, 64, 128)
        for dim in (64, 128)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ),
    *(Layout("vec16", 16, dim, dtype) for dim in (64, 128) for dtype in (torch.float32, torch.bfloat16)),
    *(
        Layout("vec16", block, dim, dtype)
        for block in (16, 32, 128)
        for dim in (80, 112)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ),
    *(Layout("amx", block, dim, torch.bfloat16) for block in (32, 64, 128) for dim in (64, 128)),
    # Small and large heads, pages that do not divide a step of the kernel, and pages longer than one.
    *(Layout("vec", 32, dim, dtype) for dim in (32, 96, 192, 256) for dtype in (torch.float32, torch.bfloat16)),
    *(Layout("vec", block, 64, dtype) for block in (96, 160, 256) for dtype in (torch.float32, torch.float16)),
    *(Layout("amx", block, dim, torch.bfloat16) for block, dim in ((96, 64), (256, 256))),
]


@dataclass
class Problem:
    """Sequences with their trees; the tree's rows are the query rows unless ``rows`` says otherwise.

    Attributes:
        contexts: committed tokens per sequence.
        parents: per sequence.
        rows: per sequence the nodes that are queried, all by default.
    """

    contexts: Sequence[int]
    parents: Sequence[Sequence[int]]
    kv_heads: int = 2
    group: int = 2
    layout: Layout = field(default_factory=Layout)
    rows: Sequence[Sequence[int]] | None = None
    peak: float = 1.0  # scale of the queries; large ones make one key win
    seed: int = 0


class Inputs:
    """The tensors of a problem, with NaN wherever nothing may be read."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        layout = problem.layout
        generator = torch.Generator().manual_seed(problem.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(layout.dtype)

        heads, dim = problem.kv_heads * problem.group, layout.dim
        self.rows = problem.rows or [range(len(parents)) for parents in problem.parents]
        self.context_keys = [draw(n, problem.kv_heads, dim) for n in problem.contexts]
        self.context_values = [draw(n, problem.kv_heads, dim) for n in problem.contexts]
        self.tree_keys = [draw(len(parents), problem.kv_heads, dim) for parents in problem.parents]
        self.tree_values = [draw(len(parents), problem.kv_heads, dim) for parents in problem.parents]
        self.queries = [draw(len(rows), heads, dim) * problem.peak for rows in self.rows]
        self.visible, self.words, self.depths = [], [], []
        for parents, rows in zip(problem.parents, self.rows, strict=True):
            mask = torch.zeros(len(rows), len(parents), dtype=torch.bool)
            for i, node in enumerate(rows):
                mask[i, path_to(node, parents)] = True
            self.visible.append(mask)
            self.words.append(torch.tensor([ancestor_word(node, parents) for node in rows], dtype=torch.int64))
            self.depths.append(torch.tensor([depths_of(parents)[node] for node in rows], dtype=torch.int64))
        self.scale = dim**-0.5
        self._write_pages(generator)

    def _write_pages(self, generator: torch.Generator) -> None:
        """Scatters the contexts over shuffled pages; what no context fills stays NaN."""
        problem, layout = self.problem, self.problem.layout
        pages_of = [-(-n // layout.block) for n in problem.contexts]
        order = (torch.randperm(sum(pages_of) + 2, generator=generator) + 1).tolist()
        # Unused columns name a page that holds nothing.
        self.tables = torch.zeros(len(pages_of), max(1, *pages_of), dtype=torch.int32)
        for i, count in enumerate(pages_of):
            self.tables[i, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
        shape = (sum(pages_of) + 3, problem.kv_heads, layout.block, 2 * layout.dim)
        pages = torch.full(shape, float("nan"), dtype=layout.dtype)
        for table, keys, values in zip(self.tables.long(), self.context_keys, self.context_values, strict=True):
            positions = torch.arange(keys.shape[0])
            slots = table[positions // layout.block] * layout.block + positions % layout.block
            write_with_vllm(pages, keys, values, slots, layout.isa)
        self.cache = PagedCache(pages, layout.name)

    def packed(self) -> dict[str, Any]:
        """The arguments of ``tree_attention``: rows and nodes with gaps before, between and after."""
        problem = self.problem
        row_starts, node_starts, row, node = [], [], 3, 1
        for rows, parents in zip(self.rows, problem.parents, strict=True):
            row_starts.append(row)
            node_starts.append(node)
            row, node = row + len(rows) + 2, node + len(parents) + 3
        heads, dim = problem.kv_heads * problem.group, problem.layout.dim
        query = torch.full((row, heads, dim), float("nan"), dtype=problem.layout.dtype)
        words, depths = torch.full((row,), -1), torch.full((row,), 10**9)
        out = torch.full_like(query, UNTOUCHED)
        keys = torch.full((node, problem.kv_heads, dim), float("nan"), dtype=problem.layout.dtype)
        values = keys.clone()
        self.spans = [slice(start, start + len(rows)) for start, rows in zip(row_starts, self.rows, strict=True)]
        for i, span in enumerate(self.spans):
            query[span], words[span], depths[span] = self.queries[i], self.words[i], self.depths[i]
            out[span] = float("nan")
            nodes = slice(node_starts[i], node_starts[i] + len(problem.parents[i]))
            keys[nodes], values[nodes] = self.tree_keys[i], self.tree_values[i]
        jobs = TreeJobs(
            block_tables=self.tables,
            context_lens=torch.tensor(problem.contexts),
            row_starts=torch.tensor(row_starts),
            row_counts=torch.tensor([len(rows) for rows in self.rows]),
            node_starts=torch.tensor(node_starts),
            node_counts=torch.tensor([len(parents) for parents in problem.parents]),
        )
        return {
            "query": query,
            "cache": self.cache,
            "jobs": jobs,
            "tree_keys": keys,
            "tree_values": values,
            "ancestors": words,
            "depths": depths,
            "scale": self.scale,
            "out": out,
        }

    def run(self, **options: Any) -> Tensor:
        """The kernel's rows, one sequence after the other; everything else must be left alone."""
        arguments = self.packed() | options
        out = arguments["out"]
        assert tree_attention(**arguments) is out
        inside = torch.zeros(out.shape[0], dtype=torch.bool)
        for span in self.spans:
            inside[span] = True
        assert (out[~inside] == UNTOUCHED).all(), "a row outside the jobs was written"
        return out[inside]

    def expect(self, visible: list[Tensor] | None = None, **options: Any) -> Tensor:
        """The reference's rows."""
        return tree_attention_reference(
            torch.cat(self.queries),
            self.context_keys,
            self.context_values,
            self.tree_keys,
            self.tree_values,
            visible or self.visible,
            self.depths,
            self.scale,
            **options,
        )

    def check(self, **options: Any) -> None:
        """Kernel against reference."""
        tolerance = TOLERANCES[self.problem.layout.dtype]
        torch.testing.assert_close(self.run(**options).double(), self.expect(**options), **tolerance)


def write_with_vllm(pages: Tensor, keys: Tensor, values: Tensor, slots: Tensor, isa: str) -> None:
    """Writes ``[T, G, D]`` as ``CPUAttentionBackendImpl.do_kv_cache_update`` does."""
    num_blocks, kv_heads, block, _ = pages.size()
    key_cache, value_cache = pages.view((num_blocks, kv_heads, block * 2, -1)).chunk(2, dim=2)
    vllm_operators().cpu_attn_reshape_and_cache(
        keys, values, key_cache, value_cache, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )


def everything(layout: Layout, **options: Any) -> Problem:
    """One batch with every kind of tree and context: none, one slot, page edges, several pages."""
    rng = random.Random(1)
    block = layout.block
    contexts = [0, 1, block - 1, block, block + 1, 3 * block + 5, 0, 2 * block]
    shapes = ["chain", "random", "star", "narrow", "binary", "chain", "random", "random"]
    sizes = [1, 1, 9, 24, 31, 64, 63, 64]
    parents = [random_parents(shape, size, rng) for shape, size in zip(shapes, sizes, strict=True)]
    return Problem(contexts, parents, layout=layout, **options)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_kv_layout(layout: Layout) -> None:
    Inputs(everything(layout, kv_heads=1, group=2)).check()


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (3, 1), (2, 2), (2, 4), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_grouped_queries(kv_heads: int, group: int, dtype: torch.dtype) -> None:
    Inputs(everything(Layout(dtype=dtype), kv_heads=kv_heads, group=group)).check()


SINGLE = [
    pytest.param([5], [1], ["chain"], id="one-node"),
    pytest.param([0], [1], ["chain"], id="one-node-and-nothing-else"),
    pytest.param([33], [9], ["chain"], id="chain"),
    pytest.param([0], [64], ["chain"], id="chain-of-64-without-context"),
    *(pytest.param([70], [63], [shape], id=f"63-nodes-{shape}") for shape in SHAPES),
    *(pytest.param([70], [64], [shape], id=f"64-nodes-{shape}") for shape in SHAPES),
    pytest.param([0, 0, 0], [3, 1, 20], ["random"] * 3, id="empty-contexts"),
    pytest.param([1, 200, 31, 64, 7], [2, 17, 40, 1, 8], ["random"] * 5, id="ragged"),
    pytest.param([9000, 3, 4500], [4, 2, 3], ["random"] * 3, id="long-contexts"),
]


@pytest.mark.parametrize(("contexts", "sizes", "shapes"), SINGLE)
def test_trees_and_contexts(contexts: list[int], sizes: list[int], shapes: list[str], rng: random.Random) -> None:
    parents = [random_parents(shape, size, rng) for shape, size in zip(shapes, sizes, strict=True)]
    Inputs(Problem(contexts, parents)).check()


@pytest.mark.parametrize("peak", [8.0, 60.0], ids=["sharp", "one-key-wins"])
def test_large_scores(peak: float) -> None:
    """Scores of hundreds: the running maximum moves, weights underflow, and nothing overflows."""
    problem = everything(Layout(), peak=peak)
    inputs = Inputs(problem)
    # fp32 scores of size s are off by s * 2^-23 each, and so are the logarithms of the weights.
    torch.testing.assert_close(inputs.run().double(), inputs.expect(), rtol=1e-3, atol=1e-3)
    assert inputs.expect().isfinite().all()


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("layout", [Layout(), Layout("amx", 32, 64, torch.bfloat16)], ids=str)
def test_softcap(layout: Layout, softcap: float) -> None:
    inputs = Inputs(everything(layout, peak=4.0))
    inputs.check(softcap=softcap)
    assert not torch.allclose(inputs.run(softcap=softcap).double(), inputs.expect(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("window", [8, 31, 32, 33, 64, 1000])
@pytest.mark.parametrize("layout", [Layout(), Layout("vec16", 16, 80, torch.bfloat16)], ids=str)
def test_sliding_window(layout: Layout, window: int, rng: random.Random) -> None:
    """Distance is counted in depth, not in rows: siblings lie at one position."""
    contexts = [0, 3, 7, 8, 9, 40, 100, 200]
    parents = [random_parents(shape, 16, rng) for shape in ["binary", "random"] * 4]
    assert max(max(depths_of(p)) for p in parents) < 8
    inputs = Inputs(Problem(contexts, parents, layout=layout))
    inputs.check(window=window)
    same = torch.allclose(inputs.run(window=window).double(), inputs.expect(), rtol=1e-2, atol=1e-2)
    assert same == (window == 1000), "the window makes a difference unless it spans the context"


def test_window_and_softcap_together(rng: random.Random) -> None:
    parents = [random_parents("binary", 30, rng) for _ in range(3)]
    Inputs(Problem([10, 90, 0], parents, peak=3.0)).check(window=20, softcap=4.0)


def test_rows_that_are_not_nodes(rng: random.Random) -> None:
    """As drafting calls it: few rows over all nodes of earlier levels, of which many are nobody's ancestors."""
    parents = [random_parents("random", size, rng) for size in (40, 64, 10)]
    rows = [[39, 5, 38], [63], [9, 8, 7, 6]]
    inputs = Inputs(Problem([50, 0, 31], parents, rows=rows))
    for i, mask in enumerate(inputs.visible):
        unseen = ~mask.any(dim=0)
        assert unseen.any()
        inputs.tree_keys[i][unseen] = float("nan")
        inputs.tree_values[i][unseen] = float("nan")
    inputs.check()


def test_a_sequence_without_rows_writes_nothing(rng: random.Random) -> None:
    parents = [random_parents("random", 9, rng) for _ in range(3)]
    Inputs(Problem([40, 33, 2], parents, rows=[range(9), [], [3, 8]])).check()


def test_no_nodes_at_all() -> None:
    """The first forward of a draft sees the context alone."""
    inputs = Inputs(Problem([40, 7, 1], [[-1, 0]] * 3, rows=[[0, 1], [0], [1]]))
    inputs.problem.parents = [[]] * 3
    for name in ("tree_keys", "tree_values"):
        setattr(inputs, name, [x[:0] for x in getattr(inputs, name)])
    inputs.words = [torch.zeros_like(words) for words in inputs.words]
    inputs.visible = [mask[:, :0] for mask in inputs.visible]
    inputs.check()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [12, 64])
def test_nodes_that_are_no_ancestors_are_not_read(shape: str, size: int, rng: random.Random) -> None:
    """Every row by itself, with all other branches and its own descendants poisoned."""
    parents = random_parents(shape, size, rng)
    whole = Inputs(Problem([20], [parents], kv_heads=1, group=1))
    expected = whole.expect()
    for node in range(size):
        inputs = Inputs(Problem([20], [parents], kv_heads=1, group=1))
        inputs.rows = [[node]]
        for name in ("queries", "words", "depths"):
            setattr(inputs, name, [getattr(whole, name)[0][node : node + 1]])
        hidden = ~whole.visible[0][node]
        inputs.tree_keys[0][hidden] = float("nan")
        inputs.tree_values[0][hidden] = float("nan")
        torch.testing.assert_close(inputs.run().double(), expected[node : node + 1], **TOLERANCES[torch.float32])


def test_order_and_company_do_not_matter(rng: random.Random) -> None:
    """A sequence gets the same result alone as in any batch."""
    sizes, contexts = [5, 64, 1, 20], [40, 3, 0, 65]
    parents = [random_parents("random", size, rng) for size in sizes]
    together = Inputs(Problem(contexts, parents))
    rows = together.run().split(sizes)
    for i in range(len(sizes)):
        arguments = together.packed()
        jobs = arguments["jobs"]
        alone = TreeJobs(*(getattr(jobs, f.name)[i : i + 1] for f in fields(jobs) if f.init))
        tree_attention(**(arguments | {"jobs": alone}))
        torch.testing.assert_close(arguments["out"][together.spans[i]], rows[i], **TOLERANCES[torch.float32])


def test_jobs_serve_several_layers_and_several_levels(rng: random.Random) -> None:
    """The same jobs with other pages, as in the layers of a step, and with other words, as in drafting."""
    parents = [random_parents("random", size, rng) for size in (10, 30)]
    layers = [Inputs(Problem([40, 7], parents, seed=seed)) for seed in (0, 1)]
    for layer in layers:
        layer._write_pages(torch.Generator().manual_seed(0))  # in the same places
    step = {name: layers[0].packed()[name] for name in ("jobs", "ancestors", "depths")}
    for layer in layers:
        torch.testing.assert_close(layer.run(**step).double(), layer.expect(), **TOLERANCES[torch.float32])
    for layer in layers:
        layer.words = [torch.ones_like(words) for words in layer.words]
        root_only = [torch.zeros_like(mask).index_fill(1, torch.tensor(0), True) for mask in layer.visible]
        out = layer.run(jobs=step["jobs"]).double()
        torch.testing.assert_close(out, layer.expect(visible=root_only), **TOLERANCES[torch.float32])


def test_no_jobs_leave_the_output_alone() -> None:
    arguments = Inputs(Problem([3], [[-1]])).packed()
    arguments["out"].fill_(UNTOUCHED)
    none = TreeJobs(*(getattr(arguments["jobs"], f.name)[:0] for f in fields(TreeJobs) if f.init))
    tree_attention(**(arguments | {"jobs": none}))
    assert (arguments["out"] == UNTOUCHED).all()


def test_output_may_be_part_of_a_larger_tensor(rng: random.Random) -> None:
    inputs = Inputs(Problem([40, 5], [random_parents("random", 12, rng), [-1]]))
    wide = torch.full((inputs.packed()["out"].shape[0], 4, 2 * 64), float("nan"))
    out = wide[:, :, :64]
    out.copy_(inputs.packed()["out"])
    torch.testing.assert_close(inputs.run(out=out).double(), inputs.expect(), **TOLERANCES[torch.float32])
    assert wide[:, :, 64:].isnan().all()


@pytest.mark.parametrize("seed", range(12))
def test_anything(seed: int) -> None:
    """Random layouts, batches, trees, contexts, windows and caps."""
    rng = random.Random(seed)
    layout = rng.choice(LAYOUTS)
    jobs = rng.randint(1, 5)
    parents = [random_parents(rng.choice(SHAPES), rng.choice([1, 2, 17, 25, 63, 64]), rng) for _ in range(jobs)]
    contexts = [rng.choice([0, 1, rng.randrange(200), rng.randrange(1500)]) for _ in range(jobs)]
    problem = Problem(contexts, parents, rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 4, 7, 8]), layout, seed=seed)
    options: dict[str, Any] = {}
    if rng.random() < 0.5:
        options["window"] = max(max(depths_of(p)) for p in parents) + rng.randint(1, 300)
    if rng.random() < 0.5:
        options["softcap"] = rng.choice([1.0, 30.0])
    Inputs(problem).check(**options)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("window", [-1, 700, 2000])
@pytest.mark.parametrize("layout", [Layout(), Layout("amx", 32, 64, torch.bfloat16)], ids=str)
def test_a_context_divided_among_threads(layout: Layout, window: int, rng: random.Random) -> None:
    """Ranges that some rows' windows leave out, a last one of a single slot, and company that is not divided."""
    parents = [random_parents("random", size, rng) for size in (25, 3, 64)]
    inputs = Inputs(Problem([2049, 90, 1500], parents, kv_heads=1, layout=layout))
    inputs.check(window=window)
    first = inputs.run(window=window)
    for _ in range(5):
        assert torch.equal(inputs.run(window=window), first), "the result depends on which thread did what"


def test_more_rows_than_a_thread_takes_at_once(rng: random.Random) -> None:
    parents = [random_parents("random", size, rng) for size in (64, 50)]
    Inputs(Problem([40, 300], parents, kv_heads=1, group=8)).check()


def test_tensors_may_be_parts_of_larger_ones(rng: random.Random) -> None:
    """Queries, keys and values as a fused projection leaves them, and pages with something between them."""
    inputs = Inputs(Problem([40, 5, 100], [random_parents("random", size, rng) for size in (12, 1, 30)]))
    arguments = inputs.packed()
    wide = {}
    for name in ("query", "tree_keys", "tree_values"):
        whole = torch.full((arguments[name].shape[0], 3, *arguments[name].shape[1:]), float("nan"))
        wide[name] = whole[:, 1]
        wide[name].copy_(arguments[name])
    found = inputs.run(**wide).double()
    torch.testing.assert_close(found, inputs.expect(), **TOLERANCES[torch.float32])


@native_only
def test_pages_may_lie_apart(rng: random.Random) -> None:
    inputs = Inputs(Problem([40, 5, 100], [random_parents("random", size, rng) for size in (12, 1, 30)]))
    pages = inputs.cache.pages
    apart = torch.full((pages.shape[0], 2, *pages.shape[1:]), float("nan"))[:, 1]
    apart.copy_(pages)
    found = inputs.run(cache=PagedCache(apart, "vec")).double()
    torch.testing.assert_close(found, inputs.expect(), **TOLERANCES[torch.float32])


def test_what_is_not_a_number_shows() -> None:
    """A broken model's keys must not look like an answer; who does not see them is spared."""
    inputs = Inputs(Problem([40, 40], [[-1, 0, 0], [-1, 0]], kv_heads=1))
    block = inputs.problem.layout.block
    page = int(inputs.tables[0, 7 // block])
    inputs.cache.pages.view(-1, 2, 64, block)[page, 0, :, 7 % block] = float("nan")
    found = inputs.run()
    assert found[:3].isnan().all()
    torch.testing.assert_close(found[3:].double(), inputs.expect()[3:], **TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_every_number_of_a_short_dtype(dtype: torch.dtype) -> None:
    """A tree of one node returns its value; one of two under a zero query their mean, rounded once."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 1, 64)  # [1024, 1, 64]
    every = torch.where(every.isfinite(), every, torch.zeros_like(every))
    shifted = torch.cat([every[1:], every[:1]])
    for values in (every, torch.stack([every, shifted], dim=1).flatten(0, 1)):
        nodes = values.shape[0] // 1024
        count, start = torch.full((1024,), nodes), torch.arange(1024)
        jobs = TreeJobs(
            block_tables=torch.zeros(1024, 1, dtype=torch.int32),
            context_lens=torch.zeros(1024, dtype=torch.int64),
            row_starts=start,
            row_counts=torch.ones(1024, dtype=torch.int64),
            node_starts=start * nodes,
            node_counts=count,
        )
        query = torch.zeros_like(every)
        out = torch.full_like(every, float("nan"))
        cache = PagedCache(torch.full((1, 1, 32, 128), float("nan"), dtype=dtype), "vec")
        words, depths = torch.full((1024,), 2**nodes - 1), torch.zeros(1024, dtype=torch.int64)
        tree_attention(query, cache, jobs, torch.zeros_like(values), values, words, depths, 1.0, out)
        mean = values.float().view(1024, nodes, 64).sum(dim=1) / nodes
        assert torch.equal(out, mean.to(dtype).view_as(out))


@native_only
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
@pytest.mark.parametrize("machine", ["x86-64", "x86-64-v3"])
def test_older_instruction_sets(machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other machines compile: narrower vectors, conversions without an instruction."""
    flags = tuple(f"-march={machine}" if flag.startswith("-march") else flag for flag in native.FLAGS)
    compiler = native.compiler()
    assert compiler is not None
    if machine == "x86-64-v3" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("needs AVX2")
    monkeypatch.setattr(native, "FLAGS", flags)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = ctypes.CDLL(str(native.build(compiler)))
    monkeypatch.setattr(native, "library", lambda: library)
    for layout in LAYOUTS[::3]:
        Inputs(everything(layout, kv_heads=1, group=3)).check(softcap=20.0)
    for dtype in (torch.bfloat16, torch.float16):
        test_every_number_of_a_short_dtype(dtype)


# How the compiled kernel comes about.


@native_only
def test_the_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "native.cpp"
    monkeypatch.setattr(native, "SOURCES", (source,))
    source.write_text('extern "C" int tree_attention(const void*) { return 0; }')
    compiler = native.compiler()
    assert compiler is not None
    built = native.build(compiler)
    assert list(built.parent.iterdir()) == [built], "something was left behind"
    written = built.stat().st_mtime_ns
    assert native.build(compiler) == built
    assert built.stat().st_mtime_ns == written
    source.write_text('extern "C" int tree_attention(const void*) { return 1; }')
    assert native.build(compiler) != built
    source.write_text("no C++")
    with pytest.raises(subprocess.CalledProcessError):
        native.build(compiler)
    assert len(list(built.parent.iterdir())) == 2


@pytest.mark.parametrize("kernel", ["pytorch"], indirect=True)
@pytest.mark.parametrize("missing", ["compiler", "folder", "sense"])
def test_without_a_library_the_work_is_done_and_said(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()  # the fixture's replacement of what is tested here
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if missing == "compiler":
        monkeypatch.setenv("PATH", "")
    elif missing == "folder":
        (tmp_path / "jakiro_vllm").write_text("a file")
    else:
        monkeypatch.setattr(native, "SOURCES", (tmp_path / "native.cpp",))
        native.SOURCES[0].write_text("no C++")
    native.library.cache_clear()
    try:
        assert not native.prepare()
        assert not native.prepare()
        Inputs(everything(Layout())).check()
    finally:
        native.library.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "PyTorch" in caplog.text


def test_the_arguments_have_the_size_that_the_kernel_expects() -> None:
    assert ctypes.sizeof(Call) == 8 * (5 * 3 + 2 + 7 + 9) + 2 * 4


# Negative controls: what must make the comparison fail.


def test_a_wrong_mask_is_noticed() -> None:
    inputs = Inputs(everything(Layout()))
    words, everyone = inputs.words, [torch.ones_like(mask) for mask in inputs.visible]
    causal = [torch.ones_like(mask).tril() for mask in inputs.visible]
    # A chain's last word names every node.
    inputs.words = [torch.full_like(w, ancestor_word(len(w) - 1, range(-1, len(w) - 1))) for w in words]
    unmasked = inputs.run().double()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(unmasked, inputs.expect(), **TOLERANCES[torch.float32])
    torch.testing.assert_close(unmasked, inputs.expect(visible=everyone), **TOLERANCES[torch.float32])
    inputs.words = words
    with pytest.raises(AssertionError):
        torch.testing.assert_close(inputs.run().double(), inputs.expect(visible=causal), **TOLERANCES[torch.float32])


def test_the_last_bit_matters() -> None:
    """Bit 63 is the sign of a word: without it the last node would miss itself."""
    inputs = Inputs(Problem([4], [random_parents("star", 64, random.Random(0))]))
    words = inputs.packed()["ancestors"]
    assert (words < -1).any()
    shown = inputs.run(ancestors=words & torch.iinfo(torch.int64).max)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(shown.double(), inputs.expect(), **TOLERANCES[torch.float32])


def test_a_wrong_layout_is_noticed() -> None:
    inputs = Inputs(everything(Layout("amx", 32, 64, torch.bfloat16)))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            inputs.run(cache=replace(inputs.cache, layout="vec")).double(),
            inputs.expect(),
            **TOLERANCES[torch.bfloat16],
        )


# The oracle and the layouts, checked against what others say of them.


def test_the_reference_is_masked_attention(rng: random.Random) -> None:
    """Against PyTorch's operator with a dense mask, in float64."""
    inputs = Inputs(Problem([7, 0, 40], [random_parents("random", n, rng) for n in (12, 5, 30)], kv_heads=2, group=3))
    window, outputs = 12, []
    for i, mask in enumerate(inputs.visible):
        context = inputs.context_keys[i].shape[0]
        positions = context + inputs.depths[i].unsqueeze(1)
        seen = torch.cat([torch.arange(context) > positions - window, mask], dim=1)
        keys = torch.cat([inputs.context_keys[i], inputs.tree_keys[i]]).double()
        values = torch.cat([inputs.context_values[i], inputs.tree_values[i]]).double()
        q, k, v = (x.transpose(0, 1) for x in (inputs.queries[i].double(), keys, values))
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=inputs.scale, enable_gqa=True
            ).transpose(0, 1)
        )
    torch.testing.assert_close(inputs.expect(window=window), torch.cat(outputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("isa", ["vec", "vec16", "amx"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("block", [32, 128])
def test_vllm_lays_out_pages_as_documented(isa: str, dim: int, block: int, generator: torch.Generator) -> None:
    """Bit for bit, so that the kernel can be trusted with instruction sets that the machine does not have."""
    keys, values = (torch.randn(block, 2, dim, generator=generator).bfloat16() for _ in range(2))
    pages = torch.full((3, 2, block, 2 * dim), float("nan"), dtype=torch.bfloat16)
    write_with_vllm(pages, keys, values, torch.arange(block, 2 * block), isa)
    raw = pages.view(3, 2, 2, block * dim)
    for head in range(2):
        k, v = keys[:, head], values[:, head]  # [B, D]
        if isa == "amx":
            k = k.reshape(block // 16, 16, dim // 2, 2).permute(0, 2, 1, 3)
            v = v.reshape(block // 2, 2, dim // 16, 16).permute(2, 0, 3, 1)
        else:
            k = k.T
        assert torch.equal(raw[1, head, 0], k.flatten())
        assert torch.equal(raw[1, head, 1], v.flatten())
    assert raw[[0, 2]].isnan().all()


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param({}, {"window": 20}, id="window"),
        pytest.param({"peak": 3.0}, {"softcap": 4.0}, id="softcap"),
        pytest.param({"kv_heads": 1, "group": 7}, {}, id="group7"),
    ],
)
@pytest.mark.parametrize("layout", [Layout(), Layout("vec16", 16, 80), Layout("vec", 128, 128)], ids=str)
def test_a_chain_is_plain_causal_attention(layout: Layout, options: dict[str, Any], extra: dict[str, Any]) -> None:
    """A tree without branches equals vLLM's own operator, which reads the chain from the pages."""
    ops = vllm_operators()
    contexts, sizes = [0, 5, 31, 64, 200], [19, 1, 7, 19, 12]
    chains = [list(range(-1, size - 1)) for size in sizes]
    problem = Problem(contexts, chains, layout=layout, **options)
    inputs = Inputs(problem)
    found = inputs.run(**extra)

    whole = replace(problem, contexts=[c + n for c, n in zip(contexts, sizes, strict=True)], parents=[[-1]] * 5)
    pages = Inputs(whole)
    for i in range(5):
        pages.context_keys[i] = torch.cat([inputs.context_keys[i], inputs.tree_keys[i]])
        pages.context_values[i] = torch.cat([inputs.context_values[i], inputs.tree_values[i]])
    pages._write_pages(torch.Generator().manual_seed(0))
    pages.cache.pages.nan_to_num_()  # vLLM's operator gives unused slots weight 0, and 0 * NaN is NaN
    query = torch.cat(inputs.queries)
    starts = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)
    lengths = torch.tensor(whole.contexts, dtype=torch.int32)
    window = extra.get("window", -1)
    heads = problem.kv_heads * problem.group
    scheduled = ops.cpu_attn_get_scheduler_metadata(
        5, heads, problem.kv_heads, layout.dim, lengths, layout.dtype, starts, True, window, layout.isa, True
    )
    blocks, _, block, _ = pages.cache.pages.shape
    key_cache, value_cache = pages.cache.pages.view(blocks, problem.kv_heads, 2 * block, -1).chunk(2, dim=2)
    expected = torch.full_like(query, float("nan"))
    ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=expected,
        query_start_loc=starts,
        seq_lens=lengths,
        scale=inputs.scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=window,
        block_table=pages.tables,
        softcap=extra.get("softcap", 0.0),
        scheduler_metadata=scheduled,
        s_aux=None,
    )
    torch.testing.assert_close(found, expected, **TOLERANCES[torch.float32])


# Refusals.


def test_an_unknown_layout_is_refused() -> None:
    inputs = Inputs(Problem([3], [[-1]]))
    with pytest.raises(ValueError, match="must be one of vec, amx, got 'neon'"):
        inputs.run(cache=replace(inputs.cache, layout="neon"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_pages_of_another_dtype_are_refused(dtype: torch.dtype) -> None:
    inputs = Inputs(Problem([3], [[-1]]))
    with pytest.raises(ValueError, match="dtype") as error:
        inputs.run(cache=replace(inputs.cache, pages=inputs.cache.pages.to(dtype)))
    assert str(dtype) in str(error.value)
    assert "torch.float32" in str(error.value)


def test_another_device_is_refused() -> None:
    inputs = Inputs(Problem([3], [[-1]]))
    with pytest.raises(ValueError, match="meta"):
        tree_attention(**(inputs.packed() | {"query": torch.empty(4, 4, 64, device="meta")}))


@native_only
def test_too_many_nodes_are_refused() -> None:
    inputs = Inputs(Problem([3], [range(-1, 64)], rows=[[0]]))
    with pytest.raises(ValueError, match="at most 64 nodes"):
        inputs.run()


@native_only
def test_pairs_of_another_dtype_are_refused() -> None:
    inputs = Inputs(Problem([3], [[-1]]))
    with pytest.raises(ValueError, match="bfloat16 only"):
        inputs.run(cache=replace(inputs.cache, layout="amx"))
