"""Every GPU kernel against what bounds it, and a whole draft against the step that verifies it.

    python benchmarks/kernels.py --output build/kernels.csv

Needs a GPU, torch and triton; the draft also needs transformers, and vLLM's own attention is a side of its own
where vLLM is installed. Takes less than eight minutes on an H200. Each side is recorded as a CUDA graph; the sides of
a comparison alternate, with the L2 cache flushed before each run. One CSV row per measurement: p20, p50 and p80 in
microseconds, achieved bandwidth beside that of a plain copy on the same device, the ratio of the medians, and the
goal. Results are checked against the references before anything is timed.

``--interpret`` runs everything once at toy sizes on a CPU in Triton's interpreter: it checks this program, and its
times mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INTERPRET = "--interpret" in sys.argv
if INTERPRET:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
# This folder would hide Hugging Face's package "kernels", which transformers looks for.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks"]

import torch
import triton
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


def load_package() -> None:
    """Makes ``jakiro_vllm`` importable from the checkout where it is not installed."""
    if importlib.util.find_spec("jakiro_vllm") is None:
        sys.path.append(str(ROOT))
    import jakiro_vllm

    if importlib.util.find_spec("jakiro_vllm.kernels") is None:
        folder = ROOT / "kernels"
        spec = importlib.util.spec_from_file_location(
            "jakiro_vllm.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["jakiro_vllm.kernels"] = jakiro_vllm.kernels = module
        spec.loader.exec_module(module)


load_package()
from jakiro_vllm.kernels import dispatch

if INTERPRET:
    dispatch.runs_triton = lambda tensor: True

from jakiro_vllm.kernels.batch_attention import BatchRows, Scratch, batch_attention
from jakiro_vllm.kernels.batch_attention.reference import batch_attention_reference
from jakiro_vllm.kernels.compaction import LayerPages, compact
from jakiro_vllm.kernels.experts import activate, combine, route
from jakiro_vllm.kernels.experts import reference as experts_reference
from jakiro_vllm.kernels.grow import Beam, Pool, expand, rerank
from jakiro_vllm.kernels.top_tokens import top_tokens
from jakiro_vllm.kernels.walk import walk_samples

DEVICE = "cpu" if INTERPRET else "cuda"
DTYPE = torch.float32 if INTERPRET else torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """What is measured; toy sizes in the interpreter."""

    batches: tuple[int, ...] = (1, 4, 8, 16, 32)
    contexts: tuple[int, ...] = (128, 1024, 4096, 16384)
    rows: int = 61
    heads: tuple[tuple[int, int, int], ...] = ((32, 8, 128), (32, 32, 128))
    page: int = 16
    hidden: int = 4096
    experts: tuple[int, ...] = (2, 8)
    expert_rows: tuple[int, ...] = (1, 10, 40, 128, 512)
    vocabulary: int = 128256
    layers: int = 32
    intermediate: int = 11008
    target_vocabulary: int = 32000
    repeats: int = 15


TOY = Sizes(
    batches=(2,),
    contexts=(40,),
    rows=9,
    heads=((4, 2, 16),),
    hidden=32,
    experts=(2,),
    expert_rows=(3,),
    vocabulary=300,
    layers=2,
    intermediate=48,
    target_vocabulary=100,
    repeats=1,
)


class Clock:
    """Times functions against each other."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.flush = None if INTERPRET else torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)

    def recorded(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """The function as a CUDA graph; its first run compiles and tunes."""
        function()
        if INTERPRET:
            return function
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def compare(self, sides: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Microseconds of every run of every side, alternating."""
        replays = {name: self.recorded(side) for name, side in sides.items()}
        samples: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(self.repeats + (0 if INTERPRET else 2)):
            for name, replay in replays.items():
                elapsed = self.once(replay)
                if INTERPRET or number >= 2:
                    samples[name].append(elapsed)
        return samples

    def once(self, replay: Callable[[], Any]) -> float:
        """Microseconds of one run."""
        if INTERPRET:
            started = time.perf_counter()
            replay()
            return (time.perf_counter() - started) * 1e6
        assert self.flush is not None
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3


@dataclass
class Report:
    """Collects the rows."""

    clock: Clock
    copy_bandwidth: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def measure(
        self,
        operation: str,
        shape: str,
        sides: dict[str, Callable[[], Any]],
        moved: int | None = None,
        goal: str = "",
        ratio_to: float | None = None,
    ) -> float:
        """Times sides, of which the first is ours, and the others are what its ratio is to.

        Args:
            operation: what is measured.
            shape: at which sizes.
            sides: by name.
            moved: bytes that ours must move at least; with it comes the share of the copy's bandwidth.
            goal: in words.
            ratio_to: microseconds of something measured before, in place of a side.

        Returns:
            Median microseconds of ours.
        """
        samples = self.clock.compare(sides)
        first = statistics.median(next(iter(samples.values())))
        for name, values in samples.items():
            median = statistics.median(values)
            cuts = statistics.quantiles(values, n=10) if len(values) > 1 else values * 9
            row = {
                "operation": operation,
                "shape": shape,
                "side": name,
                "p20_us": round(cuts[1], 2),
                "p50_us": round(median, 2),
                "p80_us": round(cuts[7], 2),
                "gb_per_s": "",
                "of_copy_bandwidth": "",
                "ours_to_this": round(first / median, 3),
                "goal": goal if name == next(iter(samples)) else "",
            }
            if moved is not None and median == first:
                row["gb_per_s"] = round(moved / median / 1e3, 1)
                if self.copy_bandwidth:
                    row["of_copy_bandwidth"] = round(moved / median / 1e3 / self.copy_bandwidth, 3)
            if ratio_to is not None:
                row["ours_to_this"] = round(first / ratio_to, 4)
            self.rows.append(row)
            print(" ".join(f"{value!s:>12}" for value in row.values()), flush=True)
        return first


def measure_copy(report: Report) -> None:
    """The bandwidth of a plain copy, read and write counted, which everything else is held against."""
    count = (1 << 12) if INTERPRET else (1 << 30)
    source = torch.zeros(count, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    median = report.measure("copy", f"{count} bytes", {"copy": lambda: target.copy_(source)}, moved=2 * count)
    report.copy_bandwidth = 2 * count / median / 1e3


@dataclass
class Attention:
    """One batch of trees over random pages."""

    query: Tensor
    keys: Tensor
    values: Tensor
    trees: BatchRows
    causal: BatchRows
    out: Tensor
    scale: float


def make_attention(sizes: Sizes, batch: int, context: int, heads: tuple[int, int, int]) -> Attention:
    """A batch whose trees are combs: node i hangs under node i // 2."""
    num_heads, kv_heads, dim = heads
    each = -(-(context + sizes.rows) // sizes.page)
    pages = torch.randn(batch * each + 1, kv_heads, sizes.page, 2 * dim, device=DEVICE).to(DTYPE)
    keys, values = pages.transpose(1, 2).split(dim, dim=-1)
    table = torch.randperm(batch * each, device=DEVICE).view(batch, each).int()
    query = torch.randn(batch * sizes.rows, num_heads, dim, device=DEVICE).to(DTYPE)
    words, depths = [1], [0]
    for node in range(1, sizes.rows):
        words.append(words[node // 2 if node > 1 else 0] | 1 << node)
        depths.append(depths[node // 2 if node > 1 else 0] + 1)
    signed = [word - (1 << 64) if word >> 63 else word for word in words]
    starts = torch.arange(batch + 1, device=DEVICE, dtype=torch.int32) * sizes.rows
    contexts = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    ancestors = torch.tensor(signed, device=DEVICE).repeat(batch)
    order = torch.arange(sizes.rows, device=DEVICE).repeat(batch)
    trees = BatchRows(table, starts, contexts, ancestors, torch.tensor(depths, device=DEVICE).repeat(batch), sizes.rows)
    causal = BatchRows(table, starts, contexts, torch.zeros_like(ancestors), order, sizes.rows)
    return Attention(query, keys, values, trees, causal, torch.empty_like(query), dim**-0.5)


def causal_sides(case: Attention) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Causal attention at the same number of rows: torch's on contiguous keys, and vLLM's where it is installed."""
    batch, context = case.causal.context_lens.shape[0], int(case.causal.context_lens[0])
    rows, (_, num_heads, dim) = case.query.shape[0] // batch, case.query.shape
    kv_heads, length = case.keys.shape[2], context + rows
    query = case.query.view(batch, rows, num_heads, dim).transpose(1, 2).contiguous()
    keys, values = (torch.randn(batch, kv_heads, length, dim, device=DEVICE).to(DTYPE) for _ in range(2))
    mask = causal_lower_right(rows, length)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    yield "torch causal, not paged", lambda: sdpa(query, keys, values, attn_mask=mask, enable_gqa=True)
    if INTERPRET or importlib.util.find_spec("vllm") is None:
        return
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    segments = 16
    shape = (case.query.shape[0], num_heads, segments)
    partial = torch.empty(*shape, triton.next_power_of_2(dim), dtype=torch.float32, device=DEVICE)
    maxima, sums = (torch.empty(shape, dtype=torch.float32, device=DEVICE) for _ in range(2))
    out, lengths = torch.empty_like(case.query), case.causal.context_lens + rows
    yield (
        "vLLM causal, Triton",
        lambda: unified_attention(
            q=case.query,
            k=case.keys,
            v=case.values,
            out=out,
            cu_seqlens_q=case.causal.row_starts,
            max_seqlen_q=rows,
            seqused_k=lengths,
            max_seqlen_k=length,
            softmax_scale=case.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=case.causal.block_tables,
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=128 // kv_heads,
            num_par_softmax_segments=segments,
            softmax_segm_output=partial,
            softmax_segm_max=maxima,
            softmax_segm_expsum=sums,
        ),
    )


def attend(case: Attention, rows: BatchRows) -> Tensor:
    """Our kernel."""
    return batch_attention(case.query, case.keys, case.values, rows, case.scale, case.out)


def measure_attention(report: Report, sizes: Sizes) -> None:
    """Trees against causal attention."""
    for heads in sizes.heads:
        check_attention(make_attention(sizes, 2, min(sizes.contexts), heads))
        for batch in sizes.batches:
            for context in sizes.contexts:
                case = make_attention(sizes, batch, context, heads)
                sides = {
                    "tree": lambda case=case: attend(case, case.trees),
                    "causal, same kernel": lambda case=case: attend(case, case.causal),
                    **dict(causal_sides(case)),
                }
                moved = 2 * batch * (context + sizes.rows) * heads[1] * heads[2] * DTYPE.itemsize
                shape = f"batch {batch}, context {context}, rows {sizes.rows}, heads {heads[0]}/{heads[1]}x{heads[2]}"
                goal = "at most 1.15 times vLLM's causal attention"
                report.measure("tree attention", shape, sides, moved + 2 * case.query.nbytes, goal)


def check_attention(case: Attention) -> None:
    """Against the reference, before anything is timed."""
    expected = torch.empty_like(case.out)
    batch_attention_reference(case.query, case.keys, case.values, case.trees, case.scale, expected)
    found = attend(case, case.trees)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def measure_experts(report: Report, sizes: Sizes) -> None:
    """The mixture of experts against the time in which its weights could be copied."""
    hidden = sizes.hidden
    norm = torch.ones(hidden, device=DEVICE, dtype=DTYPE)
    for num_experts in sizes.experts:
        gate = torch.randn(num_experts + 2, hidden, device=DEVICE).to(DTYPE) / hidden**0.5
        up = torch.randn(2 * num_experts * hidden, hidden, device=DEVICE).to(DTYPE) / hidden**0.5
        down = torch.randn(hidden, num_experts * hidden, device=DEVICE).to(DTYPE) / hidden**0.5
        for rows in sizes.expert_rows:
            x = torch.randn(rows, hidden, device=DEVICE).to(DTYPE)

            def experts(
                contrast: bool, x: Tensor = x, gate: Tensor = gate, up: Tensor = up, down: Tensor = down
            ) -> tuple[Tensor, Tensor | None]:
                count = gate.shape[0] - 2
                routing = route(x, norm, 1e-5, gate, count, True)
                inner = activate(routing.normed, up, routing, count, "swiglu")
                return combine(inner, down, routing, x, contrast)

            def dense(x: Tensor = x, up: Tensor = up, down: Tensor = down) -> Tensor:
                inner = x @ up.T
                return inner[:, : down.shape[1]] @ down.T

            routing = experts_reference.route(x, norm, 1e-5, gate, num_experts, True)
            inner = experts_reference.activate(routing.normed, up, num_experts, "swiglu")
            expected = experts_reference.combine(inner, down, routing, x, True)
            for found, wanted in zip(experts(True), expected, strict=True):
                assert found is not None and wanted is not None
                torch.testing.assert_close(found, wanted, rtol=3e-2, atol=3e-2)
            read = min(num_experts, 2 * rows)
            moved = (up.nbytes + down.nbytes) * read // num_experts
            sides = {"mixture": lambda e=experts: e(False), "torch, all experts' matrices": dense}
            goal = "at least 0.8 of the copy's bandwidth"
            report.measure("experts", f"rows {rows}, experts {num_experts}, hidden {hidden}", sides, moved, goal)
            both = {"mixture and contrast": lambda e=experts: e(True)}
            report.measure("experts", f"rows {rows}, experts {num_experts}, hidden {hidden}", both, moved, goal)


def measure_small(report: Report, sizes: Sizes) -> None:
    """Walk, compaction, beam, re-rank, and the top tokens of a vocabulary."""
    nodes, depth = sizes.rows, 6
    for batch in sizes.batches:
        tokens = torch.randint(50, (batch, nodes), device=DEVICE)
        parents = (torch.arange(nodes, device=DEVICE) // 2 - (torch.arange(nodes, device=DEVICE) == 0).long()).expand(
            batch, nodes
        )
        parents = parents.contiguous()
        counts = torch.full((batch,), nodes, device=DEVICE)
        sampled = torch.randint(50, (batch, nodes), device=DEVICE)
        report.measure(
            "walk",
            f"batch {batch}, nodes {nodes}",
            {"walk": lambda t=tokens, p=parents, c=counts, s=sampled: walk_samples(t, p, c, s, depth)},
            goal="below 20 us",
        )
        kv_heads, dim = sizes.heads[0][1:]
        pages = [
            torch.zeros(batch * 8, kv_heads, sizes.page, 2 * dim, dtype=DTYPE, device=DEVICE)
            for _ in range(sizes.layers)
        ]
        slots = torch.arange(batch * nodes, device=DEVICE)
        starts = torch.arange(batch, device=DEVICE) * nodes
        path = (torch.arange(depth + 1, device=DEVICE) ** 2).clamp(max=nodes - 1).expand(batch, depth + 1).contiguous()
        accepted = torch.full((batch,), min(depth, 2 if INTERPRET else depth), device=DEVICE)
        layers = LayerPages.of(pages)
        moved = 2 * batch * (depth - 1) * sizes.layers * kv_heads * 2 * dim * DTYPE.itemsize
        report.measure(
            "compaction",
            f"batch {batch}, layers {sizes.layers}, {depth - 1} rows each",
            {"compaction": lambda a=(layers, slots, starts, path, accepted): compact(*a)},
            moved,
            goal="below 20 us",
        )
        width = 3 if INTERPRET else 10
        pool = Pool.empty(batch, width + 5 * width * width, DEVICE)
        found = torch.randint(99, (batch, width, width), device=DEVICE)
        scores = -torch.rand(batch, width, width, device=DEVICE)
        beam = expand(pool, Beam.root(batch, DEVICE), found[:, :1], scores[:, :1], 0, width)
        for level in range(5):
            beam = expand(pool, beam, found, scores, width + level * width * width, width)
        report.measure(
            "beam",
            f"batch {batch}, {width} x {width} candidates",
            {"beam": lambda p=pool, b=beam, f=found, s=scores, w=width: expand(p, b, f, s, w, w)},
        )
        roots = tokens[:, 0].contiguous()
        report.measure(
            "re-rank",
            f"batch {batch}, {pool.scores.shape[1]} candidates, {nodes - 1} kept",
            {"re-rank": lambda p=pool, t=roots: rerank(p, t, nodes - 1, 6)},
        )
        for rows in (batch, batch * 10):
            logits = torch.randn(rows, sizes.vocabulary, device=DEVICE).to(DTYPE)
            report.measure(
                "top tokens",
                f"rows {rows}, vocabulary {sizes.vocabulary}, width 10",
                {
                    "top tokens": lambda x=logits: top_tokens(x, 10),
                    "torch": lambda x=logits: (x.float().topk(10), x.float().logsumexp(dim=-1)),
                },
                logits.nbytes,
            )


class Pages:
    """The head's pages, as the drafter wants them; see ``decode.drafter.HeadCache``."""

    def __init__(self, case: Attention) -> None:
        self.case = case

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Not measured: it is the same write as any layer's."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, used: int, ancestors: Tensor) -> Tensor:
        """Attends to pages and scratch."""
        batch, rows = query.shape[:2]
        flat = query.flatten(0, 1)
        view = BatchRows(
            self.case.trees.block_tables,
            torch.arange(0, (batch + 1) * rows, rows, dtype=torch.int32, device=DEVICE),
            self.case.trees.context_lens,
            ancestors.flatten(),
            torch.zeros(batch * rows, dtype=torch.int64, device=DEVICE),
            rows,
        )
        scratch = Scratch(keys, values, used)
        out = torch.empty_like(flat)
        batch_attention(flat, self.case.keys, self.case.values, view, self.case.scale, out, scratch=scratch)
        return out.view_as(query)


def measure_draft(report: Report, sizes: Sizes) -> None:
    """Six levels against the verification of their tree by a target of the same width.

    The target's step is its matrices, its attention over the tree and its LM head; norms, rotary embedding and
    sampling are left out, so the true step is longer and the true share smaller.
    """
    if importlib.util.find_spec("transformers") is None:
        print("draft: not measured, transformers is not installed")
        return
    from transformers import LlamaConfig

    from jakiro_vllm.config import TreeConfig
    from jakiro_vllm.decode.drafter import Roots, TreeDrafter
    from jakiro_vllm.draft.head import DraftHead, HeadSpec, Variant

    num_heads, kv_heads, dim = sizes.heads[-1]
    hidden, vocabulary = num_heads * dim, sizes.target_vocabulary
    torch.manual_seed(0)
    rope = LlamaConfig(num_attention_heads=num_heads, head_dim=dim, hidden_size=hidden, max_position_embeddings=32768)
    spec = HeadSpec(Variant.JAKIRO, hidden, num_heads, kv_heads, dim, hidden, 2, True, 1e-5, rope)
    head = DraftHead(spec).requires_grad_(False).to(DEVICE, DTYPE)
    head.prepare_positions(max(sizes.contexts) + 64)
    embedding = torch.randn(vocabulary, hidden, device=DEVICE).to(DTYPE)
    config = TreeConfig(node_budget=sizes.rows - 1, depth=3 if INTERPRET else 6, top_k=3 if INTERPRET else 10)
    drafter = TreeDrafter(head, config, lambda ids: embedding[ids], lambda x: x @ embedding.T)
    qkv = (num_heads + 2 * kv_heads) * dim
    shapes = ((qkv, hidden), (hidden, hidden), (2 * sizes.intermediate, hidden), (hidden, sizes.intermediate))
    target = [[torch.full(shape, 0.01, dtype=DTYPE, device=DEVICE) for shape in shapes] for _ in range(sizes.layers)]
    for batch in sizes.batches:
        case = make_attention(sizes, batch, sizes.contexts[1 if len(sizes.contexts) > 1 else 0], sizes.heads[-1])
        x = torch.randn(batch * sizes.rows, hidden, device=DEVICE).to(DTYPE)

        def verify(x: Tensor = x, case: Attention = case) -> Tensor:
            for to_qkv, to_out, to_gate_up, to_down in target:
                torch.mm(x, to_qkv.T)
                attended = attend(case, case.trees).view(x.shape)
                inner = torch.mm(torch.mm(attended, to_out.T), to_gate_up.T)
                torch.mm(inner[:, : sizes.intermediate].contiguous(), to_down.T)
            return torch.mm(x, embedding.T)

        roots = Roots(x[:batch], torch.zeros(batch, dtype=torch.int64, device=DEVICE), case.trees.context_lens.long())
        step = report.measure("verify step", f"batch {batch}, 7B shapes", {"target": verify})
        report.measure(
            "draft",
            f"batch {batch}, {config.depth} levels, {config.node_budget} nodes",
            {"draft": lambda roots=roots, case=case: drafter.grow(roots, Pages(case))},
            goal="at most 0.15 of the verify step",
            ratio_to=step,
        )


def describe() -> dict[str, str]:
    """Where and with what the rows were made."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "gpu": "none (interpreted)" if INTERPRET else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": found.stdout.strip(),
    }


def main() -> int:
    """Measures everything and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--interpret", action="store_true", help="toy sizes in Triton's interpreter, to check this program"
    )
    parser.add_argument("--output", type=Path, default=Path("kernels.csv"))
    args = parser.parse_args()
    if not INTERPRET and not torch.cuda.is_available():
        parser.error("no GPU answers; run this where torch.cuda.is_available(), or check it with --interpret")
    sizes = TOY if INTERPRET else Sizes()
    report = Report(Clock(sizes.repeats))
    with torch.inference_mode():
        measure_copy(report)
        for section in (measure_attention, measure_experts, measure_small, measure_draft):
            section(report, sizes)
    where = describe()
    with args.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*report.rows[0], *where])
        writer.writeheader()
        writer.writerows(row | where for row in report.rows)
    print(f"{len(report.rows)} rows in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
