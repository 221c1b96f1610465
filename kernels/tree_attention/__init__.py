"""Attention of token trees over a paged context.

Row i of a sequence sees the whole committed context, which lies in pages, and those tree nodes whose bit is
set in its ancestor word:

    out_i = softmax(scale * q_i [K_context ; K_{ancestors(i)}]^T) [V_context ; V_{ancestors(i)}]

``reference.py`` is the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedCache:
    """A layer's KV pages as raw memory.

    Attributes:
        pages: ``[P, G, B, 2 * D]``, in each page and head the keys' half before the values'.
        layout: ``vec`` (keys ``[D, B]``, values ``[B, D]``) or ``amx`` (both packed in 16x2 tiles).
    """

    pages: Tensor
    layout: str

    @property
    def block_size(self) -> int:
        """Slots per page."""
        return self.pages.shape[2]


@dataclass(frozen=True)
class TreeJobs:
    """Which rows belong to which sequence; J sequences, M pages at most.

    Attributes:
        block_tables: ``[J, M] int32`` pages of each context.
        context_lens: ``[J] int64`` committed tokens.
        row_starts: ``[J] int64`` first query row.
        row_counts: ``[J] int64``.
        node_starts: ``[J] int64`` first row of the tree's keys and values.
        node_counts: ``[J] int64`` nodes, at most 64.
    """

    block_tables: Tensor
    context_lens: Tensor
    row_starts: Tensor
    row_counts: Tensor
    node_starts: Tensor
    node_counts: Tensor


LAYOUTS = ("vec", "amx")


def tree_attention(
    query: Tensor,
    cache: PagedCache,
    jobs: TreeJobs,
    tree_keys: Tensor,
    tree_values: Tensor,
    ancestors: Tensor,
    depths: Tensor,
    scale: float,
    out: Tensor,
    softcap: float = 0.0,
    window: int = -1,
) -> Tensor:
    """Computes tree attention for the jobs' rows; other rows of ``out`` are left alone.

    T query rows, H query heads, G KV heads, D head size, N rows of tree keys.

    Args:
        query: ``[T, H, D]`` float32, bfloat16 or float16.
        cache: the layer's pages, in the query's dtype.
        jobs: the sequences.
        tree_keys: ``[N, G, D]``.
        tree_values: ``[N, G, D]``.
        ancestors: ``[T] int64`` bit j lets the row see node j of its sequence.
        depths: ``[T] int64`` position of the row after its context; used with a window only.
        scale: of the scores.
        out: ``[T, H, D]``, written.
        softcap: ``c * tanh(score / c)`` where positive.
        window: sliding window in positions where positive; a tree must be shallower than it.

    Returns:
        ``out``.

    Raises:
        ValueError: on a layout, dtype or device that has no kernel.
    """
    if query.device.type != "cpu":
        raise ValueError(f"tree_attention has no kernel for device {query.device}; use the CPU")
    if cache.layout not in LAYOUTS:
        raise ValueError(f"KV layout must be one of {', '.join(LAYOUTS)}, got {cache.layout!r}")
    if cache.pages.dtype not in _TABLE_BITS or cache.pages.dtype != query.dtype:
        raise ValueError(f"KV dtype must be the query's and 16 or 32 bits wide, got {cache.pages.dtype}, {query.dtype}")
    from .cpu_kernel import attend_parallel

    pages, block, dim = cache.pages, cache.block_size, query.shape[2]
    raw = pages.view(pages.shape[0], pages.shape[1], 2, block * dim)
    exact = query.dtype == torch.float32
    result = out if exact and out.is_contiguous() else torch.empty(query.shape, dtype=torch.float32)
    attend_parallel(
        _float32(query),
        raw.numpy() if exact else raw.view(torch.uint16).numpy(),
        _NO_TABLE if exact else _float_table(query.dtype),
        LAYOUTS.index(cache.layout),
        block,
        jobs.block_tables.numpy(),
        jobs.context_lens.numpy(),
        jobs.row_starts.numpy(),
        jobs.row_counts.numpy(),
        jobs.node_starts.numpy(),
        jobs.node_counts.numpy(),
        _float32(tree_keys),
        _float32(tree_values),
        ancestors.numpy(),
        depths.numpy(),
        np.float32(scale),
        np.float32(softcap),
        window,
        result.numpy(),
    )
    if result is not out:
        for start, count in zip(jobs.row_starts.tolist(), jobs.row_counts.tolist(), strict=True):
            out[start : start + count] = result[start : start + count]
    return out


_TABLE_BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 16}
_NO_TABLE = np.empty(0, dtype=np.float32)


@lru_cache
def _float_table(dtype: torch.dtype) -> np.ndarray:
    """Every 16-bit value of ``dtype`` as float32."""
    words = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    return words.view(dtype).float().numpy()


def _float32(x: Tensor) -> np.ndarray:
    return x.float().contiguous().numpy()
