"""The draft head as its formulas say it, one token at a time, in float64, from the published tensors.

C hidden size, H query heads, G KV heads, D head size, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from published_heads import LAYER
from torch import Tensor


@dataclass
class ReferenceOutput:
    """What one token's forward yields.

    Attributes:
        mixture: ``[C]`` the next feature.
        contrast: ``[C]`` the contrastive feature, for ``jakiro`` only.
        experts: the selected experts' own features ``[C]`` and log gate weights, the most probable first.
    """

    mixture: Tensor
    contrast: Tensor | None
    experts: list[tuple[Tensor, float]]


class ReferenceHead:
    """``x = fc([emb ; f])``, ``h = x + Attn(x)``, ``out = h + MoE(RMSNorm(h))``."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = {name: tensor.double() for name, tensor in tensors.items()}
        self.num_heads, self.num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config["head_dim"]
        self.num_experts = config.get("num_local_experts", 1)
        if LAYER + "mlp.gate_proj.weight" in tensors:
            self.variant = "dense"
        elif LAYER + "mlp_moe.experts.0.fc.weight" in tensors:
            self.variant = "jakiro_star"
        else:
            self.variant = "jakiro"

    def fuse(self, embedding: Tensor, feature: Tensor) -> Tensor:
        """``[C], [C] -> [C]``."""
        x = self.weights["fc.weight"] @ torch.cat([embedding.double(), feature.double()])
        return x + self.weights["fc.bias"] if "fc.bias" in self.weights else x

    def rotate(self, heads: Tensor, position: int) -> Tensor:
        """Rotary embedding of ``[heads, D]``: pairs ``(i, i + D/2)`` turn by ``position * theta^(-2i/D)``."""
        rotated, half = heads.clone(), self.head_dim // 2
        for i in range(half):
            angle = position * self.config["rope_theta"] ** (-2 * i / self.head_dim)
            cos, sin = math.cos(angle), math.sin(angle)
            rotated[:, i] = heads[:, i] * cos - heads[:, i + half] * sin
            rotated[:, i + half] = heads[:, i + half] * cos + heads[:, i] * sin
        return rotated

    def key_value(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """``[C] -> ([G, D], [G, D])``."""
        shape = (self.num_kv_heads, self.head_dim)
        key = (self.weights[LAYER + "self_attn.k_proj.weight"] @ x).reshape(shape)
        value = (self.weights[LAYER + "self_attn.v_proj.weight"] @ x).reshape(shape)
        return self.rotate(key, position), value

    def output(self, x: Tensor, position: int, keys: list[Tensor], values: list[Tensor]) -> ReferenceOutput:
        """One token's forward; ``keys`` and ``values`` are all that it sees, its own included."""
        query = (self.weights[LAYER + "self_attn.q_proj.weight"] @ x).reshape(self.num_heads, self.head_dim)
        query = self.rotate(query, position)
        k, v = torch.stack(keys), torch.stack(values)  # [S, G, D]
        attended = []
        for head in range(self.num_heads):
            kv_head = head // (self.num_heads // self.num_kv_heads)
            scores = k[:, kv_head] @ query[head] / math.sqrt(self.head_dim)
            attended.append(scores.softmax(dim=0) @ v[:, kv_head])
        h = x + self.weights[LAYER + "self_attn.o_proj.weight"] @ torch.cat(attended)
        scale = torch.rsqrt((h * h).mean() + self.config["rms_norm_eps"])
        return self._mixture(h, h * scale * self.weights[LAYER + "post_attention_layernorm.weight"])

    def _swiglu(self, prefix: str, normed: Tensor) -> Tensor:
        gate, up = (self.weights[f"{prefix}{name}_proj.weight"] @ normed for name in ("gate", "up"))
        return self.weights[prefix + "down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)

    def _expert(self, index: int, normed: Tensor) -> Tensor:
        prefix = f"{LAYER}mlp_moe.experts.{index}."
        if self.variant == "jakiro":
            return self._swiglu(prefix, normed)
        inner = self.weights[prefix + "fc.weight"] @ normed
        gelu = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        return self.weights[prefix + "proj.weight"] @ gelu

    def _mixture(self, h: Tensor, normed: Tensor) -> ReferenceOutput:
        if self.variant == "dense":
            feature = h + self._swiglu(LAYER + "mlp.", normed)
            return ReferenceOutput(feature, None, [(feature, 0.0)])
        gate = (self.weights[LAYER + "mlp_moe.gate.weight"] @ normed).tolist()
        routing = gate[: self.num_experts]
        chosen = sorted(range(self.num_experts), key=lambda i: -routing[i])[:2]  # top-2 routing
        total = sum(math.exp(routing[i]) for i in chosen)
        outputs = {i: self._expert(i, normed) for i in chosen}
        mixture = h.clone()
        for i in chosen:
            mixture += math.exp(routing[i]) / total * outputs[i]
        experts = [(h + outputs[i], math.log(math.exp(routing[i]) / total)) for i in chosen]
        if self.variant == "jakiro_star":
            return ReferenceOutput(mixture, None, experts)
        # The contrastive gates belong to the experts in order when there are two, else to the selected ones.
        owners = [0, 1] if self.num_experts == 2 else chosen
        first, second = gate[self.num_experts :]
        c = [math.exp(first), math.exp(second)]
        c = [value / sum(c) for value in c]
        larger, smaller = (0, 1) if c[0] > c[1] else (1, 0)
        contrast = h + c[larger] * outputs[owners[larger]] - c[smaller] * outputs[owners[smaller]]
        return ReferenceOutput(mixture, contrast, experts)
