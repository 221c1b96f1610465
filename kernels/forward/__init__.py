"""A draft head's forward on a few rows: all that comes before its attention in one call, and all that comes after.

    x = fc [embed ; feature];   q, k, v = rotary(W_qkv x)
    h = x + W_o attended;       outputs = h + MoE(RMSNorm(h))

A draft is a handful of forwards of one row per beam node, one after the other. With a small head most of their time
goes into calling operators, and with a large one into reading its weights, which a library does as well. So this is for
few rows and small heads; ``experts``, ``linear``, and ``rotary``, from which it takes the parts, are the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch import compiled
from .native import FewRows

__all__ = ["MAX_BYTES", "MAX_ROWS", "FewRows", "HeadWeights", "pack"]

#: Rows up to which one call is faster; beyond, oneDNN's products are, soonest where the processor multiplies bfloat16.
MAX_ROWS = {torch.float32: 64, torch.bfloat16: 8, torch.float16: 64}
#: Weights, in bytes, of which one more copy is kept.
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class HeadWeights:
    """What a forward computes with, all of one dtype.

    C hidden size, H query heads, G KV heads, D head size, E experts of SwiGLU, I expert intermediate size.

    Attributes:
        fuse: ``[C, 2 C]``.
        fuse_bias: ``[C]`` or None.
        qkv: ``[(H + 2 G) D, C]``.
        output: ``[C, H D]``.
        norm: ``[C]``.
        eps: of the RMSNorm.
        gate: ``[E or E + 2, C]``, with those that weigh a contrastive output last; None for one expert.
        up: ``[2 E I, C]``: gate projections, then up projections.
        down: ``[C, E I]``.
        num_heads: H.
        num_experts: E.
    """

    fuse: Tensor
    fuse_bias: Tensor | None
    qkv: Tensor
    output: Tensor
    norm: Tensor
    eps: float
    gate: Tensor | None
    up: Tensor
    down: Tensor
    num_heads: int
    num_experts: int

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """What is packed."""
        return self.fuse, self.qkv, self.output, self.up, self.down


def pack(weights: HeadWeights) -> FewRows | None:
    """Packs copies of a head's weights.

    Returns:
        None where there are no compiled kernels for them, or where they are too large for this to pay.
    """
    with torch.no_grad():
        library = compiled(*weights.matrices)
    if library is None or sum(x.numel() * x.element_size() for x in weights.matrices) > MAX_BYTES:
        return None
    return FewRows(library, weights)
