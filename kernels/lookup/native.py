"""Calls the compiled kernel, ``native.cpp``; see ``__init__.py`` for the arguments."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..native import INTEGER, POINTER, arguments

Call = arguments(
    ("texts rows lengths tokens repeated", POINTER), ("row_stride num_texts most batch width longest", INTEGER)
)


def look_up(
    library: ctypes.CDLL, texts: Tensor, rows: Tensor, lengths: Tensor, width: int, longest: int
) -> tuple[Tensor, Tensor]:
    """Searches backwards from the end of each text.

    Raises:
        IndexError: if a row or a length is not in the texts.
    """
    rows, lengths = rows.contiguous(), lengths.contiguous()
    tokens = torch.empty(len(rows), width, dtype=torch.int64)
    repeated = torch.empty(len(rows), dtype=torch.int64)
    pointers = (x.data_ptr() for x in (texts, rows, lengths, tokens, repeated))
    if library.look_up(ctypes.byref(Call(*pointers, texts.stride(0), *texts.shape, len(rows), width, longest))):
        raise IndexError(f"rows and lengths must lie in texts of shape {list(texts.shape)}")
    return tokens, repeated
