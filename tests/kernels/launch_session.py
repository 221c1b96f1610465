"""Launches every kernel through Triton's launch path for an H100, without one: ``launch_session.py RESPONSE WARM``.

A stand-in for Triton's CUDA driver compiles for sm_90 and counts launches instead of making them. The tensors are host
tensors; nothing is computed. The answer is, per kernel, how many launches there were and how many times it was
compiled: sizes that change from step to step must not compile anything anew, for that would stop a server.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

LAUNCHES: Counter[str] = Counter()
COMPILED: Counter[str] = Counter()
GRIDS: dict[str, list[int]] = {}


class Utils:
    """What Triton asks a device."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        COMPILED[name] += 1
        return 0, 0, 32, 0, 1024


class Launcher:
    """Counts instead of launching."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, x: int, y: int, z: int, *arguments: Any) -> None:
        LAUNCHES[self.name] += 1
        largest = GRIDS.setdefault(self.name, [0, 0, 0])
        GRIDS[self.name] = [max(a, b) for a, b in zip(largest, (x, y, z), strict=True)]


class Driver(DriverBase):
    """A GPU that is not there."""

    def __init__(self) -> None:
        self.utils = Utils()
        self.launcher_cls = Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self) -> tuple[int, int]:
        return 9, 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def benchmark(function: Callable[[], Any], **settings: Any) -> list[float]:
            function()
            return [1.0, 1.0, 1.0]

        return benchmark

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(0)

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass


driver.set_active(Driver())

from jakiro_vllm.kernels import dispatch

dispatch.runs_triton = lambda tensor: True

from jakiro_vllm.kernels.batch_attention import BatchRows, Scratch, batch_attention
from jakiro_vllm.kernels.compaction import LayerPages, compact
from jakiro_vllm.kernels.experts import activate, combine, route, separate
from jakiro_vllm.kernels.grow import Beam, Pool, expand, rerank
from jakiro_vllm.kernels.top_tokens import top_tokens
from jakiro_vllm.kernels.walk import walk_samples

BF16 = torch.bfloat16
HEADS, KV_HEADS, DIM, HIDDEN, TOP_K, DEPTH, NODES = 8, 2, 64, 256, 4, 6, 17


def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@triton.jit
def control_kernel(out, SIZE: tl.constexpr):
    """What must not be: a kernel whose batch size is a constant."""
    tl.store(out, SIZE)


def attend(batch: int, rows: int, total: int | None = None, context_pages: int = 64) -> None:
    """Attention of a step with prompt chunks; by default one chunk beside requests that decode."""
    pages = zeros(5, KV_HEADS, 16, 2 * DIM, dtype=BF16)
    keys, values = pages.transpose(1, 2).split(DIM, dim=-1)
    tables, starts = zeros(batch, context_pages, dtype=torch.int32), zeros(batch + 1, dtype=torch.int32)
    total = rows + batch - 1 if total is None else total
    seen = BatchRows(tables, starts, zeros(batch, dtype=torch.int32), zeros(total), zeros(total), rows)
    query = zeros(total, HEADS, DIM, dtype=BF16)
    batch_attention(query, keys, values, seen, 0.1, torch.empty_like(query))


def warm_verification() -> None:
    """What the runner itself does before it serves."""
    from jakiro_vllm.config import TreeConfig
    from jakiro_vllm.integration.gpu_runner import GPUTreesMixin

    pages = [zeros(5, KV_HEADS, 16, 2 * DIM, dtype=BF16) for _ in range(2)]
    head = SimpleNamespace(
        spec=SimpleNamespace(hidden_size=HIDDEN),
        fc=torch.nn.Linear(1, 1, dtype=BF16),
        keys_values=lambda x, positions: (x, x),
    )
    runner: Any = GPUTreesMixin()  # type: ignore[abstract]
    runner.device, runner._pages = torch.device("cpu"), [("", LayerPages.of(pages))]
    runner.drafter = SimpleNamespace(
        tree_config=TreeConfig(depth=DEPTH, top_k=TOP_K, node_budget=NODES - 1),
        drafter=SimpleNamespace(head=head),
        attention=SimpleNamespace(impl=SimpleNamespace(write_rows=lambda *given: None)),
    )
    runner._warm_verification()


def verify(batch: int, rows: int, levels: int) -> None:
    """The walk and compaction of a step."""
    trees = [zeros(batch, NODES) for _ in range(3)]
    path, _, accepted = walk_samples(trees[0], trees[1], zeros(2, batch)[1], trees[2], levels)
    pages = zeros(5, KV_HEADS, 16, 2 * DIM, dtype=BF16)
    compact(LayerPages.of([pages, pages.clone()]), zeros(4096)[: batch * rows], zeros(2, batch)[0], path, accepted)


def step(batch: int, rows: int, context_pages: int) -> None:
    """The launches of one step but for its verification: all that changes from step to step is in its arguments."""
    control_kernel[(1,)](zeros(1), SIZE=batch)
    pages = zeros(5, KV_HEADS, 16, 2 * DIM, dtype=BF16)
    keys, values = pages.transpose(1, 2).split(DIM, dim=-1)
    tables = zeros(64, context_pages, dtype=torch.int32)[:batch]
    starts, contexts = zeros(batch + 1, dtype=torch.int32), zeros(batch, dtype=torch.int32)
    buffers = zeros(2, 4096)
    total = batch * rows
    seen = BatchRows(tables, starts, contexts, buffers[0, :total], buffers[1, :total], rows)
    query = zeros(total, HEADS, DIM, dtype=BF16)
    batch_attention(query, keys, values, seen, 0.1, torch.empty_like(query))

    pool, beam = Pool.empty(batch, TOP_K + (DEPTH - 1) * TOP_K**2, "cpu"), Beam.root(batch, "cpu")
    weights = [torch.zeros(shape, dtype=BF16) for shape in ((4, HIDDEN), (4 * HIDDEN, HIDDEN), (HIDDEN, 2 * HIDDEN))]
    first_id = 0
    for level in range(DEPTH - 1):
        width = beam.tokens.shape[1]
        nodes, used = batch * width, level * TOP_K
        flat = zeros(nodes, HEADS, DIM, dtype=BF16)
        row_starts = torch.arange(0, nodes + 1, width, dtype=torch.int32)
        seen = BatchRows(tables, row_starts, contexts, beam.words.flatten(), zeros(nodes), width)
        own = [zeros(batch, (DEPTH - 2) * TOP_K, KV_HEADS, DIM, dtype=BF16) for _ in range(2)]
        batch_attention(flat, keys, values, seen, 0.1, torch.empty_like(flat), scratch=Scratch(*own, used))
        x = zeros(nodes, HIDDEN, dtype=BF16)
        routing = route(x, zeros(HIDDEN, dtype=BF16), 1e-5, weights[0], 2, True)
        inner = activate(routing.normed, weights[1], routing, 2, "swiglu")
        combine(inner, weights[2], routing, x, level == DEPTH - 2)
        separate(inner, weights[2], routing, x)
        tokens, log_probs = (t.unflatten(0, (batch, width)) for t in top_tokens(zeros(nodes, 32000, dtype=BF16), TOP_K))
        found = expand(pool, beam, tokens, log_probs, first_id, TOP_K, first_slot=used)
        first_id += width * TOP_K
        if level == DEPTH - 2:
            expand(pool, found, tokens, log_probs, first_id, 0, rows=zeros(batch, TOP_K))
        # The values of a launch that was not made are rubbish, and the next level's shapes do not depend on them.
        beam = Beam(*(torch.zeros_like(t) for t in vars(found).values()))
    rerank(pool, zeros(batch), NODES - 1, DEPTH)


def main() -> None:
    """Warms up with the batch sizes and attention shapes in WARM, then takes steps of other sizes."""
    batches, shapes = json.loads(sys.argv[2])
    for batch in batches:
        step(batch, NODES, 64)
    for shape in shapes:
        attend(*shape)
    warm_verification()
    warm = dict(COMPILED)
    for batch in (3, 5, 7, 11, 16, 13, 2):
        step(batch, NODES, 64)
        for levels in (0, DEPTH):
            verify(batch, NODES, levels)
    for batch in (1, 2, 5, 9, 17, 40, 64):
        for rows in (1, 3, 5, 9, 12, 19, 31, 48, 80, 101, 200, 255, 515, 777, 1024, 2047):
            attend(batch, rows)
            if batch * rows <= 2048:
                attend(batch, rows, batch * rows)
    answer = {"launches": LAUNCHES, "compiled": COMPILED, "warm": warm, "grids": GRIDS}
    Path(sys.argv[1]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
