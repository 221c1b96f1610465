"""Features of vLLM beside trees: the same answers, whether the request drafts or is served plainly.

Plain vLLM and vLLM with trees run in one process here, one after the other, which must not matter either.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_heads import published_head, write_head

#: One row of fp32 and many round differently.
LOGPROB_TOLERANCE = 1e-3

#: Texts that stand for the marks of a reasoning model; its budget forces the second.
THINK, ANSWER = "import os", "raise SystemExit"

FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "bad words": {"bad_words": ["self", " return"]},
    "allowed tokens": {"allowed_token_ids": list(range(5, 400))},
    "regex": {"structured": {"regex": r"[a-z]{3,8}\([0-9]{2}\)"}},
    "all logprobs": {"logprobs": -1, "max_tokens": 12},
    "prompt logprobs": {"prompt_logprobs": 1},
    "thinking budget": {"thinking_token_budget": 6},
    "stop token": {"stop_token_ids": list(range(300, 330))},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.4},
    "seeded": {"temperature": 1.0, "seed": 3},
    "seeded top-k": {"temperature": 0.7, "top_k": 20, "seed": 4},
    "min tokens": {"min_tokens": 20},
}


def workload(source: list[int], thinking: list[int]) -> list[dict[str, Any]]:
    """Every feature twice, interleaved, so that each stands beside requests with trees."""
    requests = []
    for i, settings in enumerate([*FEATURES.values()] * 2):
        start = 200 * i
        prompt = source[start : start + 20 + 3 * i]
        if "thinking_token_budget" in settings:
            prompt = prompt + thinking
        defaults = {"temperature": 0.0, "max_tokens": 60}
        requests.append({"prompt": prompt, "sampling": defaults | settings})
    return requests


#: Heads with random weights: they accept little, and must change nothing.
OTHER_HEADS: dict[str, dict[str, Any]] = {
    "four experts": {"variant": "jakiro", "num_experts": 4},
    "jakiro_star": {"variant": "jakiro_star", "file_format": "bin", "intermediate_size": 64},
    "dense": {"variant": "dense", "bias": False},
}


def random_head(folder: Path, variant: str, file_format: str = "safetensors", **options: Any) -> str:
    """Writes a head of the embedded target's sizes in the published layout."""
    return str(write_head(folder, *published_head(variant, hidden_size=256, **options), file_format))


@pytest.fixture(scope="module")
def answers(
    run_engines: Callable[..., Any],
    plain_engine: dict[str, Any],
    jakiro_engine: dict[str, Any],
    source_tokens: list[int],
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Both engines' answers: roomy, and with so few pages that requests are preempted."""
    extra = {"max_logprobs": -1, "reasoning_config": {"reasoning_start_str": THINK, "reasoning_end_str": ANSWER}}
    start = tokenizer(THINK, add_special_tokens=False)["input_ids"]
    phases = [{"requests": workload(source_tokens, start)}]
    long = [
        {
            "prompt": source_tokens[31 * i : 31 * i + 90],
            "sampling": {"temperature": 0.0, "max_tokens": 120, "ignore_eos": True},
        }
        for i in range(8)
    ]
    (plain,) = run_engines([(plain_engine | extra, [*phases, {"requests": long}])])
    tight = {"num_gpu_blocks_override": 24}  # eight requests want 56
    largest = {"num_speculative_tokens": 63, "tree": {"depth": 6, "top_k": 12}}
    speculation = jakiro_engine["speculative_config"]
    heads = [
        speculation | {"model": random_head(tmp_path_factory.mktemp("heads") / "head", **head)}
        for head in OTHER_HEADS.values()
    ]
    both = run_engines(
        [
            (plain_engine, [{"requests": long[:1]}]),
            (jakiro_engine | extra | {"speculative_config": speculation | largest}, phases),
            (jakiro_engine | tight, [{"requests": long}]),
            *((jakiro_engine | {"speculative_config": head}, [{"requests": long[:4]}]) for head in heads),
        ]
    )
    return {
        "other heads": {name: found[0]["requests"] for name, found in zip(OTHER_HEADS, both[3:], strict=True)},
        "plain": plain[0],
        "jakiro": both[1][0],
        "plain long": plain[1],
        "preempted": both[2][0],
    }


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
def test_same_answer(answers: dict[str, Any], feature: str) -> None:
    names = [*FEATURES] * 2
    compared = 0
    for name, plain, jakiro in zip(names, answers["plain"]["requests"], answers["jakiro"]["requests"], strict=True):
        if name != feature:
            continue
        assert jakiro["tokens"] == plain["tokens"]
        assert jakiro["text"] == plain["text"]
        assert (jakiro["finish"], jakiro["stop_reason"]) == (plain["finish"], plain["stop_reason"])
        if plain["prompt_logprobs"] is not None:
            difference = torch.tensor(plain["prompt_logprobs"]) - torch.tensor(jakiro["prompt_logprobs"])
            assert difference.abs().max() < LOGPROB_TOLERANCE
        if plain["logprobs"] is not None:
            for a, b in zip(plain["logprobs"], jakiro["logprobs"], strict=True):
                assert a.keys() == b.keys()
        compared += 1
    assert compared == 2


@pytest.mark.vllm
@pytest.mark.slow
def test_thinking_budget_was_enforced(answers: dict[str, Any]) -> None:
    names = [*FEATURES] * 2
    texts = [
        r["text"] for name, r in zip(names, answers["jakiro"]["requests"], strict=True) if name == "thinking budget"
    ]
    assert all(ANSWER in text for text in texts)


@pytest.mark.vllm
@pytest.mark.slow
def test_trees_stood_beside_them(answers: dict[str, Any]) -> None:
    assert answers["jakiro"]["acceptance"]["mixed"] > 5
    assert answers["jakiro"]["acceptance"]["accepted"] > 100


@pytest.mark.vllm
@pytest.mark.slow
def test_preempted_requests(answers: dict[str, Any]) -> None:
    plain, jakiro = answers["plain long"]["requests"], answers["preempted"]["requests"]
    assert [r["tokens"] for r in jakiro] == [r["tokens"] for r in plain]
    assert answers["preempted"]["acceptance"]["accepted"] > 100
    assert answers["preempted"]["acceptance"]["resumed"] > 0, "nothing was preempted: the test proves nothing"


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("head", OTHER_HEADS)
def test_other_heads(answers: dict[str, Any], head: str) -> None:
    found, plain = answers["other heads"][head], answers["plain long"]["requests"]
    assert [r["tokens"] for r in found] == [r["tokens"] for r in plain[:4]]
