"""Growing trees: beam over levels, then one global re-rank.

A level holds every candidate that the beam's nodes proposed; the beam of the next level is the best of
them; the tree is the best of all levels (EAGLE-2's dynamic tree, arXiv 2406.16858). Scores are cumulative
log-probabilities, so they only fall along a path, and a kept node's ancestors are always kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jakiro_vllm.tree.batch import TreeBatch, make_trees


@dataclass(frozen=True)
class Beam:
    """The nodes that are expanded next (the frontier).

    Attributes:
        tokens: ``[B, K] int64``.
        scores: ``[B, K] float32`` cumulative log-probability.
        ids: ``[B, K] int64`` index among all candidates of all levels, -1 for the root.
        origins: ``[B, K] int64`` which node of the previous beam each came from.
        choices: ``[B, K] int64`` which of that node's candidates it is.
    """

    tokens: Tensor
    scores: Tensor
    ids: Tensor
    origins: Tensor
    choices: Tensor


@dataclass(frozen=True)
class Level:
    """All candidates of one level, in the order of the beam nodes that proposed them.

    Attributes:
        tokens: ``[B, K * W] int64``.
        scores: ``[B, K * W] float32`` cumulative log-probability, -inf where there is no candidate.
        parent_ids: ``[B, K * W] int64`` candidate index of the parent, -1 for the root.
        first_id: candidate index of the level's first entry.
        width: W, candidates per beam node.
    """

    tokens: Tensor
    scores: Tensor
    parent_ids: Tensor
    first_id: int
    width: int

    def best(self, count: int) -> Beam:
        """The ``count`` best candidates, the best first."""
        scores, index = self.scores.topk(min(count, self.scores.shape[1]), dim=1)
        return Beam(
            tokens=self.tokens.gather(1, index),
            scores=scores,
            ids=index + self.first_id,
            origins=index // self.width,
            choices=index % self.width,
        )


def root_beam(batch_size: int, device: torch.device | str) -> Beam:
    """The frontier before the first level: the root alone. Its token is not needed."""
    zeros = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
    return Beam(zeros, zeros.float(), zeros - 1, zeros, zeros)


def expand(beam: Beam, tokens: Tensor, log_probs: Tensor, first_id: int) -> Level:
    """Hangs every beam node's candidates under it.

    Args:
        beam: the frontier, K nodes.
        tokens: ``[B, K, W] int64`` candidates of each node.
        log_probs: ``[B, K, W] float32``.
        first_id: number of candidates in earlier levels.
    """
    width = tokens.shape[2]
    return Level(
        tokens=tokens.flatten(1),
        scores=(beam.scores.unsqueeze(2) + log_probs).flatten(1),
        parent_ids=beam.ids.unsqueeze(2).expand_as(tokens).flatten(1),
        first_id=first_id,
        width=width,
    )


def rerank(levels: list[Level], root_tokens: Tensor, node_budget: int) -> TreeBatch:
    """Keeps the best ``node_budget`` candidates of all levels as a tree.

    Ties keep the earlier candidate. A parent is never worse than its child and comes earlier, so it is kept
    with it even where a probability rounds to one.

    Args:
        levels: from the root down.
        root_tokens: ``[B] int64`` the last emitted tokens.
        node_budget: draft nodes per tree.
    """
    scores = torch.cat([level.scores for level in levels], dim=1)  # [B, M]
    tokens = torch.cat([level.tokens for level in levels], dim=1)
    parent_ids = torch.cat([level.parent_ids for level in levels], dim=1)
    depths = torch.cat([torch.full_like(level.tokens, d) for d, level in enumerate(levels, start=1)], dim=1)
    batch, total = scores.shape
    budget = min(node_budget, total)

    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :budget]
    missing = scores.gather(1, order).isneginf()
    kept = order.masked_fill(missing, total).sort(dim=1).values  # [B, budget] in topological order
    num_nodes = 1 + (~missing).sum(dim=1)
    padding = kept == total
    kept = kept.clamp(max=total - 1)

    # Where a candidate ended up in the tree; one extra column receives the padding.
    positions = torch.zeros(batch, total + 1, dtype=torch.int64, device=scores.device)
    numbers = torch.arange(1, budget + 1, device=scores.device).expand(batch, budget)
    positions.scatter_(1, kept.masked_fill(padding, total), numbers)
    parent = parent_ids.gather(1, kept)
    parents = positions.gather(1, parent.clamp(min=0)).masked_fill(parent < 0, 0)

    root = root_tokens.unsqueeze(1)
    return make_trees(
        tokens=torch.cat([root, tokens.gather(1, kept).masked_fill(padding, -1)], dim=1),
        parents=torch.cat([torch.full_like(root, -1), parents.masked_fill(padding, 0)], dim=1),
        depths=torch.cat([torch.zeros_like(root), depths.gather(1, kept).masked_fill(padding, 1)], dim=1),
        num_nodes=num_nodes,
        max_depth=len(levels),
    )
