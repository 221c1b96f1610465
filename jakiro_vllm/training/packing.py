"""Documents laid side by side into rows of equal length; which rows a step of training takes.

Shapes: R rows, L positions of a row, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jakiro_vllm.training.documents import Shard


class Place(NamedTuple):
    """Where a document lies in its row.

    Attributes:
        document: index in the shard.
        start: first position in the row.
        length: tokens that are in the row.
        prompt: how many of them were given, not generated.
    """

    document: int
    start: int
    length: int
    prompt: int


@dataclass(frozen=True)
class Batch:
    """Some rows as tensors.

    Attributes:
        tokens: ``[B, L] int64``, 0 where there is padding.
        segments: ``[B, L] int64`` document within the row, from 1; 0 where there is padding.
        positions: ``[B, L] int64`` from 0 in every document.
        places: documents of every row, in the order of their segments.
    """

    tokens: Tensor
    segments: Tensor
    positions: Tensor
    places: list[list[Place]]

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(self.tokens.to(device), self.segments.to(device), self.positions.to(device), self.places)


@dataclass(frozen=True)
class Rows:
    """Rows that become tensors when they are asked for.

    Attributes:
        shard: documents.
        length: L.
        places: documents of every row.
    """

    shard: Shard
    length: int
    places: list[list[Place]]

    def __len__(self) -> int:
        return len(self.places)

    def segments(self, chosen: Sequence[int]) -> Tensor:
        """``[B, L] int64`` of some rows, as in `Batch`."""
        segments = torch.zeros(len(chosen), self.length, dtype=torch.int64)
        for b, row in enumerate(chosen):
            for segment, place in enumerate(self.places[row], start=1):
                segments[b, place.start : place.start + place.length] = segment
        return segments

    def batch(self, chosen: Sequence[int]) -> Batch:
        """Some rows."""
        tokens, positions = (torch.zeros(len(chosen), self.length, dtype=torch.int64) for _ in range(2))
        for b, row in enumerate(chosen):
            for place in self.places[row]:
                span = slice(place.start, place.start + place.length)
                own = self.shard.document(place.document)[: place.length].astype(np.int64)
                tokens[b, span] = torch.from_numpy(own)
                positions[b, span] = torch.arange(place.length)
        return Batch(tokens, self.segments(chosen), positions, [self.places[row] for row in chosen])


def pack_rows(shard: Shard, length: int, order: np.ndarray | None = None, open_rows: int = 64) -> Rows:
    """Packs documents first-fit; a document longer than a row loses its end.

    Args:
        shard: documents.
        length: L.
        order: in which documents are placed; default theirs.
        open_rows: newest rows that are tried before a new one is begun. More pack tighter.

    Returns:
        The rows. No document is split, so each keeps its whole context.
    """
    sizes = np.minimum(np.diff(shard.offsets), length).tolist()
    used: list[int] = []
    places: list[list[Place]] = []
    for index in range(len(shard)) if order is None else order.tolist():
        size = sizes[index]
        if not size:
            continue
        row = next((r for r in range(max(0, len(used) - open_rows), len(used)) if used[r] + size <= length), len(used))
        if row == len(used):
            used.append(0)
            places.append([])
        places[row].append(Place(index, used[row], size, min(size, int(shard.prompt_lengths[index]))))
        used[row] += size
    return Rows(shard, length, places)


class Plan:
    """Which rows each step takes; a function of seed and step alone, so a run can be resumed anywhere.

    Every epoch packs another order. Epochs have equally many steps, although some orders pack tighter than
    others: the difference is a row or two, which an epoch leaves out or takes twice.
    """

    def __init__(self, shard: Shard, length: int, rows_per_step: int, seed: int) -> None:
        self.shard = shard
        self.length = length
        self.rows_per_step = rows_per_step
        self.seed = seed
        #: Rows of the documents' own order.
        self.num_rows = len(pack_rows(shard, length))
        self._epoch = lru_cache(maxsize=1)(self._pack)

    def step(self, step: int) -> tuple[Rows, list[int]]:
        """The rows of an epoch, and which of them a step takes."""
        steps = max(1, self.num_rows // self.rows_per_step)
        rows, order = self._epoch(step // steps)
        first = (step % steps) * self.rows_per_step
        return rows, [int(order[(first + i) % len(order)]) for i in range(self.rows_per_step)]

    def _pack(self, epoch: int) -> tuple[Rows, np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch))
        rows = pack_rows(self.shard, self.length, rng.permutation(len(self.shard)))
        # First-fit leaves short rows at the end of the order; mix them among the others.
        return rows, rng.permutation(len(rows))
