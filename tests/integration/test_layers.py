"""Layers that trees do not cover are refused at start-up, on each platform, and ordinary ones are not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.integration import gpu_worker, layers
from jakiro_vllm.integration.cpu_attention import TreeCPUAttentionBackend
from jakiro_vllm.integration.gpu_attention import TreeTritonAttentionBackend

BACKENDS = {"cpu": TreeCPUAttentionBackend, "cuda": TreeTritonAttentionBackend}
DEPTH = 6

LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    "sinks": ({"sinks": torch.zeros(4)}, "attention sinks"),
    "ALiBi": ({"alibi_slopes": torch.zeros(4)}, "ALiBi"),
    "shared pages": ({"kv_sharing_target_layer_name": "other"}, "shares another layer's KV"),
    "narrow window": ({"window": 6}, "sliding window of 6, which must exceed the trees' depth 6"),
    "encoder": ({"attn_type": "encoder"}, "encoder attention"),
}


def layer(platform: str, window: int | None = None, **changes: Any) -> SimpleNamespace:
    """An attention layer that passes, but for ``changes`` of its implementation."""
    impl = object.__new__(BACKENDS[platform].get_impl_cls())
    # vLLM's Triton backend keeps how far a row looks back and ahead, its CPU backend the window.
    looks_back = (-1, -1) if window is None else (window - 1, 0)
    settings = {
        "attn_type": "decoder",
        "sinks": None,
        "alibi_slopes": None,
        "kv_sharing_target_layer_name": None,
        "sliding_window": looks_back if platform == "cuda" else window or -1,
        "kv_cache_dtype": "auto",
        "chunk_lookback": -1,
    }
    vars(impl).update(settings | changes)
    return SimpleNamespace(attn_backend=BACKENDS[platform], impl=impl, isa="vec", kv_cache=torch.zeros(1))


def refusal(layer: SimpleNamespace, platform: str, dtype: torch.dtype = torch.float32) -> str | None:
    return layers._refusal(layer, dtype, DEPTH, BACKENDS[platform])


@pytest.mark.parametrize("platform", BACKENDS)
def test_ordinary_layers_pass(platform: str) -> None:
    assert refusal(layer(platform), platform) is None
    assert refusal(layer(platform, window=DEPTH + 1), platform) is None


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("platform", BACKENDS)
def test_layers_that_trees_do_not_cover(platform: str, name: str) -> None:
    changes, message = LAYERS[name]
    assert message in str(refusal(layer(platform, **changes), platform))


@pytest.mark.parametrize("platform", BACKENDS)
def test_another_backend_is_refused(platform: str) -> None:
    other = layer(platform)
    other.attn_backend = type("Chunked", (BACKENDS[platform],), {})
    assert "backend of its own" in str(refusal(other, platform))
    assert "backend of its own" in str(refusal(layer("cpu"), "cuda"))


@pytest.mark.parametrize("platform", BACKENDS)
def test_pages_of_another_dtype_are_refused(platform: str) -> None:
    assert "keeps its KV as torch.float32" in str(refusal(layer(platform), platform, torch.bfloat16))


def test_pages_that_a_platform_alone_has() -> None:
    neon = layer("cpu")
    neon.isa = "neon"
    assert "layout 'neon'" in str(refusal(neon, "cpu"))
    assert "chunked local attention" in str(refusal(layer("cuda", chunk_lookback=1), "cuda"))
    # fp8 pages are read, whatever the model computes in.
    assert refusal(layer("cuda", kv_cache_dtype="fp8"), "cuda", torch.bfloat16) is None


@pytest.mark.parametrize("asked", [None, AttentionBackendEnum.CUSTOM, AttentionBackendEnum.TRITON_ATTN])
def test_the_tree_backend_is_selected(asked: Any) -> None:
    config = SimpleNamespace(attention_config=SimpleNamespace(backend=asked))
    gpu_worker.select_tree_backend(config)  # type: ignore[arg-type]
    assert config.attention_config.backend is AttentionBackendEnum.CUSTOM
    assert AttentionBackendEnum.CUSTOM.get_class() is TreeTritonAttentionBackend


def test_another_backend_cannot_be_asked_for() -> None:
    config = SimpleNamespace(attention_config=SimpleNamespace(backend=AttentionBackendEnum.FLASH_ATTN))
    with pytest.raises(JakiroConfigError, match="got --attention-backend FLASH_ATTN; leave it out"):
        gpu_worker.select_tree_backend(config)  # type: ignore[arg-type]
