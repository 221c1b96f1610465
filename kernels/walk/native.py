"""Calls the compiled kernel, ``native.cpp``; see ``__init__.py`` for the arguments."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..native import INTEGER, POINTER, arguments

Call = arguments(
    ("tokens parents num_nodes sampled path emitted num_accepted", POINTER), ("batch width steps", INTEGER)
)


def walk_samples(
    library: ctypes.CDLL, tokens: Tensor, parents: Tensor, num_nodes: Tensor, sampled: Tensor, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Follows the target's tokens down each tree, one after the other."""
    held = [x.contiguous() for x in (tokens, parents, num_nodes, sampled)]
    batch, width = tokens.shape
    path, emitted = torch.empty(2, batch, max_depth + 1, dtype=torch.int64).unbind()
    num_accepted = torch.empty(batch, dtype=torch.int64)
    outputs = path, emitted, num_accepted
    library.walk_samples(ctypes.byref(Call(*(x.data_ptr() for x in (*held, *outputs)), batch, width, max_depth + 1)))
    return outputs
