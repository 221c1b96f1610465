"""Small targets with random weights, of real architectures in their published layout, and heads that fit them.

Weights are scaled so that texts vary: with transformers' own initialisation a random target repeats one token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from published_heads import published_head, write_head
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 512


@dataclass(frozen=True)
class Family:
    """An architecture and what its size is here.

    Attributes:
        model_type: transformers' name.
        heads: query heads.
        kv_heads: KV heads.
        head_dim: of each.
        hidden: C.
        layers: of the target.
        tied: whether the embedding is the LM head.
        config: further entries of config.json.
    """

    model_type: str
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 96
    layers: int = 3
    tied: bool = False
    config: dict[str, Any] = field(default_factory=dict)


#: Shorter than the texts, longer than the trees are deep.
WINDOW = 40
#: So low that they bend what attention and the LM head say.
GEMMA2_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 6.0}

FAMILIES = {
    "llama GQA": Family("llama"),
    "llama MHA, tied, heads of 80": Family("llama", heads=2, kv_heads=2, head_dim=80, tied=True),
    "qwen2": Family("qwen2", hidden=128, tied=True),  # vLLM takes its head size from the quotient
    "qwen3": Family("qwen3", kv_heads=1),
    "mistral, sliding": Family("mistral", config={"sliding_window": WINDOW}),
    "gemma2": Family(
        "gemma2",
        layers=4,
        tied=True,
        config={"sliding_window": WINDOW, "query_pre_attn_scalar": 24, **GEMMA2_CAPS},
    ),
    "gemma3 text": Family(
        "gemma3_text",
        layers=4,
        tied=True,
        config={
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
}


def write_target(folder: Path, family: Family, seed: int = 0) -> Path:
    """Writes a target as transformers would publish it."""
    config = AutoConfig.for_model(
        family.model_type,
        vocab_size=VOCAB,
        hidden_size=family.hidden,
        intermediate_size=2 * family.hidden,
        num_hidden_layers=family.layers,
        num_attention_heads=family.heads,
        num_key_value_heads=family.kv_heads,
        head_dim=family.head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=family.tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **family.config,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.copy_(scaled(name, noise, family))
    model.save_pretrained(folder)
    return folder


def scaled(name: str, noise: torch.Tensor, family: Family) -> torch.Tensor:
    """Weights from standard noise."""
    gemma = family.model_type.startswith("gemma")
    if "norm" in name:
        # Gemma's weights are added to one. Its outputs must outweigh the embedding, which it scales up.
        outward = gemma and ("post_attention" in name or "post_feedforward" in name)
        return (40.0 if outward else 0.0 if gemma else 1.0) + 0.2 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    if "embed_tokens" in name or "lm_head" in name:
        return noise * 3 / family.hidden**0.5
    gain = 3.0 if "o_proj" in name or "down_proj" in name else 1.5
    return noise * gain / noise.shape[-1] ** 0.5


def write_fitting_head(folder: Path, family: Family, seed: int = 1) -> Path:
    """Writes a random head with the KV shape of its target."""
    config, tensors = published_head(
        "jakiro",
        hidden_size=family.hidden,
        num_heads=family.heads,
        kv_heads=family.kv_heads,
        head_dim=family.head_dim,
        vocab_size=VOCAB,
        seed=seed,
    )
    return write_head(folder, config, tensors, "safetensors")


#: What an adapter may change, by the suffix of a module's name.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERYTHING = (*ATTENTION, "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")


def write_adapter(
    folder: Path, family: Family, modules: Sequence[str], *, rank: int = 4, gain: float = 0.5, seed: int = 2
) -> Path:
    """Writes a LoRA adapter as peft would, large enough to change most tokens.

    Args:
        folder: of the adapter.
        family: of its target.
        modules: suffixes of the modules' names.
        rank: of the adapter.
        gain: size of the change, of the size of the weights.
        seed: of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = family.hidden, 2 * family.hidden
    query, kv = family.heads * family.head_dim, family.kv_heads * family.head_dim
    shapes = {  # (rows, columns) of the adapted matrix
        "q_proj": (query, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "lm_head": (VOCAB, hidden),
    }
    parents = {name: "self_attn" if name in ATTENTION else "mlp" for name in shapes}
    tensors = {}
    for name in modules:
        if name == "embed_tokens":
            key = "base_model.model.model.embed_tokens.lora_embedding_"
            tensors[key + "A"] = torch.randn(rank, VOCAB, generator=generator) * gain
            tensors[key + "B"] = torch.randn(hidden, rank, generator=generator) * (3 / hidden**0.5)
            continue
        rows, columns = shapes[name]
        places = (
            ["lm_head"]
            if name == "lm_head"
            else [f"model.layers.{i}.{parents[name]}.{name}" for i in range(family.layers)]
        )
        for place in places:
            key = f"base_model.model.{place}.lora_"
            tensors[key + "A.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
            tensors[key + "B.weight"] = torch.randn(rows, rank, generator=generator) * gain
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(modules),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


#: Layouts of quantised checkpoints: what llm-compressor writes, and AutoAWQ, and GPTQModel.
QUANTISATIONS = ("w8a8", "w4a16", "awq", "gptq")
GROUP = 32


def quantise_target(folder: Path, kind: str) -> Path:
    """Rewrites a target of ``write_target`` in a quantised layout; embedding, LM head and norms stay as they are.

    Args:
        folder: of the target.
        kind: one of ``QUANTISATIONS``.
    """
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors |= quantised(name.removesuffix("weight"), tensor, kind)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    weights = {"num_bits": 8 if kind == "w8a8" else 4, "type": "int", "symmetric": True, "dynamic": False}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights, "output_activations": None}
    if kind == "w8a8":
        weights |= {"strategy": "channel", "group_size": None}
        group["input_activations"] = {**weights, "strategy": "token", "dynamic": True}
    else:
        weights |= {"strategy": "group", "group_size": GROUP}
        group["input_activations"] = None
    compressed = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if kind == "w8a8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
    entry = {
        "w8a8": compressed,
        "w4a16": compressed,
        "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    }[kind]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    return folder


def quantised(prefix: str, weight: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of one linear layer, from its ``[rows, columns]`` weight."""
    if kind == "w8a8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return {prefix + "weight": (weight / scale).round().to(torch.int8), prefix + "weight_scale": scale}
    rows, columns = weight.shape
    grouped = weight.view(rows, columns // GROUP, GROUP)
    scale = grouped.abs().amax(2, keepdim=True) / 7
    values = ((grouped / scale).round() + 8).view(rows, columns).to(torch.int32)  # [1, 15], 8 is zero
    scale = scale.squeeze(2)  # [rows, groups]
    if kind == "w4a16":
        return {
            prefix + "weight_packed": packed(values, 1),
            prefix + "weight_scale": scale,
            prefix + "weight_shape": torch.tensor([rows, columns]),
        }
    scales = scale.t().contiguous()
    if kind == "awq":
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        by_column = values.t().reshape(columns, rows // 8, 8)[:, :, order].reshape(columns, rows)
        return {
            prefix + "qweight": packed(by_column, 1),
            prefix + "qzeros": packed(torch.full((columns // GROUP, rows), 8), 1),
            prefix + "scales": scales.half(),
        }
    assert kind == "gptq"
    return {
        prefix + "qweight": packed(values.t(), 0),
        # GPTQ stores zero points less one.
        prefix + "qzeros": packed(torch.full((columns // GROUP, rows), 7), 1),
        prefix + "scales": scales.half(),
        prefix + "g_idx": torch.arange(columns, dtype=torch.int32) // GROUP,
    }


def packed(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Eight values of four bits in an int32, the first one lowest, along an axis."""
    values = values.to(torch.int64).unflatten(axis, (-1, 8))
    shifts = 4 * torch.arange(8).view(8, *[1] * (values.ndim - axis - 2))
    words = (values << shifts).sum(axis + 1)
    return words.where(words < 1 << 31, words - (1 << 32)).to(torch.int32)
