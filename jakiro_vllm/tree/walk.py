"""Verification: following the target's own samples down the tree.

The candidates are a fixed set, so the rule is exact and simple: sample the target at a node; if a child
holds that token go there, otherwise the token is the step's last. Whatever the tree, the emitted tokens are
the target's samples, so their distribution is the target's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jakiro_vllm.kernels.walk import walk_greedy, walk_samples
from jakiro_vllm.tree.batch import TreeBatch

#: ``sample(step, nodes [B] int64, active [B] bool) -> tokens [B] int64``: the target's token after ``nodes``,
#: the ``step``-th token of this round. Entries that are not active are ignored and must not consume randomness.
Sample = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Accepted:
    """The accepted path of each tree.

    Attributes:
        path: ``[B, S] int64`` node indices from the root, column 0 is 0; entries past the path are 0.
        tokens: ``[B, S] int64`` emitted tokens: the path's draft tokens, then the bonus token, then -1.
        num_accepted: ``[B] int64`` draft tokens kept; ``num_accepted + 1`` tokens are emitted.
    """

    path: Tensor
    tokens: Tensor
    num_accepted: Tensor


def walk(trees: TreeBatch, sample: Sample, max_depth: int) -> Accepted:
    """Accepts the path that the target's samples follow.

    Args:
        trees: the trees that were verified.
        sample: draws the target's token; called once per level, at most ``max_depth + 1`` times.
        max_depth: upper bound of the depths.
    """
    batch, width, device = trees.batch_size, trees.width, trees.tokens.device
    valid = torch.arange(width, device=device) < trees.num_nodes.unsqueeze(1)
    node = torch.zeros(batch, dtype=torch.int64, device=device)
    active = torch.ones(batch, dtype=torch.bool, device=device)
    path, tokens = [node], []
    for step in range(max_depth + 1):
        sampled = sample(step, node, active)
        tokens.append(sampled.where(active, -1))
        children = valid & (trees.parents == node.unsqueeze(1)) & (trees.tokens == sampled.unsqueeze(1))
        active = active & children.any(dim=1)
        if not active.any():
            break
        node = children.to(torch.int8).argmax(dim=1).where(active, node)
        path.append(node.where(active, 0))
    emitted = torch.stack(tokens, dim=1)
    return Accepted(
        path=torch.stack(path[: len(tokens)], dim=1),
        tokens=emitted,
        num_accepted=(emitted >= 0).sum(dim=1) - 1,
    )


def walk_sampled(trees: TreeBatch, sampled: Tensor, max_depth: int) -> Accepted:
    """Accepts the path that the target's samples follow, where every node has been sampled already.

    Args:
        trees: the trees that were verified.
        sampled: ``[B, N] int64`` the target's token after each node.
        max_depth: upper bound of the depths.
    """
    path, tokens, num_accepted = walk_samples(trees.tokens, trees.parents, trees.num_nodes, sampled, max_depth)
    return Accepted(path, tokens, num_accepted)


def walk_highest(trees: TreeBatch, logits: Tensor, starts: Tensor, max_depth: int) -> Accepted:
    """Accepts the path that the target's most probable tokens follow.

    Args:
        trees: the trees that were verified.
        logits: ``[L, V]`` after each node; those of a tree lie together.
        starts: ``[B] int64`` the rows of the roots.
        max_depth: upper bound of the depths.

    Returns:
        The path, in as many columns as the longest one has.
    """
    found = walk_greedy(trees.tokens, trees.parents, trees.num_nodes, logits, starts, max_depth)
    path, tokens, num_accepted = found
    steps = int(num_accepted.max()) + 1 if num_accepted.numel() else 1
    return Accepted(path[:, :steps], tokens[:, :steps], num_accepted)
