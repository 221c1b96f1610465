"""Runs engines as ``engine_session`` does, with the CUDA runner path on CPU tensors: ``... REQUEST RESPONSE``.

Triton interprets every kernel of this package and of vLLM's Triton backend. A stand-in for Triton's driver makes vLLM
believe that Triton works; it is never asked to run anything. CUDA graphs are replaced by running the same function
again into the same memory.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Inductor would ask the stand-in for a device
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # plain engines too: where Triton works, vLLM would choose it

sys.path.append(str(Path(__file__).parent))  # for engine_session, with PYTHONSAFEPATH too

import triton.backends

triton.backends.backends["cpu"] = SimpleNamespace(
    driver=SimpleNamespace(is_active=lambda: True), compiler=SimpleNamespace()
)

from jakiro_vllm.kernels import dispatch

dispatch.runs_triton = lambda tensor: True

import engine_session
import torch
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from jakiro_vllm.integration import front_end
from jakiro_vllm.integration.gpu_attention import TreeTritonAttentionBackend
from jakiro_vllm.integration.gpu_runner import GPUTreesMixin
from jakiro_vllm.tree.batch import TreeBatch

# vLLM's own top-k kernel does not run in the interpreter; its PyTorch form serves both sides.
topk_topp_sampler.HAS_TRITON = False
# Asked by vLLM's own cache-write kernel for its tile size.
torch.cuda.get_device_capability = lambda *args: (9, 0)


def record(function: Callable[[], TreeBatch]) -> tuple[Callable[[], None], TreeBatch]:
    """Stands in for a CUDA graph: a replay writes the result into the memory of the recorded one."""
    recorded = function()

    def replay() -> None:
        for mine, new in zip(vars(recorded).values(), vars(function()).values(), strict=True):
            mine.copy_(new)

    return replay, recorded


class InterpretedRunner(GPUTreesMixin, CPUModelRunner):
    """The GPU runner's mixin over the CPU runner, which is the GPU runner on CPU tensors."""


class InterpretedWorker(cpu_worker.CPUWorker):
    """As the CUDA worker, in the CPU platform's places."""

    def init_device(self) -> None:
        backend = f"{TreeTritonAttentionBackend.__module__}.{TreeTritonAttentionBackend.__qualname__}"
        register_backend(AttentionBackendEnum.CPU_ATTN, backend)
        register_backend(AttentionBackendEnum.CUSTOM, backend)
        selector._cached_get_attn_backend.cache_clear()
        original = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = InterpretedRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = original

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()
        self.model_runner._profile_verification()
        self.model_runner._draft_without_pages(2)
        self.model_runner._warm_attention([(1, 3, 3), (2, 2, 3)])
        self.model_runner._warm_verification()
        self.model_runner._record_drafts(record)
        return result


def choose_kernels(phase: dict[str, Any]) -> None:
    """Interprets the draft's kernels in phases that ask for it; they take most of the time."""
    chosen = bool(phase.get("draft_kernels"))
    for name in ("experts", "grow", "top_tokens"):
        module = importlib.import_module(f"jakiro_vllm.kernels.{name}")
        module.runs_triton = lambda tensor: chosen


def main() -> None:
    """Runs the engines; those without trees are plain vLLM with the sampler that CUDA machines use."""
    sys.modules.setdefault("interpreted_session", sys.modules["__main__"])
    worker = f"interpreted_session.{InterpretedWorker.__qualname__}"
    front_end.KV_CACHE_DTYPES[worker] = front_end.KV_CACHE_DTYPES[front_end.WORKERS["cuda"]]
    front_end.WORKERS["cpu"] = worker
    engine_session.NATIVE_SAMPLER = True
    engine_session.BEFORE_PHASE = choose_kernels
    choose_kernels({})
    engine_session.main()


if __name__ == "__main__":
    main()
