"""Which implementation runs.

Triton where the tensors lie on a GPU, compiled C++ where they lie in main memory and nobody wants gradients, and PyTorch
for the rest: other dtypes, autograd, and machines without a C++ compiler.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native


def runs_triton(tensor: Tensor) -> bool:
    """Whether an operation on this tensor is launched as a Triton kernel."""
    return tensor.is_cuda


def compiled(first: Tensor, *others: Tensor | None) -> ctypes.CDLL | None:
    """The compiled kernels, if an operation on these tensors is theirs; they know neither float64 nor gradients.

    Args:
        first: decides on the device; if floating, on the dtype.
        others: whose gradients would be lost, too.
    """
    if first.device.type != "cpu" or (first.is_floating_point() and first.dtype not in native.DTYPES):
        return None
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (first, *others)):
        return None
    return native.library()


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (``TRITON_INTERPRET=1``) instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def tuned(configs: Sequence[Any], key: Sequence[str], keep: bool = True) -> Callable[[Any], Any]:
    """Picks the fastest of a few configurations per value of ``key``.

    A new key is timed on its first launch, which must not happen while a CUDA graph is captured: run a shape
    once before capturing it. The interpreter takes the first configuration, since nothing can be timed there.

    Args:
        configs: ``triton.Config`` objects, none of which spills registers.
        key: names of the kernel's arguments that the choice depends on.
        keep: whether to keep the choice on disk; not where it also depends on what is no key, such as a context.
    """
    import triton

    chosen = list(configs[:1]) if interpreted() else list(configs)
    return triton.autotune(configs=chosen, key=list(key), cache_results=keep)
