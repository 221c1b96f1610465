"""Calls the compiled kernel, ``native.cpp``; see ``__init__.py`` for the arguments."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..native import DTYPES, INTEGER, POINTER, arguments

Call = arguments(
    ("tokens parents num_nodes sampled logits starts path emitted num_accepted", POINTER),
    ("batch width steps row_stride rows vocabulary threads dtype", INTEGER),
)


def walk_samples(
    library: ctypes.CDLL, tokens: Tensor, parents: Tensor, num_nodes: Tensor, sampled: Tensor, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Follows the target's tokens down each tree, one after the other."""
    held = [x.contiguous() for x in (tokens, parents, num_nodes, sampled)]
    outputs = _empty(tokens, max_depth)
    pointers = [x.data_ptr() for x in held], [x.data_ptr() for x in outputs]
    library.walk_samples(
        ctypes.byref(Call(*pointers[0], None, None, *pointers[1], *tokens.shape, max_depth + 1, 0, 0, 0, 1, 0))
    )
    return outputs


def walk_greedy(
    library: ctypes.CDLL,
    tokens: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    logits: Tensor,
    starts: Tensor,
    max_depth: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Looks for the highest logit of those rows only that a walk comes by.

    Raises:
        IndexError: if a tree's rows are not among the logits.
    """
    held = [x.contiguous() for x in (tokens, parents, num_nodes)]
    starts = starts.contiguous()
    outputs = _empty(tokens, max_depth)
    rows, vocabulary = logits.shape
    if library.walk_greedy(
        ctypes.byref(
            Call(
                *(x.data_ptr() for x in held),
                *(None, logits.data_ptr(), starts.data_ptr(), *(x.data_ptr() for x in outputs)),
                *(*tokens.shape, max_depth + 1, logits.stride(0), rows, vocabulary),
                *(torch.get_num_threads(), DTYPES[logits.dtype]),
            )
        )
    ):
        raise IndexError(f"starts must leave room for each tree among {rows} rows of logits")
    return outputs


def _empty(tokens: Tensor, max_depth: int) -> tuple[Tensor, Tensor, Tensor]:
    path, emitted = torch.empty(2, tokens.shape[0], max_depth + 1, dtype=torch.int64).unbind()
    return path, emitted, torch.empty(tokens.shape[0], dtype=torch.int64)
