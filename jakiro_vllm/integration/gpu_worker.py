"""The CUDA worker: vLLM's, with a runner and an attention backend that know trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_worker import Worker

from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.integration.contract import check_installed
from jakiro_vllm.integration.gpu_attention import TreeTritonAttentionBackend
from jakiro_vllm.integration.gpu_runner import JakiroGPUModelRunner
from jakiro_vllm.integration.version import check_vllm_version


def select_tree_backend(vllm_config: VllmConfig) -> None:
    """Makes every attention layer of this worker's engine use the tree backend.

    Raises:
        JakiroConfigError: if another backend was asked for.
    """
    config = vllm_config.attention_config
    # vLLM itself asks for its Triton backend for some models, and this one extends it.
    if config.backend not in (None, AttentionBackendEnum.CUSTOM, AttentionBackendEnum.TRITON_ATTN):
        raise JakiroConfigError(
            f"method 'jakiro' brings its own attention backend, got --attention-backend {config.backend.name}; "
            "leave it out"
        )
    backend = f"{TreeTritonAttentionBackend.__module__}.{TreeTritonAttentionBackend.__qualname__}"
    register_backend(AttentionBackendEnum.CUSTOM, backend)
    # An engine that ran in this process before may have left another backend in this slot.
    selector._cached_get_attn_backend.cache_clear()
    config.backend = AttentionBackendEnum.CUSTOM


class JakiroGPUWorker(Worker):
    """Builds the runner and selects the tree backend, in this process only."""

    #: The head's tensors in host memory during a sleep of level 2.
    _head_at_rest: Sequence[torch.Tensor] = ()

    def init_device(self) -> None:
        """As vLLM's.

        Raises:
            JakiroConfigError: if vLLM chose its runner V2, or is not one that this package was written for.
        """
        check_vllm_version()
        check_installed("cuda")
        if self.use_v2_model_runner:
            raise JakiroConfigError("method 'jakiro' needs vLLM's model runner V1; unset VLLM_USE_V2_MODEL_RUNNER")
        select_tree_backend(self.vllm_config)
        super().init_device()

    def sleep(self, level: int = 1) -> None:
        """As vLLM's; level 2 drops all weights, and a reload of the target's would not bring back the head's."""
        if level == 2:
            self._head_at_rest = [
                tensor.detach().to("cpu", copy=True) for tensor in self.model_runner.drafter.tensors()
            ]
        super().sleep(level)

    @torch.inference_mode()
    def wake_up(self, tags: list[str] | None = None) -> None:
        """As vLLM's; then the head is restored in place, where graphs look for it."""
        super().wake_up(tags)
        if self._head_at_rest and (tags is None or "weights" in tags):
            for tensor, kept in zip(self.model_runner.drafter.tensors(), self._head_at_rest, strict=True):
                tensor.copy_(kept)
            self._head_at_rest = ()

    def _make_model_runner(self) -> Any:
        return JakiroGPUModelRunner(self.vllm_config, self.device)
