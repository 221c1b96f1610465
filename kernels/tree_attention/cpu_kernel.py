"""Tree attention in batched PyTorch, for machines without a C++ compiler; reads vLLM's pages chunk by chunk.

J sequences, R rows (padded), H query heads, G KV heads, D head size, C pages per chunk, B slots per page,
N nodes (padded), and M = R * H / G query rows per KV head.

Softmax is computed online: the tree's nodes come first, then the context in chunks, so memory does not grow
with the context. There is no loop over sequences, rows or nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from . import TreeJobs

#: Slots, over all sequences, that are unpacked at a time.
CHUNK_SLOTS = 8192


class RunningSoftmax:
    """Attention over several sets of keys: maximum, sum and weighted values so far."""

    def __init__(self) -> None:
        """Starts empty."""
        self.maximum: Tensor | None = None
        self.total: Tensor
        self.values: Tensor

    def add(self, scores: Tensor, weigh: Callable[[Tensor], Tensor]) -> None:
        """Adds a set of S keys.

        Args:
            scores: ``[J, G, M, S] float32``, -inf for what a row does not see; overwritten.
            weigh: ``[J, G, M, S] -> [J, G, M, D]``, the values' weighted sum.
        """
        maximum = scores.amax(dim=3, keepdim=True)
        if self.maximum is not None:
            maximum = torch.maximum(self.maximum, maximum)
        # A row that has seen nothing yet: a finite pivot in place of -inf leaves its weights at exp(-inf) = 0.
        pivot = maximum.clamp(min=torch.finfo(torch.float32).min)
        weights = scores.sub_(pivot).exp_()
        total, values = weights.sum(dim=3, keepdim=True), weigh(weights)
        if self.maximum is not None:
            kept = self.maximum.sub_(pivot).exp_()
            total, values = total.add_(self.total.mul_(kept)), values.add_(self.values.mul_(kept))
        self.maximum, self.total, self.values = maximum, total, values

    def result(self) -> Tensor:
        """``[J, G, M, D]``."""
        return self.values.div_(self.total)


def unpack_pages(pages: Tensor, layout: str, dim: int) -> tuple[Tensor, Tensor]:
    """Unpacks raw pages.

    Args:
        pages: ``[..., 2, B * D]``, the keys' half before the values'.
        layout: ``vec`` stores keys ``[D, B]`` and values ``[B, D]``; ``amx`` keys ``[B/16, D/2, 16, 2]`` and
            values ``[D/16, B/2, 16, 2]``.
        dim: D.

    Returns:
        ``(keys [..., D, B] float32, values [..., B, D] float32)``.
    """
    keys, values = pages.float().unbind(dim=-2)
    block = keys.shape[-1] // dim
    if layout == "vec":
        return keys.unflatten(-1, (dim, block)), values.unflatten(-1, (block, dim))
    tiles = keys.unflatten(-1, (block // 16, dim // 2, 16, 2))  # [..., slot // 16, d // 2, slot % 16, d % 2]
    keys = tiles.permute(*range(tiles.ndim - 4), -3, -1, -4, -2).flatten(-4, -3).flatten(-2)
    tiles = values.unflatten(-1, (dim // 16, block // 2, 16, 2))  # [..., d // 16, slot // 2, d % 16, slot % 2]
    values = tiles.permute(*range(tiles.ndim - 4), -3, -1, -4, -2).flatten(-4, -3).flatten(-2)
    return keys, values


class Plan:
    """What all layers of a step share: indices and masks, each computed once."""

    def __init__(
        self,
        block_tables: Tensor,
        context_lens: Tensor,
        rows: tuple[Tensor, Tensor],
        nodes: Tensor,
        ancestors: Tensor,
        depths: Tensor,
    ) -> None:
        """Lays out a step.

        Args:
            block_tables: ``[J, *] int32``.
            context_lens: ``[J] int64``.
            rows: ``([J, R] int64, [J, R] bool)`` rows of each sequence, and which entries are no padding.
            nodes: ``[J, N] int64`` rows of each tree's keys.
            ancestors: ``[T] int64``.
            depths: ``[T] int64``.
        """
        self.block_tables = block_tables
        self.context_lens = context_lens
        self.row_index, is_row = rows
        self.is_row = None if bool(is_row.all()) else is_row
        self.num_nodes = nodes.shape[1]
        self.nodes = _as_slice(nodes)
        self.rows = _as_slice(self.row_index) if self.is_row is None else self.row_index
        self.longest = int(context_lens.max())
        self.positions = context_lens.unsqueeze(1) + depths[self.row_index]  # [J, R]
        bits = (ancestors[self.row_index].unsqueeze(2) >> torch.arange(nodes.shape[1])) & 1
        self.unseen = bits == 0  # [J, R, N]
        # Nodes that no row names may hold anything: their weight is 0, but 0 * NaN would not be.
        nameless = self.unseen.all(dim=1)
        self.nameless = nameless[:, :, None, None] if bool(nameless.any()) else None
        self._masks: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def masks(self, first: int, count: int, block: int, group: int, window: int) -> tuple[Tensor, Tensor]:
        """Masks of ``count`` pages from page ``first``, the tree's nodes before them where ``first`` is 0.

        Returns:
            ``([J, 1, M, S], [J, C, 1, B, 1])``: keys that a row does not see, and slots beyond the context,
            which hold nobody's KV.
        """
        key = (first, count, block, group, window)
        if key not in self._masks:
            jobs, rows = self.row_index.shape
            slots = torch.arange(first * block, (first + count) * block)
            beyond = slots >= self.context_lens.unsqueeze(1)  # [J, C * B]
            hidden = beyond.unsqueeze(1).expand(jobs, rows, -1)
            if window > 0:
                hidden = hidden | (slots <= (self.positions - window).unsqueeze(2))
            if first == 0:
                hidden = torch.cat([self.unseen, hidden], dim=2)
            hidden = hidden.repeat_interleave(group, dim=1).unsqueeze(1)
            self._masks[key] = hidden, beyond.view(jobs, count, 1, block, 1)
        return self._masks[key]


def step_plan(jobs: TreeJobs, ancestors: Tensor, depths: Tensor) -> Plan:
    """The layout of a step."""
    rows = _padded(jobs.row_starts, jobs.row_counts)
    nodes, _ = _padded(jobs.node_starts, jobs.node_counts)
    return Plan(jobs.block_tables, jobs.context_lens, rows, nodes, ancestors, depths)


def attend(
    query: Tensor,
    pages: Tensor,
    layout: str,
    kept: dict[int, tuple[Tensor, Tensor]] | None,
    plan: Plan,
    tree_keys: Tensor,
    tree_values: Tensor,
    scale: float,
    softcap: float,
    window: int,
    out: Tensor,
) -> None:
    """Attends; see ``tree_attention`` for the meaning.

    Args:
        query: ``[T, H, D]``.
        pages: ``[P, G, 2, B * D]``.
        layout: of the pages.
        kept: unpacked pages, shared between calls; see ``PagedCache``.
        plan: of the step.
        tree_keys: ``[*, G, D]``.
        tree_values: ``[*, G, D]``.
        scale: of the scores.
        softcap: 0 for none.
        window: -1 for none.
        out: ``[T, H, D]``, written at the plan's rows.
    """
    jobs, rows = plan.row_index.shape
    heads, dim = query.shape[1:]
    kv_heads = pages.shape[1]
    block = pages.shape[3] // dim
    group = heads // kv_heads
    # [J, R, G, H / G, D] -> [J, G, M, D], rows outermost within a KV head
    rows_first = (query[plan.rows].float() * scale).view(jobs, rows, kv_heads, group, dim)
    grouped = rows_first.transpose(1, 2).flatten(2, 3)
    nodes_k, nodes_v = (x[plan.nodes].float().view(jobs, -1, kv_heads, dim) for x in (tree_keys, tree_values))
    if plan.nameless is not None:
        nodes_k, nodes_v = nodes_k.masked_fill(plan.nameless, 0.0), nodes_v.masked_fill(plan.nameless, 0.0)

    softmax = RunningSoftmax()
    num_pages = -(-plan.longest // block)
    per_chunk = max(1, CHUNK_SLOTS // (block * jobs))
    for first in range(0, max(1, num_pages), per_chunk):
        table = plan.block_tables[:, first : min(first + per_chunk, num_pages)]
        count = table.shape[1]
        hidden, beyond = plan.masks(first, count, block, group, window)
        if kept is not None and count in kept:
            keys, values = kept[count]
        else:
            keys, values = unpack_pages(pages[table], layout, dim)  # [J, C, G, D, B], [J, C, G, B, D]
            values = values.masked_fill_(beyond, 0.0)
            if kept is not None and count == num_pages:
                kept[count] = keys, values
        # [J, C, G, M, B] -> [J, G, M, C * B]
        scores = (grouped.unsqueeze(1) @ keys).permute(0, 2, 3, 1, 4).flatten(3)
        if first == 0:
            scores = torch.cat([grouped @ nodes_k.permute(0, 2, 3, 1), scores], dim=3)
        if softcap > 0:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        own = plan.num_nodes if first == 0 else 0

        def weigh(weights: Tensor, own: int = own, count: int = count, values: Tensor = values) -> Tensor:
            paged = weights[..., own:].unflatten(3, (count, block)).permute(0, 3, 1, 2, 4)  # [J, C, G, M, B]
            found = (paged @ values).sum(dim=1)
            return found + weights[..., :own] @ nodes_v.transpose(1, 2) if own else found

        softmax.add(scores.masked_fill_(hidden, float("-inf")), weigh)

    found = softmax.result().view(jobs, kv_heads, rows, group, dim).transpose(1, 2).flatten(2, 3)  # [J, R, H, D]
    if plan.is_row is None:
        out[plan.rows] = found.flatten(0, 1).to(out.dtype) if isinstance(plan.rows, slice) else found.to(out.dtype)
    else:
        out[plan.row_index[plan.is_row]] = found[plan.is_row].to(out.dtype)


def _as_slice(index: Tensor) -> slice | Tensor:
    """Consecutive indices as a slice, which is a view where an index is a copy."""
    first, count = int(index[0, 0]) if index.numel() else 0, index.numel()
    consecutive = torch.arange(first, first + count).view_as(index)
    return slice(first, first + count) if torch.equal(index, consecutive) else index


def _padded(starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges as a matrix: ``([J, W] int64, [J, W] bool)``; padding repeats a range's last index."""
    order = torch.arange(int(counts.max()))
    last = (counts - 1).clamp(min=0).unsqueeze(1)
    return starts.unsqueeze(1) + torch.minimum(order, last), order < counts.unsqueeze(1)
