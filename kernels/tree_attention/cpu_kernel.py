"""Tree attention on the CPU in batched PyTorch, reading vLLM's pages chunk by chunk.

J sequences, R rows (padded), H query heads, G KV heads, D head size, C pages per chunk, B slots per page,
N nodes (padded), and M = R * H / G query rows per KV head.

Softmax is computed online: the tree's nodes come first, then the context in chunks, so memory does not grow
with the context. There is no loop over sequences, rows or nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Slots, over all sequences, that are unpacked at a time.
CHUNK_SLOTS = 8192


class RunningSoftmax:
    """Attention over several sets of keys: maximum, sum and weighted values so far."""

    def __init__(self, query: Tensor, softcap: float) -> None:
        """Starts empty; ``query [J, 1, G, M, D] float32`` is scaled already."""
        self.query = query
        self.softcap = softcap
        self.maximum = query.new_full((*query.shape[:-1], 1), float("-inf"))
        self.total = torch.zeros_like(self.maximum)
        self.values = torch.zeros_like(query)

    def add(self, keys: Tensor, values: Tensor, hidden: Tensor) -> None:
        """Adds C sets of S keys each.

        Args:
            keys: ``[J, C, G, D, S] float32``.
            values: ``[J, C, G, S, D] float32``, finite.
            hidden: bool, broadcasts to ``[J, C, G, M, S]``; what a row does not see.
        """
        scores = self.query @ keys
        if self.softcap > 0:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        scores = scores.masked_fill_(hidden, float("-inf"))
        maximum = torch.maximum(self.maximum, scores.amax(dim=(1, 4), keepdim=True))
        # Where nothing was seen yet the maximum is -inf; 0 in its place leaves every weight at exp(-inf) = 0.
        pivot = maximum.masked_fill(maximum == float("-inf"), 0.0)
        weights = scores.sub_(pivot).exp_()
        kept = self.maximum.sub_(pivot).exp_()
        self.total = self.total.mul_(kept).add_(weights.sum(dim=(1, 4), keepdim=True))
        self.values = self.values.mul_(kept).add_((weights @ values).sum(dim=1, keepdim=True))
        self.maximum = maximum

    def result(self) -> Tensor:
        """``[J, G, M, D]``."""
        return (self.values / self.total).squeeze(1)


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
        self.node_index = nodes
        self.is_row = None if bool(is_row.all()) else is_row
        self.longest = int(context_lens.max())
        self.positions = context_lens.unsqueeze(1) + depths[self.row_index]  # [J, R]
        bits = (ancestors[self.row_index].unsqueeze(2) >> torch.arange(nodes.shape[1])) & 1
        self.unseen = bits == 0  # [J, R, N]
        # Nodes that no row names may hold anything: their weight is 0, but 0 * NaN would not be.
        nameless = self.unseen.all(dim=1)
        self.nameless = nameless[:, :, None, None] if bool(nameless.any()) else None
        self._masks: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def tree_mask(self, group: int) -> Tensor:
        """``[J, 1, 1, M, N]`` nodes that a row does not see."""
        return self.unseen.repeat_interleave(group, dim=1).unsqueeze(1).unsqueeze(1)

    def context_masks(self, first: int, count: int, block: int, group: int, window: int) -> tuple[Tensor, Tensor]:
        """Masks of ``count`` pages from page ``first``.

        Returns:
            ``([J, C, 1, 1 or M, B], [J, C, 1, B, 1])``: slots that a row does not see, and slots beyond the
            context, which hold nobody's KV.
        """
        key = (first, count, block, group, window)
        if key not in self._masks:
            jobs = self.context_lens.shape[0]
            slots = torch.arange(first * block, (first + count) * block).view(1, count, 1, 1, block)
            beyond = slots >= self.context_lens.view(jobs, 1, 1, 1, 1)
            hidden = beyond
            if window > 0:
                oldest = (self.positions - window).repeat_interleave(group, dim=1)
                hidden = beyond | (slots <= oldest.view(jobs, 1, 1, -1, 1))
            self._masks[key] = hidden, beyond.transpose(3, 4)
        return self._masks[key]


def attend(
    query: Tensor,
    pages: Tensor,
    layout: str,
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
    # [J, R, G, H / G, D] -> [J, 1, G, M, D], rows outermost within a KV head
    grouped = (query[plan.row_index].float() * scale).unflatten(2, (kv_heads, group))
    softmax = RunningSoftmax(grouped.permute(0, 2, 1, 3, 4).flatten(2, 3).unsqueeze(1), softcap)

    if plan.node_index.shape[1]:
        keys, values = tree_keys[plan.node_index].float(), tree_values[plan.node_index].float()  # [J, N, G, D]
        if plan.nameless is not None:
            keys, values = keys.masked_fill(plan.nameless, 0.0), values.masked_fill(plan.nameless, 0.0)
        softmax.add(keys.permute(0, 2, 3, 1).unsqueeze(1), values.transpose(1, 2).unsqueeze(1), plan.tree_mask(group))

    num_pages = -(-plan.longest // block)
    per_chunk = max(1, CHUNK_SLOTS // (block * jobs))
    for first in range(0, num_pages, per_chunk):
        table = plan.block_tables[:, first : min(first + per_chunk, num_pages)]
        keys, values = unpack_pages(pages[table], layout, dim)  # [J, C, G, D, B], [J, C, G, B, D]
        hidden, beyond = plan.context_masks(first, table.shape[1], block, group, window)
        softmax.add(keys, values.masked_fill_(beyond, 0.0), hidden)

    found = softmax.result().unflatten(2, (rows, group)).transpose(1, 2).flatten(2, 3).to(out.dtype)  # [J, R, H, D]
    if plan.is_row is None:
        out[plan.row_index] = found
    else:
        out[plan.row_index[plan.is_row]] = found[plan.is_row]
