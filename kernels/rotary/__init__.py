"""The rotary embedding of queries and keys.

    [a ; b] -> [a * cos - b * sin ; b * cos + a * sin]

in float32, with cosines and sines of the row's position. T rows, H query heads, G KV heads, D head size, B sequences,
K nodes of each, P positions. ``reference.py`` is the oracle.
"""

from __future__ import annotations

from torch import Tensor

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
    return place_reference(projected, positions, table, num_heads, keys, values)
