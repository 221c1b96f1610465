"""Prompt lookup in PyTorch; see ``__init__.py``. Also used where there is no compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def look_up_reference(texts: Tensor, rows: Tensor, lengths: Tensor, width: int, longest: int) -> tuple[Tensor, Tensor]:
    """Keeps the places that repeat one token more, until none does.

    Raises:
        IndexError: if a row or a length is not in the texts.
    """
    tokens = torch.full((len(rows), width), -1, dtype=torch.int64)
    repeated = torch.zeros(len(rows), dtype=torch.int64)
    for b, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        if not 0 <= row < len(texts) or not 1 <= length <= texts.shape[1]:
            raise IndexError(f"rows and lengths must lie in texts of shape {list(texts.shape)}")
        text = texts[row, :length].long()
        places = (text[:-1] == text[-1]).nonzero().squeeze(1)
        count = 0
        while len(places) and count < longest:
            count += 1
            last = int(places[-1])
            places = places[places >= count]
            places = places[text[places - count] == text[length - 1 - count]] if count < length else places[:0]
        if count:
            period = length - 1 - last
            repeated[b] = count
            tokens[b] = text[last + 1 + torch.arange(width) % period]
    return tokens, repeated
