"""Random heads in the published layout, from nothing but its table of names and shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VARIANTS = ("jakiro", "jakiro_star", "dense")
LAYER = "layers.0."


def published_head(
    variant: str,
    *,
    num_experts: int = 2,
    hidden_size: int = 16,
    num_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    intermediate_size: int | None = None,
    bias: bool = True,
    gain: float = 1.0,
    seed: int = 0,
    **config: Any,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Draws a head.

    Args:
        variant: one of ``VARIANTS``.
        num_experts: ignored for ``dense``.
        hidden_size: C.
        num_heads: query heads.
        kv_heads: KV heads.
        head_dim: C / heads by default.
        intermediate_size: of one expert; C by default for ``jakiro``, 2 C otherwise.
        bias: whether ``fc`` has one.
        gain: scale of all matrices; larger ones make sharper distributions.
        seed: of the weights.
        config: further entries of config.json.

    Returns:
        ``(config, tensors)``.
    """
    generator = torch.Generator().manual_seed(seed)
    dim = head_dim or hidden_size // num_heads
    inner = intermediate_size or (hidden_size if variant == "jakiro" else 2 * hidden_size)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * gain / columns**0.5

    tensors = {
        "fc.weight": matrix(hidden_size, 2 * hidden_size),
        LAYER + "self_attn.q_proj.weight": 2 * matrix(num_heads * dim, hidden_size),
        LAYER + "self_attn.k_proj.weight": 2 * matrix(kv_heads * dim, hidden_size),
        LAYER + "self_attn.v_proj.weight": matrix(kv_heads * dim, hidden_size),
        LAYER + "self_attn.o_proj.weight": matrix(hidden_size, num_heads * dim),
        LAYER + "post_attention_layernorm.weight": 1 + 0.2 * torch.randn(hidden_size, generator=generator),
    }
    if bias:
        tensors["fc.bias"] = 0.3 * torch.randn(hidden_size, generator=generator)
    if variant == "dense":
        tensors |= {f"{LAYER}mlp.{name}_proj.weight": matrix(inner, hidden_size) for name in ("gate", "up")}
        tensors[LAYER + "mlp.down_proj.weight"] = matrix(hidden_size, inner)
    else:
        gates = num_experts + 2 if variant == "jakiro" else num_experts
        tensors[LAYER + "mlp_moe.gate.weight"] = 1.5 * matrix(gates, hidden_size)
        for i in range(num_experts):
            expert = f"{LAYER}mlp_moe.experts.{i}."
            if variant == "jakiro":
                tensors |= {f"{expert}{name}_proj.weight": 2 * matrix(inner, hidden_size) for name in ("gate", "up")}
                tensors[expert + "down_proj.weight"] = matrix(hidden_size, inner)
            else:
                tensors[expert + "fc.weight"] = 2 * matrix(inner, hidden_size)
                tensors[expert + "proj.weight"] = matrix(hidden_size, inner)
    written = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        # The target's own, as published: no statement about the experts.
        "intermediate_size": 11 * hidden_size // 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "bias": bias,
    }
    if variant != "dense":
        written |= {"num_local_experts": num_experts, "num_experts_per_tok": 2}
    return written | config, tensors


def write_head(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], file_format: str) -> Path:
    """Writes ``model.safetensors`` (``safetensors``) or ``pytorch_model.bin`` (``bin``), and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if file_format == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        assert file_format == "bin"
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder
