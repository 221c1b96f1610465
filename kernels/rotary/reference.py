"""The rotary embedding in PyTorch: the oracle of the compiled kernel, and what a GPU runs."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_reference(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """See ``rotate``."""
    cos, sin = table[positions].unsqueeze(-2).chunk(2, dim=-1)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def place_reference(
    projected: Tensor, positions: Tensor, table: Tensor, num_heads: int, keys: Tensor, values: Tensor
) -> Tensor:
    """See ``place``."""
    heads = projected.unflatten(-1, (-1, table.shape[1]))
    query, key, value = heads.split([num_heads, keys.shape[2], keys.shape[2]], dim=1)
    keys.copy_(rotate_reference(key, positions, table).view_as(keys))
    values.copy_(value.reshape(values.shape))
    return rotate_reference(query, positions, table)
