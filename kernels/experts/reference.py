"""Routing and the experts in batched PyTorch: the oracle of the Triton kernels, and what a CPU runs.

T rows, C hidden size, E experts, K experts per token, I expert intermediate size.

It also takes several leading dimensions in place of T, and gradients flow through it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear import PlainProduct, Product

EXPERTS_PER_TOKEN = 2


@dataclass(frozen=True)
class Routing:
    """Which experts each row selected; K is 2, or 1 where there is only one expert.

    Attributes:
        normed: ``[T, C]`` what the experts read.
        experts: ``[T, K] int64`` the selected ones, the most probable first; of equals the lower index.
        weights: ``[T, K] float32`` softmax over the selected.
        contrast: ``[T, K] float32`` weights of the contrastive output, signed; None without one.
    """

    normed: Tensor
    experts: Tensor
    weights: Tensor
    contrast: Tensor | None


def route(
    residual: Tensor, norm_weight: Tensor, eps: float, gate: Tensor | None, num_experts: int, contrast: bool
) -> Routing:
    """Normalises the rows and selects their experts; see ``jakiro_vllm.kernels.experts.route``."""
    normed = F.rms_norm(residual, norm_weight.shape, norm_weight, eps)
    if gate is None:
        experts = torch.zeros(*residual.shape[:-1], 1, dtype=torch.int64, device=residual.device)
        return Routing(normed, experts, torch.ones_like(experts, dtype=torch.float32), None)
    logits = F.linear(normed, gate).float()
    ordered, order = logits[..., :num_experts].sort(dim=-1, descending=True, stable=True)
    experts, weights = order[..., :EXPERTS_PER_TOKEN], ordered[..., :EXPERTS_PER_TOKEN].softmax(dim=-1)
    if not contrast:
        return Routing(normed, experts, weights, None)
    c = logits[..., num_experts:].softmax(dim=-1)  # [T, 2]
    sign = torch.where(c[..., :1] > c[..., 1:], 1.0, -1.0)
    signed = torch.cat([c[..., :1], -c[..., 1:]], dim=-1) * sign
    if num_experts == EXPERTS_PER_TOKEN:  # c_j belongs to expert j, not to the j-th most probable one
        signed = signed.gather(-1, experts)
    return Routing(normed, experts, weights, signed)


def activate(normed: Tensor, up: Tensor, num_experts: int, activation: str, product: Product | None = None) -> Tensor:
    """``[T, C] -> [T, E, I]``: what each expert's last matrix reads, for all experts."""
    hidden = (product or PlainProduct(up))(normed)
    if activation == "swiglu":
        gate, hidden = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate) * hidden
    else:
        hidden = F.gelu(hidden)
    return hidden.unflatten(-1, (num_experts, -1))


def combine(
    activations: Tensor,
    down: Tensor,
    routing: Routing,
    residual: Tensor,
    contrast: bool,
    product: Product | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mixture and contrastive feature: ``([T, C], [T, C] | None)``.

    Since every expert ends in a linear map, a weighted sum of experts is one product:
    ``sum_e w_e * down_e @ a_e = [down_0 .. down_E] @ [w_0 a_0 .. w_E a_E]``.
    """
    product = product or PlainProduct(down)
    mixed = _weighted(activations, routing.experts, routing.weights)
    if not contrast:
        return product(mixed, residual), None
    assert routing.contrast is not None
    both = torch.stack([mixed, _weighted(activations, routing.experts, routing.contrast)])
    mixture, contrastive = product(both, residual.expand(2, *residual.shape))
    return mixture, contrastive


def separate(activations: Tensor, down: Tensor, routing: Routing, residual: Tensor) -> Tensor:
    """``[T, K, C]``: the selected experts' own features."""
    by_expert = down.unflatten(1, activations.shape[-2:]).unbind(1)
    # one product each: a batched one is many times slower in bfloat16
    each = [F.linear(own, matrix) for own, matrix in zip(activations.unbind(-2), by_expert, strict=True)]
    own = torch.stack(each, dim=-2)  # [T, E, C]
    index = routing.experts.unsqueeze(-1).expand(*routing.experts.shape, own.shape[-1])
    return residual.unsqueeze(-2) + own.gather(-2, index)


def _weighted(activations: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """``[T, E, I], [T, K], [T, K] -> [T, E * I]``, zero where an expert was not selected."""
    num_experts, selected = activations.shape[-2], experts.shape[-1]
    if selected == 1:  # its weight is 1
        return activations.flatten(-2)
    dense = weights.new_zeros(activations.shape[:-1]).scatter(-1, experts, weights)
    weighted = activations * dense.to(activations.dtype).unsqueeze(-1)
    if num_experts > selected:  # what was not selected may hold anything, and 0 * NaN would not be 0
        chosen = torch.zeros_like(dense, dtype=torch.bool).scatter(-1, experts, True)
        weighted = weighted.where(chosen.unsqueeze(-1), 0.0)
    return weighted.flatten(-2)
