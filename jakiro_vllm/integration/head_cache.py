"""The head's KV in vLLM's pages, as ``decode.drafter.HeadCache`` wants it, for each platform."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jakiro_vllm.kernels.batch_attention import BatchRows, Scratch
from jakiro_vllm.kernels.tree_attention import TreeJobs, tree_attention


class CPUHeadCache:
    """One round's view of the pages on the CPU."""

    def __init__(self, layer: Any, block_tables: Tensor, context_lens: Tensor, slots: Tensor) -> None:
        """Binds the head's attention layer to a round.

        Args:
            layer: vLLM's attention layer that owns the pages.
            block_tables: ``[B, M] int32`` of the requests that draft.
            context_lens: ``[B] int64`` their committed tokens, this round's included.
            slots: ``[T] int64`` where this round's committed rows of all requests belong.
        """
        self.layer = layer
        self.block_tables = block_tables
        self.context_lens = context_lens
        self.slots = slots
        # The context stays as it is while a tree grows, so its pages are unpacked once.
        self.pages = layer.impl.paged_cache(layer, layer.kv_cache, keep=True)
        self._order = torch.arange(context_lens.shape[0])
        #: Where each request's rows begin, and how many they are, by their number.
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Stores ``[T, G, D]`` keys and values."""
        self.layer.impl.write_rows(self.layer, keys, values, self.slots)

    def attend(
        self, query: Tensor, scratch_keys: Tensor, scratch_values: Tensor, num_scratch: int, ancestors: Tensor
    ) -> Tensor:
        """Attends to pages and scratch.

        The rows of a call are the last level in scratch, so their position follows from how much is there.
        """
        batch, rows, order = query.shape[0], query.shape[1], self._order
        if rows not in self._rows:
            self._rows[rows] = order * rows, torch.full_like(order, rows)
        row_starts, row_counts = self._rows[rows]
        flat = query.flatten(0, 1)
        out = torch.empty_like(flat)
        tree_attention(
            flat,
            self.pages,
            TreeJobs(
                block_tables=self.block_tables,
                context_lens=self.context_lens,
                row_starts=row_starts,
                row_counts=row_counts,
                node_starts=order * scratch_keys.shape[1],
                node_counts=torch.full_like(order, num_scratch),
            ),
            scratch_keys.flatten(0, 1),
            scratch_values.flatten(0, 1),
            ancestors.flatten(),
            torch.full((batch * rows,), num_scratch // rows - 1),
            self.layer.impl.scale,
            out,
            window=self.layer.impl.window,
        )
        return out.view(query.shape)


class GPUHeadCache:
    """One round's view of the pages on a GPU: launches only, so that a draft can be captured as a graph."""

    def __init__(self, layer: Any, block_tables: Tensor, context_lens: Tensor, slots: Tensor | None = None) -> None:
        """Binds the head's attention layer to a round.

        Args:
            layer: vLLM's attention layer that owns the pages.
            block_tables: ``[B, M] int32`` of the requests that draft.
            context_lens: ``[B] int32`` their committed tokens, this round's included.
            slots: ``[T] int64`` where this round's committed rows of all requests belong; only for writing.
        """
        self.layer = layer
        self.block_tables = block_tables
        self.context_lens = context_lens
        self.slots = slots

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Stores ``[T, G, D]`` keys and values."""
        assert self.slots is not None
        self.layer.impl.write_rows(self.layer, keys, values, self.slots)

    def attend(
        self, query: Tensor, scratch_keys: Tensor, scratch_values: Tensor, num_scratch: int, ancestors: Tensor
    ) -> Tensor:
        """Attends to pages and scratch; the rows of a call are the last level in scratch."""
        batch, rows = query.shape[:2]
        flat = query.flatten(0, 1)
        out = torch.empty_like(flat)
        self.layer.impl.attend(
            self.layer,
            flat,
            self.layer.kv_cache,
            BatchRows(
                block_tables=self.block_tables,
                row_starts=torch.arange(0, (batch + 1) * rows, rows, dtype=torch.int32, device=flat.device),
                context_lens=self.context_lens,
                ancestors=ancestors.flatten(),
                depths=torch.full((batch * rows,), num_scratch // rows - 1, device=flat.device),
                max_rows=rows,
            ),
            out,
            Scratch(scratch_keys, scratch_values, num_scratch),
        )
        return out.unflatten(0, (batch, rows))


class NoPages:
    """Stands in for the head's pages before there are any: remembers nothing, attends to nothing."""

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Drops them."""

    def attend(
        self, query: Tensor, scratch_keys: Tensor, scratch_values: Tensor, num_scratch: int, ancestors: Tensor
    ) -> Tensor:
        """Zeros."""
        return torch.zeros_like(query)
