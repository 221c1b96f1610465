"""Acceptance figures, from tallies."""

from __future__ import annotations

import random

import pytest

from jakiro_vllm.integration.acceptance import Acceptance, Tally


def tally(*emitted: int) -> Tally:
    made = Tally()
    for count in emitted:
        made.add(count)
    return made


def test_lengths_and_depths() -> None:
    found = Acceptance([tally(1, 3), tally(4, 1, 1), Tally()])
    assert found.trees == 5
    assert found.length == pytest.approx(10 / 5), "a mean over forwards, not over prompts"
    assert found.depth_rates(4) == pytest.approx([2 / 5, 2 / 5, 1 / 5, 0])


def test_intervals_hold_the_truth_and_shrink() -> None:
    rng = random.Random(0)
    many = Acceptance([tally(*(rng.randint(1, 5) for _ in range(20))) for _ in range(200)])
    few = Acceptance(many.tallies[:10])
    low, high = many.interval()
    assert low < many.length < high
    assert low < 3 < high
    assert few.interval()[1] - few.interval()[0] > 2 * (high - low)
    assert many.interval() == many.interval()


def test_ratios_are_paired() -> None:
    """Prompts differ far more than runs do: paired, a small gain shows."""
    rng = random.Random(1)
    mean = [rng.choice([1, 6]) for _ in range(40)]
    base = Acceptance([tally(*[m] * 10) for m in mean])
    better = Acceptance([tally(*[m] * 9, m + 1) for m in mean])
    low, high = better.ratio_interval(base)
    assert 1 < low < better.length / base.length < high
    own = base.interval()
    assert own[0] < better.length < own[1], "unpaired it would not"
