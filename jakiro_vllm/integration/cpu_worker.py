"""The CPU worker: vLLM's, with a runner that knows trees."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_worker import CPUWorker

from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.integration.contract import check_installed
from jakiro_vllm.integration.cpu_attention import TreeCPUAttentionBackend
from jakiro_vllm.integration.cpu_runner import JakiroCPUModelRunner
from jakiro_vllm.integration.version import check_vllm_version
from jakiro_vllm.kernels import native


class JakiroCPUWorker(CPUWorker):
    """Builds the runner and puts the tree backend in the place of ``CPU_ATTN`` in this process only."""

    def init_device(self) -> None:
        """As vLLM's; the runner class is a module global there, so it is swapped for the call.

        Raises:
            JakiroConfigError: if vLLM chose its runner V2, or another version is installed.
        """
        check_vllm_version()
        check_installed("cpu")
        if self.use_v2_model_runner:
            raise JakiroConfigError("method 'jakiro' needs vLLM's model runner V1; unset VLLM_USE_V2_MODEL_RUNNER")
        backend = f"{TreeCPUAttentionBackend.__module__}.{TreeCPUAttentionBackend.__qualname__}"
        register_backend(AttentionBackendEnum.CPU_ATTN, backend)
        # An engine that ran in this process before has left its backend there.
        selector._cached_get_attn_backend.cache_clear()
        original = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = JakiroCPUModelRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = original
        native.prepare()

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM's; then steps are timed."""
        taken = super().compile_or_warm_up_model()
        runner: Any = self.model_runner
        runner.time_steps()
        return taken
