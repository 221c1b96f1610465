"""The most probable tokens after each row, with their log-probabilities.

    log_prob_i = logit_i - log sum_j exp(logit_j)

in float32, the most probable first. ``reference.py`` is the oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import compiled, runs_triton
from . import native
from .reference import top_tokens_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_WIDTH = 63
MAX_VOCABULARY = 2**19


def top_tokens(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` most probable tokens of each row.

    T rows, V vocabulary, W tokens per row. The logits are read once.

    Args:
        logits: ``[T, V]`` float32, bfloat16, float16 or (in PyTorch on any device) float64, each row contiguous;
            -inf masks a token.
        width: W, in [1, 63] and at most V.

    Returns:
        ``(tokens [T, W] int64, log_probs [T, W] float32)``, the most probable first. Equal logits come in
        the order of their token ids, unless PyTorch does the work. A masked token has log-probability -inf, and follows all others.

    Raises:
        ValueError: on a shape, stride, dtype or width other than these.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be [T, V], got shape {list(logits.shape)}")
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    vocabulary = logits.shape[1]
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"the vocabulary must have 1 to {MAX_VOCABULARY} tokens, got {vocabulary}")
    if logits.stride(1) != 1 and vocabulary > 1:
        raise ValueError(f"each row of logits must be contiguous, got strides {logits.stride()}")
    if not 1 <= width <= min(MAX_WIDTH, vocabulary):
        raise ValueError(f"width must be in [1, {min(MAX_WIDTH, vocabulary)}], got {width}")
    if runs_triton(logits) and logits.dtype is not torch.float64:
        from .triton_kernel import launch_top_tokens

        return launch_top_tokens(logits, width)
    library = compiled(logits)
    if library is not None:
        return native.top_tokens(library, logits, width)
    return top_tokens_reference(logits, width)
