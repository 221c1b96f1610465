"""Whether every attention layer of a target is one whose trees this package verifies correctly.

Checked once, when the layers and their pages exist: what a configuration does not show (sinks, shared pages,
chunked local attention) shows here, and nothing may be silently wrong.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionType

from jakiro_vllm.errors import JakiroConfigError


def check_layers(vllm_config: VllmConfig, depth: int, backend: type[AttentionBackend]) -> None:
    """Refuses layers that tree attention does not cover.

    Args:
        vllm_config: of the engine, after its KV cache was set up.
        depth: levels of the trees.
        backend: the platform's tree backend.

    Raises:
        JakiroConfigError: naming the layer and the feature.
    """
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    dtype = vllm_config.model_config.dtype
    for name, layer in layers.items():
        reason = _refusal(layer, dtype, depth, backend)
        if reason is not None:
            raise JakiroConfigError(
                f"method 'jakiro' cannot be used: layer {name!r} of target {vllm_config.model_config.model!r} "
                f"{reason}; serve it without speculation"
            )


def _refusal(layer: Any, dtype: Any, depth: int, backend: type[AttentionBackend]) -> str | None:
    if getattr(layer, "attn_backend", None) is not backend:
        return "uses an attention backend of its own, which knows no trees"
    impl = layer.impl
    if type(impl) is not backend.get_impl_cls():
        return "uses an attention implementation of its own, which knows no trees"
    checks = (
        (impl.attn_type != AttentionType.DECODER, f"is {impl.attn_type} attention"),
        (impl.sinks is not None, "has attention sinks, which tree attention has not yet"),
        (impl.alibi_slopes is not None, "has ALiBi slopes, which tree attention has not yet"),
        (impl.kv_sharing_target_layer_name is not None, "shares another layer's KV pages"),
        (
            0 < impl.window <= depth,
            f"has a sliding window of {impl.window}, which must exceed the trees' depth {depth}",
        ),
    )
    general = next((reason for refused, reason in checks if refused), None)
    return general or impl.page_refusal(layer, dtype)
