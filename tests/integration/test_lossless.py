"""Token for token the same as plain vLLM, in fp32, and not by accident: every sabotage is noticed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "top_k": 50}
NUM_PROMPTS = 36
CONTROL_PROMPTS = 16

Requests = list[dict[str, Any]]


def first_round(source: list[int], definitions: list[list[int]], sampling: dict[str, Any]) -> Requests:
    """Prompts of 1 to 380 tokens that end in every way a request can end."""
    rng = random.Random(11)
    endings = (
        {"max_tokens": 90, "ignore_eos": True},
        {"max_tokens": 160},
        {"max_tokens": 120, "stop": ["return", "\n\n", "= "]},
        {"max_tokens": 4096, "ignore_eos": True},  # until the model's maximum length
        {"max_tokens": 1},
        {"max_tokens": 2},
        {"max_tokens": 70, "min_tokens": 50},
        {"max_tokens": 60, "logprobs": 3},
        {"max_tokens": 80, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"max_tokens": 40, "n": 2},
    )
    requests = []
    for i in range(NUM_PROMPTS):
        ending = dict(endings[i % len(endings)])
        length = rng.choice((1, 3, 17, 31, 32, 33, 64, 120, 250, 380))
        if ending["max_tokens"] == 4096:
            length = 380 + rng.randrange(100)
        start = rng.randrange(len(source) - length)
        seed = {"seed": 1000 + i} if sampling["temperature"] else {}
        if not seed and ending.get("n"):
            del ending["n"]  # vLLM refuses several greedy samples
        requests.append({"prompt": source[start : start + length], "sampling": sampling | ending | seed})
    for i, prompt in enumerate(definitions):
        seed = {"seed": 2000 + i} if sampling["temperature"] else {}
        requests.append({"prompt": prompt, "sampling": sampling | {"max_tokens": 64} | seed})
    return requests


def second_round(first: Requests, answers: Requests, source: list[int]) -> Requests:
    """Goes on where the first round ended: its prompts lie in blocks that speculation wrote."""
    requests = []
    for i, (request, answer) in enumerate(zip(first, answers, strict=True)):
        prompt = (request["prompt"] + answer["tokens"])[:400] + source[7 * i : 7 * i + 5]
        requests.append({"prompt": prompt, "sampling": request["sampling"] | {"max_tokens": 40, "min_tokens": 0}})
    return requests


@pytest.fixture(scope="module")
def workload(
    run_engine: Callable[..., Any],
    plain_engine: dict[str, Any],
    source_tokens: list[int],
    definitions: list[list[int]],
) -> dict[str, dict[str, Requests]]:
    """Both rounds and plain vLLM's answers, greedy and seeded."""
    rounds = {
        name: first_round(source_tokens, definitions, sampling)
        for name, sampling in (("greedy", GREEDY), ("seeded", SAMPLED))
    }
    firsts = run_engine(plain_engine, [{"requests": requests} for requests in rounds.values()])
    result = {}
    phases = []
    for (name, requests), answer in zip(rounds.items(), firsts, strict=True):
        follow = second_round(requests, answer["requests"], source_tokens)
        result[name] = {"first": requests, "second": follow, "first_answers": answer["requests"]}
        phases.append({"requests": follow, "fresh_cache": True})
    for name, answer in zip(rounds, run_engine(plain_engine, phases), strict=True):
        result[name]["second_answers"] = answer["requests"]
    return result


@pytest.fixture(scope="module")
def answers(
    run_engine: Callable[..., Any], jakiro_engine: dict[str, Any], workload: dict[str, dict[str, Requests]]
) -> dict[str, Any]:
    """What vLLM with trees says: both rounds, then the negative controls."""
    phases = {}
    for name in ("greedy", "seeded"):
        phases[name, "first"] = {"requests": workload[name]["first"], "fresh_cache": True}
        phases[name, "second"] = {"requests": workload[name]["second"]}
    for control in ("mask", "compaction", "positions"):
        phases["greedy", control] = {
            "requests": workload["greedy"]["first"][:CONTROL_PROMPTS],
            "fresh_cache": True,
            "sabotage": control,
        }
    found = run_engine(jakiro_engine, list(phases.values()))
    return dict(zip(phases, found, strict=False)) | {"end": found[-1]}


def differences(expected: Requests, found: Requests) -> list[int]:
    """Indices of requests whose tokens, samples, text or finish reason differ."""
    keys = ("tokens", "samples", "text", "finish", "stop_reason")
    pairs = zip(expected, found, strict=True)
    return [i for i, (a, b) in enumerate(pairs) if any(a[k] != b[k] for k in keys)]


@pytest.mark.parametrize("sampling", ["greedy", "seeded"])
@pytest.mark.parametrize("turn", ["first", "second"])
def test_same_tokens_as_plain(
    workload: dict[str, Any], answers: dict[Any, Any], jakiro_engine: dict[str, Any], sampling: str, turn: str
) -> None:
    requests, max_model_len = workload[sampling][turn], jakiro_engine["max_model_len"]
    expected, found = workload[sampling][f"{turn}_answers"], answers[sampling, turn]
    assert differences(expected, found["requests"]) == []
    if turn == "first":
        ends = {(r["finish"], r["stop_reason"]) for r in found["requests"] if len(r["tokens"]) > 4}
        assert ("length", None) in ends
        assert ("stop", None) in ends, "no request ended by the end-of-text token"
        assert any(isinstance(reason, str) for _, reason in ends), "no request ended by a stop string"
        lengths = [len(q["prompt"]) + len(r["tokens"]) for q, r in zip(requests, found["requests"], strict=True)]
        assert max(lengths) == max_model_len


@pytest.mark.parametrize("sampling", ["greedy", "seeded"])
def test_trees_were_really_used(answers: dict[Any, Any], sampling: str) -> None:
    for turn in ("first", "second"):
        seen = answers[sampling, turn]["acceptance"]
        assert seen["drafts"] > 300
        assert seen["accepted"] > 0.8 * seen["drafts"], "the head accepts almost nothing: the test proves little"
        assert seen["moved"] > 20, "no accepted path left the first branch: compaction was not tested"
        assert seen["mixed"] > 5, "no step mixed trees with other rows"


@pytest.mark.parametrize("sampling", ["greedy", "seeded"])
def test_second_round_hits_blocks_written_by_speculation(
    workload: dict[str, Any], answers: dict[Any, Any], sampling: str
) -> None:
    prompts = [len(request["prompt"]) for request in workload[sampling]["first"]]
    cached = [answer["cached"] for answer in answers[sampling, "second"]["requests"]]
    assert sum(hit > length for hit, length in zip(cached, prompts, strict=True)) > 10


@pytest.mark.parametrize("control", ["mask", "compaction", "positions"])
def test_sabotage_is_noticed(workload: dict[str, Any], answers: dict[Any, Any], control: str) -> None:
    expected = workload["greedy"]["first_answers"][:CONTROL_PROMPTS]
    assert differences(expected, answers["greedy", control]["requests"])


def test_logprobs_of_accepted_tokens(workload: dict[str, Any], answers: dict[Any, Any]) -> None:
    pairs = zip(workload["greedy"]["first_answers"], answers["greedy", "first"]["requests"], strict=True)
    compared = 0
    for plain, jakiro in pairs:
        if plain["logprobs"] is None:
            continue
        for a, b in zip(plain["logprobs"], jakiro["logprobs"], strict=True):
            assert a.keys() == b.keys()
            for token in a:
                # One row and many rows of fp32 round differently.
                assert abs(a[token] - b[token]) < 1e-3
                compared += 1
    assert compared > 300


def test_no_tree_outlives_its_request(answers: dict[Any, Any]) -> None:
    assert answers["end"]["live_trees"] <= 8  # those of the last step; the next step would drop them
