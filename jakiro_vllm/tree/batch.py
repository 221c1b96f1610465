"""A batch of token trees as flat arrays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TreeBatch:
    """One token tree per sequence. Node 0 is the root: the last emitted token, whose KV is not computed yet.

    Nodes are in topological order (a parent precedes its children), so every prefix of a tree is a tree. Those of a
    draft are in the order of their scores, so it is also the best tree of its size.

    Attributes:
        tokens: ``[B, N] int64``.
        parents: ``[B, N] int64`` node index, -1 for the root.
        depths: ``[B, N] int64`` edges from the root.
        ancestors: ``[B, N] int64`` bit j of a word is set when node j is the node itself or an ancestor.
        num_nodes: ``[B] int64`` valid nodes, at least 1; later columns hold padding.
        scores: ``[B, N] float32`` the draft's log-probability of the path to each node; None where nobody asks.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    num_nodes: Tensor
    scores: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Number of trees."""
        return self.tokens.shape[0]

    @property
    def width(self) -> int:
        """Columns, padding included."""
        return self.tokens.shape[1]

    def first(self, batch: int) -> TreeBatch:
        """The first ``batch`` trees, as views."""
        tokens, parents, depths = self.tokens[:batch], self.parents[:batch], self.depths[:batch]
        scores = None if self.scores is None else self.scores[:batch]
        return TreeBatch(tokens, parents, depths, self.ancestors[:batch], self.num_nodes[:batch], scores)

    def select(self, rows: Tensor) -> TreeBatch:
        """Returns the trees at ``rows [B'] int64``."""
        return TreeBatch(
            self.tokens[rows], self.parents[rows], self.depths[rows], self.ancestors[rows], self.num_nodes[rows]
        )


def chains(tokens: Tensor, num_nodes: Tensor) -> TreeBatch:
    """Trees without branches: node i is the child of node i - 1.

    Args:
        tokens: ``[B, N] int64`` root first.
        num_nodes: ``[B] int64``.
    """
    order = torch.arange(tokens.shape[1], device=tokens.device)
    bits = torch.ones_like(order) << order
    words = bits.cumsum(0)
    return TreeBatch(
        tokens,
        (order - 1).expand_as(tokens),
        order.expand_as(tokens),
        words.expand_as(tokens),
        num_nodes,
    )


def row_topology(trees: TreeBatch, branches: Tensor, requests: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Ancestor word and depth of every row of a step, of which some are tree nodes and some plain tokens.

    Args:
        trees: of all requests.
        branches: ``[B] bool`` whose rows are nodes of a tree; those of the others follow one another, as a chain does.
        requests: ``[T] int64`` the request of each row.
        offsets: ``[T] int64`` its index among the request's rows, which for a tree is the node.

    Returns:
        ``(ancestors [T] int64, depths [T] int64)``: words of tree rows, 0 for others; positions after the
        request's context.
    """
    in_tree = branches[requests]
    nodes = offsets.clamp(max=trees.width - 1)
    ancestors = trees.ancestors[requests, nodes].where(in_tree, 0)
    return ancestors, trees.depths[requests, nodes].where(in_tree, offsets)
