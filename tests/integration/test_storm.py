"""A short storm against the real servers; ``benchmarks/storm.py`` runs long ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from jakiro_vllm.draft.registry import EMBEDDED_TARGET
from jakiro_vllm.storm.compare import Tally
from jakiro_vllm.storm.drive import counters, run_wave, settle, storm_cases, storm_servers
from jakiro_vllm.storm.margin import Judge

REQUESTS, SEED, CONCURRENCY = 120, 1, 12


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_storm_gets_the_tokens_of_plain_vllm_and_leaves_nothing(tmp_path: Path) -> None:
    cases, tally = storm_cases(SEED), Tally()
    with storm_servers(tmp_path) as servers:
        run_wave(servers, cases, range(REQUESTS), CONCURRENCY, tally, Judge(EMBEDDED_TARGET))
        left = settle(servers["trees"])
        seen = counters(servers["trees"])
    assert tally.differences == []
    assert tally.faults == []
    assert not any(left.values()), left
    # What the storm was to be made of really happened.
    assert tally.requests == REQUESTS
    assert tally.compared > REQUESTS / 2
    assert tally.beginnings
    assert tally.unseeded
    assert set(tally.fates) == {"finish", "cut", "abandon", "abort", "malformed"}
    assert tally.refused < REQUESTS / 20
    assert seen["preemptions"]
    assert seen["prefix_hits"]
    assert seen["accepted_tokens"] > seen["trees"] / 4
