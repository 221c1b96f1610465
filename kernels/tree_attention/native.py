"""Calls the compiled kernel, ``native.cpp``."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..native import DTYPES, FLOAT, INTEGER, POINTER, arguments

if TYPE_CHECKING:
    from . import TreeJobs

#: Head sizes and page sizes are read in pieces of this many numbers.
UNIT = 16
LAYOUTS = {"vec": 0, "amx": 1}
ERRORS = {
    1: (MemoryError, "tree_attention ran out of memory"),
    2: (ValueError, "KV layout 'amx' holds bfloat16 only"),
    3: (ValueError, "a tree has at most 64 nodes"),
}

_TENSORS = ("query", "pages", "keys", "values", "out")
_JOBS = ("context_lens", "row_starts", "row_counts", "node_starts", "node_counts")

Call = arguments(
    *(field for name in _TENSORS for field in ((name, POINTER), (f"{name}_row {name}_head", INTEGER))),
    ("tables", POINTER),
    ("table_row", INTEGER),
    (" ".join((*_JOBS, "ancestors", "depths")), POINTER),
    ("jobs heads kv_heads dim block window threads dtype layout", INTEGER),
    ("scale softcap", FLOAT),
)


def fits(query: Tensor, pages: Tensor, tree_keys: Tensor, tree_values: Tensor, out: Tensor) -> bool:
    """Whether the kernel can read and write these tensors as they lie."""
    block, width = pages.shape[2:]
    return (
        query.dtype in DTYPES
        and query.shape[2] % UNIT == 0
        and block % UNIT == 0
        and pages.stride(2) == width
        and all(x.stride(-1) == 1 for x in (query, pages, tree_keys, tree_values, out))
        and all(x.dtype == query.dtype for x in (tree_keys, tree_values, out))
    )


def step_arguments(jobs: TreeJobs, ancestors: Tensor, depths: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
    """What all layers of a step share: ``(tensors to hold on to, arguments from tables to depths)``."""
    tables = jobs.block_tables.to(torch.int32)
    tables = tables if tables.stride(1) == 1 else tables.contiguous()
    indices = [getattr(jobs, name) for name in _JOBS]
    held = [x.to(torch.int64).contiguous() for x in (*indices, ancestors, depths)]
    return [tables, *held], (tables.data_ptr(), tables.stride(0), *(x.data_ptr() for x in held))


def attend(
    library: ctypes.CDLL,
    query: Tensor,
    pages: Tensor,
    layout: str,
    jobs: TreeJobs,
    tree_keys: Tensor,
    tree_values: Tensor,
    ancestors: Tensor,
    depths: Tensor,
    scale: float,
    softcap: float,
    window: int,
    out: Tensor,
) -> None:
    """Attends; see ``tree_attention`` for the arguments, of which ``fits`` must hold.

    Raises:
        ValueError: if a tree has more than 64 nodes, or the layout does not exist in the dtype.
        MemoryError: if the threads' working memory cannot be had.
    """
    _, shared = jobs.shared(step_arguments, ancestors, depths)
    error = library.tree_attention(
        ctypes.byref(
            Call(
                *(query.data_ptr(), query.stride(0), query.stride(1)),
                *(pages.data_ptr(), pages.stride(0), pages.stride(1)),
                *(tree_keys.data_ptr(), tree_keys.stride(0), tree_keys.stride(1)),
                *(tree_values.data_ptr(), tree_values.stride(0), tree_values.stride(1)),
                *(out.data_ptr(), out.stride(0), out.stride(1)),
                *shared,
                *(jobs.row_counts.numel(), query.shape[1], pages.shape[1], query.shape[2], pages.shape[2]),
                *(window, torch.get_num_threads(), DTYPES[query.dtype], LAYOUTS[layout]),
                *(scale, softcap),
            )
        )
    )
    if error:
        kind, message = ERRORS[error]
        raise kind(message)
