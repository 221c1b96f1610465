"""Prompt lookup: where a text last said what it says at its end, and what followed there.

A text of n tokens *repeats* m of them at p if its last m tokens also end at token p < n - 1. The place with the longest
such repeat is taken, of equal ones the latest, and the tokens after it are the draft:

    draft_j = text_{p + 1 + j},  where text_{n + j} = draft_j

so that a text in a loop goes on in it for as long as is asked. ``reference.py`` is the oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import compiled
from . import native
from .reference import look_up_reference


def look_up(texts: Tensor, rows: Tensor, lengths: Tensor, width: int, longest: int) -> tuple[Tensor, Tensor]:
    """The most likely continuations of texts, by what they said before; on a CPU.

    Takes time in proportion to a text's length, but for loops, where the search soon ends.

    Args:
        texts: ``[R, L] int32`` token ids, each row contiguous.
        rows: ``[B] int64`` the texts that are meant.
        lengths: ``[B] int64`` their tokens, at least 1 and at most L.
        width: tokens W of each draft, at least 1.
        longest: m at which a repeat counts as long enough, at least 1; the latest such place is taken.

    Returns:
        ``(tokens [B, W] int64, repeated [B] int64)``: drafts, and m, at most ``longest``. Where not even the last token
        was there before, m is 0 and the tokens are -1.

    Raises:
        ValueError: on shapes, dtypes, strides or numbers other than these.
        IndexError: if a row or a length is not in the texts.
    """
    if texts.ndim != 2 or texts.dtype != torch.int32 or (texts.stride(1) != 1 and texts.shape[1] > 1):
        raise ValueError(f"texts must be [R, L] int32 with contiguous rows, got {texts.dtype} {list(texts.shape)}")
    for name, tensor in (("rows", rows), ("lengths", lengths)):
        if tensor.shape != rows.shape or tensor.ndim != 1 or tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be [B] int64, got {tensor.dtype} {list(tensor.shape)}")
    if width < 1 or longest < 1:
        raise ValueError(f"width and longest must be at least 1, got {width} and {longest}")
    library = compiled(texts)
    if library is not None:
        return native.look_up(library, texts, rows, lengths, width, longest)
    return look_up_reference(texts, rows, lengths, width, longest)
