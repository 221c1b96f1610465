"""Committing a step: rows that stay, and where they must lie.

A request's rows in a step are ``prefix`` rows of plain tokens followed by its tree, node by node (a request
without drafts has a tree of one node, its last token). Slots are handed out in row order, positions in path
order: the i-th committed row belongs into the slot of row i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jakiro_vllm.tree.walk import Accepted


@dataclass(frozen=True)
class CommittedRows:
    """The rows that survive a step, request after request, in position order.

    Attributes:
        sources: ``[T] int64`` row of the step that holds the token's features, keys and values.
        destinations: ``[T] int64`` row of the step whose slot and whose plain position are the token's own.
        requests: ``[T] int64`` index of the request.
        last: ``[B] int64`` index into the T rows of each request's last one.
        counts: ``[B] int64`` rows per request.
    """

    sources: Tensor
    destinations: Tensor
    requests: Tensor
    last: Tensor
    counts: Tensor

    def moves(self) -> tuple[Tensor, Tensor]:
        """Returns ``(sources, destinations)`` of the rows that do not lie in their own slot yet."""
        moved = self.sources != self.destinations
        return self.sources[moved], self.destinations[moved]


def committed_rows(row_starts: Tensor, prefix_lens: Tensor, accepted: Accepted) -> CommittedRows:
    """Lists the rows of a step that are part of the text from now on.

    Args:
        row_starts: ``[B] int64`` first row of each request.
        prefix_lens: ``[B] int64`` rows before its tree.
        accepted: the walk's result.
    """
    counts = prefix_lens + accepted.num_accepted + 1
    ends = counts.cumsum(0)
    requests = torch.repeat_interleave(counts)
    offsets = torch.arange(requests.shape[0], device=counts.device) - (ends - counts)[requests]
    in_tree = (offsets - prefix_lens[requests]).clamp(min=0)
    nodes = accepted.path[requests, in_tree]
    starts = row_starts[requests]
    destinations = starts + offsets
    sources = torch.where(offsets < prefix_lens[requests], destinations, starts + prefix_lens[requests] + nodes)
    return CommittedRows(sources, destinations, requests, ends - 1, counts)
