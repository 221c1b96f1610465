"""The verification walk in batched PyTorch: all sequences go one level down at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def walk_samples_reference(
    tokens: Tensor, parents: Tensor, num_nodes: Tensor, sampled: Tensor, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``walk_samples`` for the arguments and the result."""
    batch, width = tokens.shape
    valid = (torch.arange(width, device=tokens.device) < num_nodes.unsqueeze(1)) & (tokens >= 0)  # [B, N]
    node = torch.zeros_like(num_nodes)
    active = torch.ones(batch, dtype=torch.bool, device=tokens.device)
    path, emitted, walked = [], [], []
    for _ in range(max_depth + 1):
        token = sampled.gather(1, node.unsqueeze(1))  # [B, 1]
        path.append(node.where(active, 0))
        emitted.append(token.squeeze(1).where(active, -1))
        walked.append(active)
        children = valid & (parents == node.unsqueeze(1)) & (tokens == token)  # [B, N]
        active = active & children.any(dim=1)
        node = children.to(torch.int8).argmax(dim=1)
    num_accepted = torch.stack(walked, dim=1).sum(dim=1) - 1
    return torch.stack(path, dim=1), torch.stack(emitted, dim=1), num_accepted


def walk_greedy_reference(
    tokens: Tensor, parents: Tensor, num_nodes: Tensor, logits: Tensor, starts: Tensor, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``walk_greedy`` for the arguments and the result: here every row is looked at."""
    nodes = torch.arange(tokens.shape[1], device=tokens.device)
    # Past a tree's own rows the walk never looks.
    own = nodes.minimum(num_nodes.clamp(min=1).unsqueeze(1) - 1)
    rows = starts.unsqueeze(1) + own
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= logits.shape[0]):
        raise IndexError(f"starts must leave room for each tree among {logits.shape[0]} rows of logits")
    return walk_samples_reference(tokens, parents, num_nodes, logits.argmax(dim=1)[rows], max_depth)
