"""The head's KV in vLLM's pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jakiro_vllm.integration.cpu_attention import TreeCPUAttentionImpl
from jakiro_vllm.kernels.tree_attention import TreeJobs, tree_attention


class PagedHeadCache:
    """One round's view of the pages; see ``decode.drafter.HeadCache``."""

    def __init__(self, layer: Any, block_tables: Tensor, context_lens: Tensor, slots: Tensor) -> None:
        """Binds the head's attention layer to a round.

        Args:
            layer: vLLM's attention layer that owns the pages.
            block_tables: ``[B, M] int32`` of the requests that draft.
            context_lens: ``[B] int64`` their committed tokens, this round's included.
            slots: ``[T] int64`` where this round's committed rows of all requests belong.
        """
        assert isinstance(layer.impl, TreeCPUAttentionImpl)
        self.layer = layer
        self.block_tables = block_tables
        self.context_lens = context_lens
        self.slots = slots
        # The context stays as it is while a tree grows, so its pages are unpacked once.
        self.pages = layer.impl.paged_cache(layer, layer.kv_cache, keep=True)

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Stores ``[T, G, D]`` keys and values."""
        self.layer.impl.write_rows(self.layer, keys, values, self.slots)

    def attend(
        self, query: Tensor, scratch_keys: Tensor, scratch_values: Tensor, num_scratch: int, ancestors: Tensor
    ) -> Tensor:
        """Attends to pages and scratch.

        The rows of a call are the last level in scratch, so their position follows from how much is there.
        """
        batch, rows = query.shape[:2]
        order = torch.arange(batch)
        width = scratch_keys.shape[1]
        flat = query.flatten(0, 1)
        out = torch.empty_like(flat)
        tree_attention(
            flat,
            self.pages,
            TreeJobs(
                block_tables=self.block_tables,
                context_lens=self.context_lens,
                row_starts=order * rows,
                row_counts=torch.full_like(order, rows),
                node_starts=order * width,
                node_counts=torch.full_like(order, num_scratch),
            ),
            scratch_keys.flatten(0, 1),
            scratch_values.flatten(0, 1),
            ancestors.flatten(),
            torch.full((batch * rows,), num_scratch // rows - 1),
            self.layer.impl.scale,
            out,
            window=self.layer.impl.sliding_window,
        )
        return out.unflatten(0, (batch, rows))
