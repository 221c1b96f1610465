"""The rotary embedding of queries and keys.

    [a ; b] -> [a * cos - b * sin ; b * cos + a * sin]

in float32, with cosines and sines of the row's position. T rows, H query heads, G KV heads, D head size, B sequences,
K nodes of each, P positions. ``reference.py`` is the oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import compiled
from . import native
from .reference import place_reference, rotate_reference


def rotate(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Applies the rotary embedding.

    Args:
        x: ``[..., heads, D]``.
        positions: ``[...] int64``, below P.
        table: ``[P, D] float32``, in each row cosines and then sines.

    Returns:
        ``[..., heads, D]`` in the dtype of ``x``.
    """
    library = compiled(x, table) if x.ndim == 3 and native.lies_flat(x) and _fits(positions, table) else None
    if library is not None:
        return native.rotate(library, x, positions, table)
    return rotate_reference(x, positions, table)


def place(projected: Tensor, positions: Tensor, table: Tensor, num_heads: int, keys: Tensor, values: Tensor) -> Tensor:
    """Splits a product into queries, keys and values, rotates the former two, and puts the latter two in their places.

    Args:
        projected: ``[B * K, (H + 2 G) D]`` queries, keys and values of each row.
        positions: ``[B * K] int64``, below P.
        table: ``[P, D] float32``, see ``rotate``.
        num_heads: H.
        keys: ``[B, K, G, D]``, written.
        values: ``[B, K, G, D]``, written.

    Returns:
        ``[B * K, H, D]`` queries.
    """
    fits = native.lies_flat(keys) and native.lies_flat(values) and projected.stride(1) == 1
    library = compiled(projected, table) if fits and _fits(positions, table) else None
    if library is not None:
        return native.place(library, projected, positions, table, num_heads, keys, values)
    return place_reference(projected, positions, table, num_heads, keys, values)


def _fits(positions: Tensor, table: Tensor) -> bool:
    return positions.dtype is torch.int64 and table.dtype is torch.float32 and table.is_contiguous()
