"""Committing a step: rows that stay, and where they must lie.

A request's rows in a step are ``prefix`` rows of plain tokens followed by its tree, node by node (a request
without drafts has a tree of one node, its last token). Slots are handed out in row order, positions in path
order: the i-th committed row belongs into the slot of row i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jakiro_vllm.transfer import upload
from jakiro_vllm.tree.walk import Accepted


@dataclass(frozen=True)
class CommittedRows:
    """The rows that survive a step, request after request, in position order.

    Which request a row belongs to follows from the counts, which the host knows; only ``sources`` depends on
    the path, and stays on its device.

    Attributes:
        requests: ``[T] int64`` on the host: index of the request.
        offsets: ``[T] int64`` on the host: position of the row after the request's committed tokens.
        last: ``[B] int64`` on the host: index into the T rows of each request's last one.
        sources: ``[T] int64`` row of the step that holds the token's features, keys and values.
        destinations: ``[T] int64`` row of the step whose slot is the token's own.
    """

    requests: Tensor
    offsets: Tensor
    last: Tensor
    sources: Tensor
    destinations: Tensor


def committed_rows(row_starts: Tensor, prefix_lens: Tensor, num_accepted: Tensor, path: Tensor) -> CommittedRows:
    """Lists the rows of a step that are part of the text from now on.

    Args:
        row_starts: ``[B] int64`` on the host: first row of each request.
        prefix_lens: ``[B] int64`` on the host: rows before its tree.
        num_accepted: ``[B] int64`` on the host: draft tokens kept.
        path: ``[B, S] int64`` accepted nodes from the root, on any device.
    """
    counts = prefix_lens + num_accepted + 1
    ends = counts.cumsum(0)
    requests = torch.repeat_interleave(counts)
    offsets = torch.arange(requests.shape[0]) - (ends - counts)[requests]
    in_tree = offsets - prefix_lens[requests]
    starts = row_starts[requests]
    # One transfer: where a row lies is its start, plus its offset before the tree or its node inside it.
    packed = torch.stack(
        [requests, in_tree.clamp(min=0), starts + offsets.minimum(prefix_lens[requests]), starts + offsets]
    )
    request, step, base, destinations = upload(packed, path.device)
    sources = base + path[request, step]
    return CommittedRows(requests, offsets, ends - 1, sources, destinations)


def moved_rows(row_starts: Tensor, accepted: Accepted) -> tuple[Tensor, Tensor]:
    """Returns ``(sources [M], destinations [M]) int64``: accepted rows that do not lie in their own slot yet.

    Args:
        row_starts: ``[B] int64`` first row of each tree.
        accepted: the walk's result.
    """
    order = torch.arange(accepted.path.shape[1], device=row_starts.device)
    moved = (order <= accepted.num_accepted.unsqueeze(1)) & (accepted.path != order)
    request, step = moved.nonzero(as_tuple=True)
    return row_starts[request] + accepted.path[request, step], row_starts[request] + step
