"""Committed rows that the head has not read yet.

While nothing is drafted nobody asks the head, and it reads many rows together for the price of a few: so steps without
a draft only keep their rows, which the head reads before the next draft.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jakiro_vllm.decode.drafter import RoundInput


class Backlog:
    """Rows of one batch of requests, step by step, in the order in which they were committed."""

    #: Rows from which on the head should read them, so that no step has to wait for long.
    MOST = 128

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._rows: list[tuple[RoundInput, Tensor]] = []
        self._count = 0

    def __len__(self) -> int:
        """Rows."""
        return self._count

    def takes(self, names: Sequence[str]) -> bool:
        """Whether a step's rows may wait behind those that are here.

        Those of another batch may not: the engine may have given a slot of the old one to the new one.
        """
        return not self._count or (self._count < self.MOST and self._names == tuple(names))

    def add(self, names: Sequence[str], rows: RoundInput, slots: Tensor) -> None:
        """Keeps a step's rows.

        Args:
            names: of the step's requests.
            rows: that were committed; nothing may write to them afterwards.
            slots: ``[T] int64`` where their keys and values belong.
        """
        self._names = tuple(names)
        self._rows.append((rows, slots))
        self._count += len(slots)

    def take(self) -> tuple[RoundInput, Tensor]:
        """All rows and their slots, and none are left; there must be some."""
        parts = [(rows.features, rows.next_tokens, rows.positions, slots) for rows, slots in self._rows]
        features, next_tokens, positions, slots = (torch.cat(part) for part in zip(*parts, strict=True))
        self._rows, self._count = [], 0
        return RoundInput(features, next_tokens, positions), slots
