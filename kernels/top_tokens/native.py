"""Calls the compiled kernel, ``native.cpp``; see ``__init__.py`` for the arguments."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..native import DTYPES, INTEGER, POINTER, arguments

Call = arguments(("logits tokens log_probs", POINTER), ("row_stride rows vocabulary width threads dtype", INTEGER))


def top_tokens(library: ctypes.CDLL, logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Reads the logits twice: for the best, and for the sum."""
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, width, dtype=torch.int64)
    log_probs = torch.empty(rows, width, dtype=torch.float32)
    library.top_tokens(
        ctypes.byref(
            Call(
                *(logits.data_ptr(), tokens.data_ptr(), log_probs.data_ptr(), logits.stride(0), rows, vocabulary),
                *(width, torch.get_num_threads(), DTYPES[logits.dtype]),
            )
        )
    )
    return tokens, log_probs
