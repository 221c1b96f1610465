"""Tree attention as its definition says it, in float64: the oracle of every fast version."""

from __future__ import annotations

import torch
from torch import Tensor


def tree_attention_reference(
    query: Tensor,
    context_keys: list[Tensor],
    context_values: list[Tensor],
    tree_keys: list[Tensor],
    tree_values: list[Tensor],
    visible: list[Tensor],
    depths: list[Tensor],
    scale: float,
    softcap: float = 0.0,
    window: int = -1,
) -> Tensor:
    """Attends row by row.

    T rows in all, H query heads, G KV heads, D head size; per sequence R rows, S context tokens, N nodes.

    Args:
        query: ``[T, H, D]`` the sequences' rows, one sequence after the other.
        context_keys: per sequence ``[S, G, D]``; every row sees them (within the window).
        context_values: likewise.
        tree_keys: per sequence ``[N, G, D]``.
        tree_values: likewise.
        visible: per sequence ``[R, N] bool`` which nodes a row sees.
        depths: per sequence ``[R]``; a row's position is ``S + depth``.
        scale: of the scores.
        softcap: ``c * tanh(score / c)`` where positive.
        window: a row sees context positions above ``position - window``, where positive.

    Returns:
        ``[T, H, D] float64``.
    """
    outputs, row = [], 0
    for keys, values, nodes_k, nodes_v, mask, depth in zip(
        context_keys, context_values, tree_keys, tree_values, visible, depths, strict=True
    ):
        group = query.shape[1] // nodes_k.shape[1]
        for r in range(mask.shape[0]):
            first = max(0, keys.shape[0] + int(depth[r]) - window + 1) if window > 0 else 0
            k = torch.cat([keys[first:], nodes_k[mask[r]]]).double().repeat_interleave(group, dim=1)
            v = torch.cat([values[first:], nodes_v[mask[r]]]).double().repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,shd->hs", query[row].double(), k) * scale
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            outputs.append(torch.einsum("hs,shd->hd", scores.softmax(dim=-1), v))
            row += 1
    return torch.stack(outputs)
