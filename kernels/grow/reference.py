"""Beam and re-rank in batched PyTorch: the oracle of the kernels, and what runs on a CPU.

B sequences, K beam nodes, W candidates per node, M candidates of all levels, N nodes of a tree.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand_reference(
    parents: tuple[Tensor, Tensor, Tensor],
    tokens: Tensor,
    log_probs: Tensor,
    pool: tuple[Tensor, Tensor, Tensor],
    first_id: int,
    count: int,
    first_slot: int,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hangs candidates under a beam; see ``expand``.

    Args:
        parents: the beam's ``(scores [B, K] float32, ids [B, K] int64, words [B, K] int64)``.
        tokens: ``[B, P, W] int64``.
        log_probs: ``[B, P, W] float32``.
        pool: ``(scores [B, M] float32, tokens [B, M] int64, parent_ids [B, M] int64)``, written.
        first_id: of the level.
        count: of the next beam.
        first_slot: of the next beam.
        rows: ``[B, K] int64`` or None.

    Returns:
        The next beam's ``(tokens, scores, ids, origins, choices, words)``, each ``[B, count]``.
    """
    parent_scores, parent_ids, parent_words = parents
    width = tokens.shape[2]
    if rows is not None:
        index = rows.unsqueeze(2).expand(*rows.shape, width)
        tokens, log_probs = tokens.gather(1, index), log_probs.gather(1, index)
    tokens = tokens.flatten(1)
    scores = (parent_scores.unsqueeze(2) + log_probs).flatten(1)
    level = slice(first_id, first_id + scores.shape[1])
    pool[0][:, level] = scores
    pool[1][:, level] = tokens
    pool[2][:, level] = parent_ids.repeat_interleave(width, dim=1)

    scores, index = (x[:, :count] for x in scores.sort(dim=1, descending=True, stable=True))
    origins = index // width
    slots = torch.arange(first_slot, first_slot + count, device=index.device)
    words = parent_words.gather(1, origins) | torch.ones_like(slots) << slots
    return tokens.gather(1, index), scores, index + first_id, origins, index % width, words


def rerank_reference(
    scores: Tensor, tokens: Tensor, parent_ids: Tensor, root_tokens: Tensor, node_budget: int, max_depth: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Keeps the best candidates as trees; see ``rerank``."""
    batch, total = scores.shape
    budget = min(node_budget, total)
    # [B, budget]; a parent comes before its children, being no worse and earlier
    node_scores, kept = (x[:, :budget] for x in scores.sort(dim=1, descending=True, stable=True))
    padding = node_scores.isneginf()
    num_nodes = 1 + (~padding).sum(dim=1)

    # Where a candidate ended up in the tree; one extra column receives the padding.
    positions = torch.zeros(batch, total + 1, dtype=torch.int64, device=scores.device)
    numbers = torch.arange(1, budget + 1, device=scores.device).expand(batch, budget)
    positions.scatter_(1, kept.masked_fill(padding, total), numbers)
    parent = parent_ids.gather(1, kept)
    above = positions.gather(1, parent.clamp(min=0)).masked_fill(padding | (parent < 0), 0)

    root = root_tokens.unsqueeze(1)
    nodes = torch.cat([root, tokens.gather(1, kept).masked_fill(padding, -1)], dim=1)
    jumps = torch.cat([torch.zeros_like(root), above], dim=1)  # the root's leads to itself
    parents = torch.cat([torch.full_like(root, -1), above], dim=1)
    node_scores = torch.cat([torch.zeros_like(root, dtype=scores.dtype), node_scores], dim=1)
    return nodes, parents, *_paths(jumps, max_depth), num_nodes, node_scores


def _paths(jumps: Tensor, max_depth: int) -> tuple[Tensor, Tensor]:
    """Depths and ancestor words of ``jumps [B, N] int64``, parents of which the root is its own.

    Each step doubles the part of the paths that is known.
    """
    index = torch.arange(jumps.shape[1], device=jumps.device)
    words = (torch.ones_like(index) << index).expand_as(jumps)
    depths = (index > 0).long().expand_as(jumps)
    for _ in range(max_depth.bit_length()):
        words = words | words.gather(1, jumps)
        depths = depths + depths.gather(1, jumps)
        jumps = jumps.gather(1, jumps)
    return depths, words
