"""Drafts from a request's own text, in turn with the head's: plain vLLM's tokens, by verification only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

#: Every change from one source to another, and all in one batch.
SOURCES = "TTHBBT-B-HHTBT--T"
TOKENS = 120
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.7, "top_p": 0.9},
    "penalised": {"temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.3},
}


@pytest.fixture(scope="module")
def phases(source_tokens: list[int]) -> dict[str, dict[str, Any]]:
    """Prompts that repeat themselves or not, of which some end early."""
    found = {}
    for name, sampling in SAMPLINGS.items():
        requests = []
        for i in range(12):
            prompt = source_tokens[97 * i : 97 * i + (1, 20, 60, 130)[i % 4]]
            limits = {"max_tokens": TOKENS - 7 * i, "ignore_eos": True}
            seed = {"seed": i} if sampling["temperature"] else {}
            requests.append({"prompt": prompt * (1 + i % 3), "sampling": sampling | limits | seed})
        found[name] = {"requests": requests, "fresh_cache": True}
    return found


@pytest.fixture(scope="module")
def answers(
    run_engine: Callable[..., Any],
    plain_engine: dict[str, Any],
    jakiro_engine: dict[str, Any],
    phases: dict[str, dict[str, Any]],
) -> dict[Any, Any]:
    """Plain vLLM's, then those with drafts from everywhere, and without verification."""
    plain = run_engine(plain_engine, list(phases.values()))
    adaptive = {**jakiro_engine["speculative_config"], "tree": {"depth": 6, "top_k": 8}}
    asked = [phase | {"sources": SOURCES} for phase in phases.values()]
    asked += [phases["greedy"] | {"sources": source, "sabotage": "verification"} for source in "TH"]
    asked.append(phases["seeded"] | {"sources": "T"})
    found = run_engine(jakiro_engine | {"speculative_config": adaptive}, asked)
    names = [("ours", name) for name in phases] + [("believed", "T"), ("believed", "H"), ("ours", "text only")]
    return {("plain", name): answer for name, answer in zip(phases, plain, strict=False)} | dict(
        zip(names, found, strict=False)
    )


def tokens(answer: dict[str, Any]) -> list[list[int]]:
    return [request["tokens"] for request in answer["requests"]]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_same_tokens_as_plain(answers: dict[Any, Any], sampling: str) -> None:
    assert tokens(answers["ours", sampling]) == tokens(answers["plain", sampling])


def test_same_tokens_without_the_head(answers: dict[Any, Any]) -> None:
    assert tokens(answers["ours", "text only"]) == tokens(answers["plain", "seeded"])


def test_continuations_were_really_verified(answers: dict[Any, Any]) -> None:
    """Some are right to the last of their tokens, deeper than any tree of the head, and some are wrong at once."""
    seen = answers["ours", "text only"]["acceptance"]
    assert seen["drafts"] > 100
    assert seen["moved"] == 0  # a chain lies where it belongs
    by_depth = {int(depth): count for depth, count in seen["by_depth"].items()}
    assert by_depth[0] > 10
    assert sum(count for depth, count in by_depth.items() if depth > 6) > 10
    for sampling in SAMPLINGS:
        mixed = answers["ours", sampling]["acceptance"]
        assert mixed["moved"] > 5
        assert mixed["mixed"] > 5


@pytest.mark.parametrize("source", ["T", "H"])
def test_control_unverified_drafts_are_noticed(answers: dict[Any, Any], source: str) -> None:
    assert tokens(answers["believed", source]) != tokens(answers["plain", "greedy"])
