"""What a draft and a verification cost by tree size, depth, context, batch, vocabulary and number of experts.

    .venv/bin/python benchmarks/scaling.py --rounds 5 --output build/scaling.csv

One axis is varied at a time around a base point; the points of an axis take turns, each round beginning with another.
Needs vLLM's CPU build: on a GPU a draft is a CUDA graph, which ``benchmarks/kernels.py`` measures.

- *draft*: ``TreeDrafter`` alone (observe and grow), with a random head of the pair's sizes, an LM head of any
  vocabulary, multiplied as vLLM does it, and pages of any context; no engine.
- *verify*: the target's forward with its LM head, sampling with the walk, and compaction, in vLLM's engine, which is
  told what trees to draft. Other vocabularies are random targets of the pair's sizes, an engine for each.
- *engine draft* and *step*: what the same engine spent on its draft and in all.

One CSV row per measurement, in microseconds (of an engine: the median of the steps of a run). Medians, quartiles and
ratios to the base point, paired by round, go to .json and .md, and a plot to .png. A tree of fewer nodes than levels is
as deep as it has nodes; 0 nodes are plain decoding, in the engine with trees.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from jakiro_vllm.config import MAX_DEPTH, MAX_NODE_BUDGET, TreeConfig
from jakiro_vllm.decode.drafter import Roots, RoundInput, TreeDrafter
from jakiro_vllm.draft.checkpoint import read_spec
from jakiro_vllm.draft.head import DraftHead, HeadSpec
from jakiro_vllm.environment import server_environment
from jakiro_vllm.kernels.tree_attention import PagedCache

sys.path.append(str(Path(__file__).resolve().parent / "shared"))

from sides import (
    DEPTH,
    NODES,
    TOP_K,
    Spread,
    add_pair_options,
    conditions,
    markdown,
    new_figure,
    rotated,
    save_figure,
    write_report,
)
from step_clock import EngineProcess, Step

PAGE = 32
#: Rows that a request commits per round, as after a fair acceptance.
COMMITTED = 3
VERIFY_PARTS = ("target forward", "sampling", "compaction")
WARM_UP = 2


@dataclass(frozen=True)
class Point:
    """What is measured: tree nodes, depth and width, committed tokens, requests, vocabulary, experts of the head."""

    nodes: int = NODES
    depth: int = DEPTH
    top_k: int = TOP_K
    context: int = 256
    batch: int = 1
    vocabulary: int = 4096
    experts: int = 2

    @property
    def tree(self) -> TreeConfig:
        """The pinned shape."""
        return TreeConfig(self.nodes, min(self.depth, self.nodes), self.top_k)

    @property
    def rows(self) -> int:
        """Rows of a request in a verification, root included; a shallow tree has fewer candidates than its budget."""
        if not self.nodes:
            return 1
        depth, width = self.tree.depth, self.top_k
        return 1 + min(self.nodes, width + (depth - 1) * width**2)


#: Values by axis; the base point's are added. Nodes 0 is in the engine only.
AXES: dict[str, tuple[int, ...]] = {
    "nodes": (0, 1, 4, 8, 16, 32, 63),
    "depth": (2, 4, 6, 8, 12, 16),
    "context": (64, 256, 1024),
    "batch": (1, 4, 16),
    "vocabulary": (4096, 32000, 128256),
    "experts": (2, 4, 8),
}


def points(base: Point, axis: str, values: Sequence[int]) -> dict[int, Point]:
    """The points of an axis by value, the base point among them."""
    return {value: replace(base, **{axis: value}) for value in sorted({*values, getattr(base, axis)})}


class Pages:
    """Stands in for vLLM's attention layer of the head: pages of random keys and values, never written."""

    def __init__(self, spec: HeadSpec, point: Point, dtype: torch.dtype) -> None:
        each = -(-(point.context + 1) // PAGE)
        self.kv_cache = torch.randn(point.batch * each, spec.num_kv_heads, PAGE, 2 * spec.head_dim).to(dtype)
        self.tables = torch.randperm(point.batch * each).view(point.batch, each).int()
        self.impl = SimpleNamespace(
            scale=spec.head_dim**-0.5,
            window=-1,
            paged_cache=lambda layer, pages, keep: PagedCache(pages, "vec", {} if keep else None),
            write_rows=lambda layer, keys, values, slots: None,  # the same write as any layer's
        )


class Draft:
    """A draft of random numbers, ready to run."""

    def __init__(self, spec: HeadSpec, point: Point, dtype: torch.dtype) -> None:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        from jakiro_vllm.integration.head_cache import CPUHeadCache

        torch.manual_seed(0)
        spec = replace(spec, num_experts=point.experts)
        head = DraftHead(spec).requires_grad_(False).to(dtype)
        head.prepare_positions(point.context + MAX_DEPTH + 1)
        head.pack()
        layer = torch.nn.Linear(spec.hidden_size, point.vocabulary, bias=False, dtype=dtype).requires_grad_(False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
        matrix, product = layer.weight, layer.cpu_linear
        self.drafter = TreeDrafter(head, point.tree, lambda ids: matrix[ids], lambda x: product(x, matrix, None))
        pages, count = Pages(spec, point, dtype), point.batch * COMMITTED
        requests = torch.full((point.batch,), point.context)
        self.cache = CPUHeadCache(pages, pages.tables, requests, torch.zeros(count, dtype=torch.int64))
        positions = torch.arange(point.context - COMMITTED, point.context).repeat(point.batch)
        tokens = torch.randint(point.vocabulary, (count,))
        self.rows = RoundInput(torch.randn(count, spec.hidden_size).to(dtype), tokens, positions)
        self.last = torch.arange(COMMITTED - 1, count, COMMITTED)

    def run(self) -> Tensor:
        """One round's draft; the trees' tokens."""
        x = self.drafter.observe(self.rows, self.cache)
        roots = Roots(x[self.last], self.rows.next_tokens[self.last], self.rows.positions[self.last])
        return self.drafter.grow(roots, self.cache).tokens


@torch.inference_mode()
def measure_draft(
    spec: HeadSpec, base: Point, axes: dict[str, tuple[int, ...]], dtype: str, repeats: int
) -> list[dict[str, Any]]:
    """One row per axis, value and repeat."""
    rows = []
    for axis, values in axes.items():
        if axis == "experts" and not spec.num_gates:
            continue
        chosen = points(base, axis, [value for value in values if value])
        drafts = {value: Draft(spec, point, getattr(torch, dtype)) for value, point in chosen.items()}
        for number in range(-WARM_UP, repeats):
            for value in rotated(drafts, number):
                started = time.perf_counter()
                drafts[value].run()
                elapsed = time.perf_counter() - started
                if number >= 0:
                    rows.append(row_of("draft", axis, value, chosen[value], number, elapsed))
    return rows


def row_of(what: str, axis: str, value: int, point: Point, number: int, seconds: float) -> dict[str, Any]:
    """One measurement."""
    where = {"what": what, "axis": axis, "value": value, "round": number, "us": round(1e6 * seconds, 2)}
    return where | asdict(point)


def rows_of_steps(axis: str, value: int, point: Point, number: int, steps: list[Step]) -> list[dict[str, Any]]:
    """A run's medians: of the verification, of the draft, and of the whole step.

    Raises:
        ValueError: if no step verified the trees that were asked for.
    """
    full = [s for s in steps if s.decoding and s.requests == point.batch and s.rows == point.rows]
    if not full:
        raise ValueError(f"no step of {point} had {point.rows} rows of each request; raise --max-tokens")
    figures = {
        "verify": [sum(step.seconds[part] for part in VERIFY_PARTS) for step in full],
        "engine draft": [step.seconds["draft"] for step in full],
        "step": [step.total for step in full],
    }
    return [row_of(what, axis, value, point, number, statistics.median(v)) for what, v in figures.items()]


def engine_arguments(args: argparse.Namespace, axes: dict[str, tuple[int, ...]], base: Point) -> dict[str, Any]:
    """For trees of any shape on the axes."""
    most, longest = max(*axes["batch"], base.batch), max(*axes["context"], base.context)
    speculation = {"method": "jakiro", "model": args.head, "num_speculative_tokens": MAX_NODE_BUDGET}
    return {
        "model": args.target,
        "dtype": args.dtype,
        "enforce_eager": True,
        "max_num_seqs": most,
        "max_model_len": longest + args.max_tokens + MAX_NODE_BUDGET + 1,
        "max_num_batched_tokens": max(2048, most * (MAX_NODE_BUDGET + 1), longest),
        "kv_cache_memory_bytes": args.kv_cache_bytes,
        "enable_prefix_caching": False,
        "speculative_config": speculation | {"tree": {"depth": MAX_DEPTH, "top_k": TOP_K, "adaptive": False}},
    }


def measure_engine(
    args: argparse.Namespace, base: Point, axes: dict[str, tuple[int, ...]], tokens: list[int]
) -> list[dict[str, Any]]:
    """Three rows per axis, value and round; see ``rows_of_steps``.

    Args:
        args: of the command.
        base: the base point.
        axes: values by axis.
        tokens: text from which prompts are cut.
    """
    arguments, rows = engine_arguments(args, axes, base), []

    def run(engine: EngineProcess, axis: str, chosen: dict[int, Point], value: int, number: int) -> None:
        point = chosen[value]
        engine.use_tree(point.tree if point.nodes else None)
        starts = [(number * point.batch + i) * 97 % max(1, len(tokens) - point.context) for i in range(point.batch)]
        steps = engine.steps([tokens[s : s + point.context] for s in starts], args.max_tokens)
        if number >= 0:
            rows.extend(rows_of_steps(axis, value, point, number, steps))

    for axis in (name for name in axes if name != "experts"):
        chosen = points(base, axis, axes[axis])
        engines = start_engines(arguments, list(chosen) if axis == "vocabulary" else [None])
        try:
            for number in range(-1, args.rounds):
                for value in rotated(chosen, number):
                    run(engines.get(value) or engines[None], axis, chosen, value, number)
        finally:
            for engine in engines.values():
                engine.stop()
    return rows


def start_engines(arguments: dict[str, Any], vocabularies: Sequence[int | None]) -> dict[int | None, EngineProcess]:
    """The pair's own engine (None), or one with random weights per vocabulary."""
    engines: dict[int | None, EngineProcess] = {}
    for size in vocabularies:
        other = {} if size is None else {"load_format": "dummy", "hf_overrides": {"vocab_size": size}}
        engines[size] = EngineProcess(**arguments, **other)
        engines[size].wait()
    return engines


def summarise(rows: list[dict[str, Any]], base: Point) -> list[dict[str, Any]]:
    """Spreads per quantity, axis and value, and of the ratios to the base point, paired by round."""
    groups: dict[tuple[str, str, int], dict[int, float]] = {}
    for row in rows:
        groups.setdefault((row["what"], row["axis"], row["value"]), {})[row["round"]] = row["us"]
    found = []
    for (what, axis, value), times in groups.items():
        start = groups[what, axis, getattr(base, axis)]
        line: dict[str, Any] = {"axis": axis, "what": what, "value": value, "rounds": len(times)}
        line |= Spread.of(list(times.values())).columns("us")
        ratios = [time / start[number] if start[number] else 1.0 for number, time in times.items()]
        line |= Spread.of(ratios).columns("to_base")
        found.append(line)
    order = list(AXES)
    return sorted(found, key=lambda line: (order.index(line["axis"]), line["what"], line["value"]))


def table_of(summary: list[dict[str, Any]], base: Point) -> str:
    """The summary as Markdown."""
    lines = [
        [
            line["axis"],
            line["what"],
            f"{line['value']:,}" + (" (base)" if line["value"] == getattr(base, line["axis"]) else ""),
            Spread.read(line, "us").cell(0),
            Spread.read(line, "to_base").cell(),
        ]
        for line in summary
    ]
    return markdown(["axis", "what", "value", "microseconds", "to the base point"], lines)


def plot(summary: list[dict[str, Any]], path: Path) -> None:
    """Microseconds over each axis, a panel for each, quartiles shaded."""
    axes = list(dict.fromkeys(line["axis"] for line in summary))
    figure, panels = new_figure(-(-len(axes) // 3), 3, 4.5, 3.4)
    for panel in panels.flat[len(axes) :]:
        panel.set_visible(False)
    for panel, axis in zip(panels.flat, axes, strict=False):
        for what in sorted({line["what"] for line in summary if line["axis"] == axis}):
            lines = [line for line in summary if (line["axis"], line["what"]) == (axis, what)]
            values, spreads = [line["value"] for line in lines], [Spread.read(line, "us") for line in lines]
            (drawn,) = panel.plot(values, [s.median for s in spreads], marker="o", markersize=3, label=what)
            color = drawn.get_color()
            panel.fill_between(values, [s.low for s in spreads], [s.high for s in spreads], alpha=0.2, color=color)
        panel.set(xlabel=axis, ylabel="microseconds", ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    save_figure(figure, path)


def main() -> int:
    """Measures every axis and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_options(parser, "scaling.csv")
    parser.add_argument("--rounds", type=int, default=5, help="of the engine, per axis")
    parser.add_argument("--repeats", type=int, default=25, help="of a draft, per axis")
    parser.add_argument("--max-tokens", type=int, default=64, help="of a completion in the engine")
    parser.add_argument("--base-context", type=int, default=Point.context, help="committed tokens of the base point")
    for axis, values in AXES.items():
        parser.add_argument(f"--{axis}", type=int, nargs="+", default=list(values), metavar="N")
    args = parser.parse_args()
    if torch.cuda.is_available():
        parser.error("there is a GPU, where drafts are CUDA graphs: run benchmarks/kernels.py")
    from transformers import AutoConfig, AutoTokenizer

    from jakiro_vllm.training.corpus import python_sources

    axes = {axis: tuple(getattr(args, axis)) for axis in AXES}
    spec = read_spec(args.head)
    vocabulary = AutoConfig.from_pretrained(args.target).vocab_size
    base = Point(context=args.base_context, vocabulary=vocabulary, experts=spec.num_experts)
    text = "".join(document.text for document in python_sources() if document.held_out)
    tokens = AutoTokenizer.from_pretrained(args.target)(text[:200_000], add_special_tokens=False, verbose=False)
    os.environ.update(server_environment())  # for processes that are started from now on
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        rows = pool.submit(measure_draft, spec, base, axes, args.dtype, args.repeats).result()
    rows += measure_engine(args, base, axes, tokens["input_ids"])
    summary = summarise(rows, base)
    write_report(args.output, rows, conditions(args), summary, table_of(summary, base))
    plot(summary, args.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
