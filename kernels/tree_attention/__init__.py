"""Attention of token trees over a paged context.

Row i of a sequence sees the whole committed context, which lies in pages, and those tree nodes whose bit is
set in its ancestor word:

    out_i = softmax(scale * q_i [K_context ; K_{ancestors(i)}]^T) [V_context ; V_{ancestors(i)}]

``reference.py`` is the oracle. ``native.cpp`` does the work, compiled on first use; ``cpu_kernel.py`` does it in
PyTorch where there is no compiler, or for tensors that lie otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from ..dispatch import compiled
from . import cpu_kernel, native

S = TypeVar("S")


@dataclass(frozen=True)
class PagedCache:
    """A layer's KV pages as raw memory.

    Attributes:
        pages: ``[P, G, B, 2 * D]``, in each page and head the keys' half before the values'.
        layout: ``vec`` (keys ``[D, B]``, values ``[B, D]``) or ``amx`` (both packed in 16x2 tiles).
        kept: where calls in PyTorch share what they unpacked, if they have the same block tables and contexts
            and the pages do not change between them; None keeps nothing.
    """

    pages: Tensor
    layout: str
    kept: dict[int, tuple[Tensor, Tensor]] | None = None

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
    _shared: dict[Any, tuple[Tensor, Tensor, Any]] = field(default_factory=dict, init=False, repr=False)

    def shared(self, make: Callable[[TreeJobs, Tensor, Tensor], S], ancestors: Tensor, depths: Tensor) -> S:
        """What all layers of a step have in common, ``make(self, ancestors, depths)``, made once."""
        key = (make, id(ancestors), id(depths))
        if key not in self._shared:
            # Holding both keeps their identities theirs.
            self._shared[key] = ancestors, depths, make(self, ancestors, depths)
        made: S = self._shared[key][2]
        return made


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
        ValueError: on a layout, dtype or device that has no kernel, or on a tree of more than 64 nodes.
    """
    if query.device.type != "cpu":
        raise ValueError(f"tree_attention has no kernel for device {query.device}; use the CPU")
    if cache.layout not in LAYOUTS:
        raise ValueError(f"KV layout must be one of {', '.join(LAYOUTS)}, got {cache.layout!r}")
    if cache.pages.dtype != query.dtype:
        raise ValueError(f"KV pages must have the query's dtype {query.dtype}, got {cache.pages.dtype}")
    if not jobs.row_counts.numel():
        return out
    pages = cache.pages
    library = compiled(query)
    if library is not None and native.fits(query, pages, tree_keys, tree_values, out):
        native.attend(
            library,
            query,
            pages,
            cache.layout,
            jobs,
            tree_keys,
            tree_values,
            ancestors,
            depths,
            scale,
            softcap,
            window,
            out,
        )
        return out
    cpu_kernel.attend(
        query,
        pages.view(pages.shape[0], pages.shape[1], 2, -1),
        cache.layout,
        cache.kept,
        jobs.shared(cpu_kernel.step_plan, ancestors, depths),
        tree_keys,
        tree_values,
        scale,
        softcap,
        window,
        out,
    )
    return out
