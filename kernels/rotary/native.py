"""Calls the compiled kernel, ``native.cpp``; see ``__init__.py`` for the arguments."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..native import DTYPES, INTEGER, POINTER, arguments

Call = arguments(
    ("projected positions table query keys values", POINTER),
    ("row_stride key_sequence key_row value_sequence value_row", INTEGER),
    ("rows rows_each heads kv_heads dim limit dtype", INTEGER),
)


def lies_flat(heads: Tensor) -> bool:
    """Whether the heads of each row of ``[..., heads, D]`` lie side by side."""
    return heads.stride(-1) == 1 and heads.stride(-2) == heads.shape[-1]


def rotate(library: ctypes.CDLL, x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Rotates ``[T, heads, D]``, of which ``lies_flat`` must hold.

    Raises:
        IndexError: if a position has no row in the table.
    """
    rows, heads, dim = x.shape
    out = torch.empty(rows, heads, dim, dtype=x.dtype)
    positions = positions.contiguous()
    _call(
        library,
        Call(
            *(x.data_ptr(), positions.data_ptr(), table.data_ptr(), out.data_ptr(), None, None, x.stride(0)),
            *(0, 0, 0, 0, rows, 1, heads, 0, dim, table.shape[0], DTYPES[x.dtype]),
        ),
    )
    return out


def place(
    library: ctypes.CDLL,
    projected: Tensor,
    positions: Tensor,
    table: Tensor,
    num_heads: int,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Splits, rotates and places in one pass; of ``keys`` and ``values``, ``lies_flat`` must hold.

    Raises:
        IndexError: if a position has no row in the table.
    """
    query = torch.empty(projected.shape[0], num_heads, table.shape[1], dtype=projected.dtype)
    positions = positions.contiguous()
    _call(library, place_call(projected, positions, table, query, keys, values))
    return query


def place_call(
    projected: Tensor, positions: Tensor, table: Tensor, query: Tensor, keys: Tensor, values: Tensor
) -> ctypes.Structure:
    """The argument of ``rotary_place``, which points to these tensors."""
    return Call(
        *(projected.data_ptr(), positions.data_ptr(), table.data_ptr()),
        *(query.data_ptr(), keys.data_ptr(), values.data_ptr()),
        *(projected.stride(0), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)),
        *(projected.shape[0], keys.shape[1], query.shape[1], keys.shape[2], table.shape[1], table.shape[0]),
        DTYPES[projected.dtype],
    )


def _call(library: ctypes.CDLL, call: ctypes.Structure) -> None:
    check(library.rotary_place(ctypes.byref(call)))


def check(outside: int) -> None:
    """Raises if ``rotary_place`` says so.

    Raises:
        IndexError: if a position has no row in the table.
    """
    if outside:
        raise IndexError("positions must be in the rotary table; call prepare_positions with a higher limit")
