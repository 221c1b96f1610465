"""Trees on two tensor-parallel ranks: the tokens of plain vLLM on two ranks, in fp32.

One rank would not do for comparison, because sums over the ranks round differently.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores"),
]

SESSION = Path(__file__).with_name("parallel_session.py")
#: Prompt lengths; the longest are processed in chunks beside trees.
LENGTHS = (1, 31, 120, 320)
ENGINE = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 1 << 26}
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "top_k": 50}

Phases = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def phases(source_tokens: list[int]) -> Phases:
    """What both engines are asked: greedy, seeded and unseeded requests together, and then to go on from there."""
    prompts = [source_tokens[731 * i : 731 * i + length] for i, length in enumerate(LENGTHS)]
    common = {"max_tokens": 24, "ignore_eos": True}
    greedy = [{"prompt": p, "sampling": common | {"temperature": 0.0}} for p in prompts]
    seeded = [{"prompt": p[1:] + p[:1], "sampling": common | SAMPLED | {"seed": i}} for i, p in enumerate(prompts)]
    unseeded = [{"prompt": p, "sampling": common | SAMPLED} for p in prompts[:2]]
    return {
        "first": {"requests": [*greedy, *seeded, *unseeded], "fresh_cache": True},
        "follow-up": {"continues": 0},
        "greedy": {"requests": greedy, "fresh_cache": True},
    }


@pytest.fixture(scope="module")
def plain(run_engines: Callable[..., Any], plain_engine: dict[str, Any], phases: Phases) -> dict[str, Any]:
    """Plain vLLM's answers."""
    return dict(zip(phases, run_engines([(plain_engine | ENGINE, list(phases.values()))], SESSION)[0], strict=True))


@pytest.fixture(scope="module")
def found(run_engines: Callable[..., Any], jakiro_engine: dict[str, Any], phases: Phases) -> dict[str, Any]:
    """Answers with trees, then those of engines that are broken in one place."""
    broken = {what: phases["greedy"] | {"sabotage": what} for what in ("mask", "sum", "other ranks' trees")}
    asked = phases | broken
    return dict(zip(asked, run_engines([(jakiro_engine | ENGINE, list(asked.values()))], SESSION)[0], strict=True))


def tokens(answer: dict[str, Any]) -> list[list[int]]:
    """Of all requests but the unseeded ones, which come last."""
    return [request["tokens"] for request in answer["requests"][: 2 * len(LENGTHS)]]


# What does not look at plain vLLM comes first, so that not one test alone waits for both engines.


@pytest.mark.parametrize("phase", ["first", "follow-up", "other ranks' trees"])
def test_ranks_verify_the_same(found: dict[str, Any], phase: str) -> None:
    """Trees, samples and accepted paths, step by step; unseeded requests too."""
    first, second = found[phase]["ranks"]
    assert {first["rank"], second["rank"]} == {0, 1}
    assert first["drafts"] > 0
    assert {k: v for k, v in first.items() if k != "rank"} == {k: v for k, v in second.items() if k != "rank"}


@pytest.mark.parametrize("phase", ["first", "follow-up"])
def test_trees_were_really_used(found: dict[str, Any], phase: str) -> None:
    seen = found[phase]["ranks"][0]
    assert seen["accepted"] > 0.8 * seen["drafts"], "the head accepts almost nothing: the test proves little"
    assert seen["moved"] > 5, "no accepted path left the first branch: compaction was not tested"
    assert seen["mixed"] > 0, "no step mixed trees with other rows"


def test_follow_up_hits_blocks_written_by_speculation(phases: Phases, found: dict[str, Any]) -> None:
    pairs = zip(phases["first"]["requests"], found["follow-up"]["requests"], strict=True)
    assert any(answer["cached"] > len(request["prompt"]) for request, answer in pairs)


@pytest.mark.parametrize("phase", ["first", "follow-up", "greedy"])
def test_same_tokens_as_plain(plain: dict[str, Any], found: dict[str, Any], phase: str) -> None:
    assert tokens(found[phase]) == tokens(plain[phase])


def test_a_missing_mask_is_noticed(plain: dict[str, Any], found: dict[str, Any]) -> None:
    assert tokens(found["mask"]) != tokens(plain["greedy"])


def test_a_head_without_the_sum_over_the_ranks_foresees_less(plain: dict[str, Any], found: dict[str, Any]) -> None:
    """So the ranks' parts of the head are one head; what it drafts never changes a token."""
    assert tokens(found["sum"]) == tokens(plain["greedy"])
    whole, parts = found["greedy"]["ranks"][0], found["sum"]["ranks"][0]
    assert parts["accepted"] / parts["drafts"] < whole["accepted"] / whole["drafts"]


def test_ranks_that_grow_other_trees_verify_the_first_ranks(plain: dict[str, Any], found: dict[str, Any]) -> None:
    assert tokens(found["other ranks' trees"]) == tokens(plain["greedy"])
    assert found["other ranks' trees"]["ranks"][0]["accepted"] > 0


def test_ranks_adapt_as_one(
    run_engines: Callable[..., Any], jakiro_engine: dict[str, Any], phases: Phases, plain: dict[str, Any]
) -> None:
    """Each rank has a clock of its own, but all grow and verify what the first one plans."""
    speculative = jakiro_engine["speculative_config"]
    adaptive = {"speculative_config": speculative | {"tree": speculative["tree"] | {"adaptive": True}}}
    asked = [phases["first"], phases["follow-up"], phases["greedy"]]
    answers = run_engines([(jakiro_engine | ENGINE | adaptive, asked)], SESSION)[0]
    for name, answer in zip(phases, answers, strict=True):
        assert tokens(answer) == tokens(plain[name])
        first, second = answer["ranks"]
        assert first["accepted"] > 0
        assert {k: v for k, v in first.items() if k != "rank"} == {k: v for k, v in second.items() if k != "rank"}
    assert answers[-1]["ranks"][0]["plans"] > 0, "nothing was planned: the test proves little"


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_executor(
    run_engines: Callable[..., Any], jakiro_engine: dict[str, Any], phases: Phases, plain: dict[str, Any]
) -> None:
    """vLLM's CPU platform has no name for its devices that Ray knows, so the session gives it one."""
    engine = jakiro_engine | ENGINE | {"distributed_executor_backend": "ray"}
    asked = [phases["greedy"], phases["greedy"] | {"sabotage": "mask"}]
    answer, broken = run_engines([(engine, asked)], SESSION)[0]
    assert tokens(answer) == tokens(plain["greedy"])
    assert tokens(broken) != tokens(plain["greedy"])
    assert answer["ranks"][0]["accepted"] > 0
    assert answer["ranks"][0]["digest"] == answer["ranks"][1]["digest"]
