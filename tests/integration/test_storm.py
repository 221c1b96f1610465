"""A short storm against the real servers; ``benchmarks/storm.py`` runs long ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from jakiro_vllm.draft.registry import EMBEDDED_TARGET
from jakiro_vllm.server import Server
from jakiro_vllm.storm.cases import Case
from jakiro_vllm.storm.compare import TIE, Tally
from jakiro_vllm.storm.drive import counters, plain_answers, run_wave, settle, storm_cases, storm_servers
from jakiro_vllm.storm.margin import Judge, score_lead

REQUESTS, SEED, CONCURRENCY = 120, 1, 12


def judge_agrees(judge: Judge, servers: dict[str, Server], cases: list[Case]) -> int:
    """The judge would have taken plain vLLM's tokens, noise and penalties included; returns how often it was asked."""
    # It knows nothing of these, or looks at the edges of what they keep only.
    unknown = {"structured_outputs", "response_format", "bad_words", "min_tokens", "top_k", "top_p"}
    chosen = [c for c in cases if c.exact and not unknown & set(c.fields) and (c.max_tokens or 99) < 30][:16]
    answers = plain_answers(servers, chosen, CONCURRENCY)
    asked = 0
    for case in chosen:
        for index, choice in answers[case.key].choices.items():
            for position, token in list(enumerate(choice.tokens))[::3]:
                logits = judge.logits(case, choice.prompt, choice.tokens[:position])
                for rival in set(logits.topk(3).indices.tolist()) - {token}:
                    assert score_lead(case, index, logits, position, token, rival) > -TIE, (case, position, rival)
                    asked += 1
    assert any(not case.greedy for case in chosen)
    return asked


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_storm_gets_the_tokens_of_plain_vllm_and_leaves_nothing(tmp_path: Path) -> None:
    cases, tally = storm_cases(SEED), Tally()
    judge = Judge(EMBEDDED_TARGET)
    with storm_servers(tmp_path) as servers:
        run_wave(servers, cases, range(REQUESTS), CONCURRENCY, tally, judge)
        judged = judge_agrees(judge, servers, [cases.case(index) for index in range(REQUESTS)])
        left = settle(servers["trees"])
        seen = counters(servers["trees"])
    assert tally.differences == []
    assert tally.faults == []
    assert not any(left.values()), left
    assert judged > 60
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
