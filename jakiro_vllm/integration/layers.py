"""Whether every attention layer of a target is one whose trees this package verifies correctly.

Checked once, when the layers and their pages exist: what a configuration does not show (sinks, shared pages,
chunked local attention) shows here, and nothing may be silently wrong.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType

from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.integration.cpu_attention import PAGE_LAYOUTS, TreeCPUAttentionBackend, TreeCPUAttentionImpl


def check_layers(vllm_config: VllmConfig, depth: int) -> None:
    """Refuses layers that tree attention does not cover.

    Args:
        vllm_config: of the engine, after its KV cache was set up.
        depth: levels of the trees.

    Raises:
        JakiroConfigError: naming the layer and the feature.
    """
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    dtype = vllm_config.model_config.dtype
    for name, layer in layers.items():
        reason = _refusal(layer, dtype, depth)
        if reason is not None:
            raise JakiroConfigError(
                f"method 'jakiro' cannot be used: layer {name!r} of target {vllm_config.model_config.model!r} "
                f"{reason}; serve it without speculation"
            )


def _refusal(layer: Any, dtype: Any, depth: int) -> str | None:
    if getattr(layer, "attn_backend", None) is not TreeCPUAttentionBackend:
        return "uses an attention backend of its own, which knows no trees"
    impl = layer.impl
    if type(impl) is not TreeCPUAttentionImpl:
        return "uses an attention implementation of its own, which knows no trees"
    window = impl.sliding_window
    checks = (
        (impl.attn_type != AttentionType.DECODER, f"is {impl.attn_type} attention"),
        (impl.sinks is not None, "has attention sinks, which tree attention has not yet"),
        (impl.alibi_slopes is not None, "has ALiBi slopes, which tree attention has not yet"),
        (impl.kv_sharing_target_layer_name is not None, "shares another layer's KV pages"),
        (0 < window <= depth, f"has a sliding window of {window}, which must exceed the trees' depth {depth}"),
        (layer.isa not in PAGE_LAYOUTS, f"keeps its KV in layout {layer.isa!r}; known: {', '.join(PAGE_LAYOUTS)}"),
        (layer.kv_cache.dtype != dtype, f"keeps its KV as {layer.kv_cache.dtype}, the model computes in {dtype}"),
    )
    return next((reason for refused, reason in checks if refused), None)
