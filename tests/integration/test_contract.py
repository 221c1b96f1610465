"""What this package overrides or calls inside vLLM still looks as it did when it was written.

A vLLM that changed one of these would not fail with a clear message otherwise.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metrics import SpecDecodingProm
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from jakiro_vllm.integration.cpu_attention import TreeCPUAttentionMetadata
from jakiro_vllm.integration.patches import PATCHES

SIGNATURES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "inputs": (GPUModelRunner._prepare_inputs, ("self", "scheduler_output", "num_scheduled_tokens")),
    "sample": (GPUModelRunner._sample, ("self", "logits", "spec_decode_metadata")),
    "draft": (
        GPUModelRunner.propose_draft_token_ids,
        (
            "self",
            "scheduler_output",
            "sampled_token_ids",
            "sampling_metadata",
            "hidden_states",
            "sample_hidden_states",
            "aux_hidden_states",
            "spec_decode_metadata",
            "common_attn_metadata",
            "slot_mappings",
        ),
    ),
    "fits": (GPUModelRunner._input_fits_in_drafter, ("self", "common_attn_metadata")),
    "removed": (GPUModelRunner._on_request_state_removed, ("self", "req_id", "req_state")),
    "bookkeeping": (
        GPUModelRunner._bookkeeping_sync,
        ("self", "scheduler_output", "sampler_output", "logits", "hidden_states", "num_scheduled_tokens"),
    ),
    "sampler": (
        Sampler.forward,
        ("self", "logits", "sampling_metadata", "predict_bonus_token", "logprobs_mode_override"),
    ),
    "attention": (
        cpu_attn.CPUAttentionBackendImpl.forward,
        (
            "self",
            "layer",
            "query",
            "key",
            "value",
            "kv_cache",
            "attn_metadata",
            "output",
            "output_scale",
            "output_block_scale",
        ),
    ),
    "cache write": (
        cpu_attn.CPUAttentionBackendImpl.do_kv_cache_update,
        ("self", "layer", "key", "value", "kv_cache", "slot_mapping"),
    ),
    "builder": (
        cpu_attn.CPUAttentionMetadataBuilder.build,
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    "counters": (
        SpecDecodingProm.__init__,
        ("self", "speculative_config", "labelnames", "per_engine_labelvalues", "is_diffusion"),
    ),
    "observe": (SpecDecodingProm.observe, ("self", "spec_decoding_stats", "engine_idx")),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    function, parameters = SIGNATURES[name]
    assert tuple(inspect.signature(function).parameters) == parameters


def test_the_cpu_worker_takes_its_runner_from_a_module_global() -> None:
    assert cpu_worker.CPUModelRunner is CPUModelRunner
    assert "CPUModelRunner(self.vllm_config" in inspect.getsource(cpu_worker.CPUWorker.init_device)


def test_metadata_that_is_copied_field_by_field() -> None:
    mine = {f.name for f in dataclasses.fields(TreeCPUAttentionMetadata)}
    theirs = {f.name for f in dataclasses.fields(cpu_attn.CPUAttentionMetadata)}
    assert mine == theirs | {"trees"}
    assert {"block_table", "slot_mapping"} <= theirs


def test_sampling_metadata_that_is_replaced() -> None:
    fields = {f.name for f in dataclasses.fields(SamplingMetadata)}
    assert {"generators", "output_token_ids", "thinking_budget_state_holder", "max_num_logprobs"} <= fields


def test_prometheus_counters_are_a_replaceable_class() -> None:
    assert issubclass(PrometheusStatLogger._spec_decoding_cls, SpecDecodingProm)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_patches_apply_twice(patch: Any) -> None:
    patch.apply()
    first = getattr(patch.target(), patch.attribute)
    patch.apply()
    assert getattr(patch.target(), patch.attribute) is first


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_patch_refuses_another_signature(patch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "target", classmethod(lambda cls: type("Other", (), {patch.attribute: lambda a, b: a})))
    with pytest.raises(RuntimeError, match="install a supported vLLM"):
        patch.apply()
