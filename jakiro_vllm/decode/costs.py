"""What a step costs: seconds by rows and by requests, learnt from what steps took.

K knots of a table.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]


class RowTimes:
    """Seconds that a computation takes, by rows: lines between knots, and beyond the last one its proportion."""

    #: How far one measurement moves the table towards itself, and the factor in rows at which 1/e of that is left.
    RATE, REACH = 0.15, 5.0
    #: A measurement further from the estimate than this factor counts as if it were this far: machines stall.
    FURTHEST = 2.0

    def __init__(self, rows: Sequence[int], seconds: Sequence[float]) -> None:
        """Takes measurements.

        Args:
            rows: ``[K]`` ascending, at least one.
            seconds: ``[K]`` positive.
        """
        self.rows = np.asarray(rows, dtype=np.float64)
        self._log_rows = np.log(self.rows)
        self._logs = np.log(np.asarray(seconds, dtype=np.float64))
        self._seconds: Floats | None = None

    @property
    def seconds(self) -> Floats:
        """``[K]`` at the knots: what is nearest to the measurements and never falls (isotonic regression)."""
        if self._seconds is None:
            self._seconds = np.exp(_rising(self._logs.tolist()))
        return self._seconds

    def __call__(self, rows: ArrayLike) -> Floats:
        """Seconds for any numbers of rows."""
        numbers = np.asarray(rows, dtype=np.float64)
        return np.interp(numbers, self.rows, self.seconds) * np.maximum(numbers / self.rows[-1], 1.0)

    def learn(self, rows: int, seconds: float) -> None:
        """Moves the table towards a measurement."""
        off = min(max(seconds / float(self(rows)), 1 / self.FURTHEST), self.FURTHEST)
        distance = np.abs(math.log(max(rows, 1)) - self._log_rows) / math.log(self.REACH)
        self._logs += self.RATE * math.log(off) * np.exp(-distance)
        self._seconds = None


def _rising(values: list[float]) -> list[float]:
    """The numbers that never fall and are nearest to the given ones, in squares: neighbours that fall are averaged."""
    blocks: list[tuple[float, int]] = []  # mean, how many
    for value in values:
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            before, more = blocks.pop()
            mean, count = (before * more + mean * count) / (more + count), more + count
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]


def about(count: int) -> int:
    """The last power of two, or one and a half times one, up to a count: loads that hardly differ have it in common."""
    step = 1 << max(0, count.bit_length() - 2)
    return count // step * step


class Source(IntEnum):
    """Where the drafts of a step come from."""

    NONE = 0
    HEAD = 1
    TEXT = 2


class HostTimes:
    """Seconds of a step outside the target's forward and the draft, by the drafts' source and the number of requests.

    Medians of the latest, since servers wait. What was not measured lately takes as long as what is most like it, so
    that nothing stays out of the question because it once took long.
    """

    #: Measurements that count, and steps after which they are forgotten.
    LATEST, LATELY = 33, 1024
    #: How unlike two sources are, in octaves of requests: drafts are more like each other than like none.
    UNLIKE = ((0.0, 2.0, 2.0), (2.0, 0.0, 1.0), (2.0, 1.0, 0.0))

    def __init__(self) -> None:
        self._seen: dict[tuple[Source, int], deque[float]] = {}
        self._latest: dict[tuple[Source, int], int] = {}
        self._steps = 0
        self._found: dict[tuple[Source, int], float] = {}

    def learn(self, source: Source, requests: int, seconds: float) -> None:
        """Takes a measurement."""
        key = source, about(requests)
        self._steps += 1
        self._seen.setdefault(key, deque(maxlen=self.LATEST)).append(seconds)
        self._latest[key] = self._steps
        self._found.clear()

    def __call__(self, source: Source, requests: int) -> float:
        """Seconds for so many requests; 0 if nothing was ever measured."""
        key = source, about(requests)
        found = self._found.get(key)
        if found is None:
            known = [other for other, step in self._latest.items() if self._steps - step < self.LATELY]
            like = min(known, key=lambda other: self._unlike(key, other), default=None)
            found = self._found[key] = 0.0 if like is None else statistics.median(self._seen[like])
        return found

    def _unlike(self, one: tuple[Source, int], other: tuple[Source, int]) -> float:
        return self.UNLIKE[one[0]][other[0]] + abs(math.log2(one[1] / other[1]))
