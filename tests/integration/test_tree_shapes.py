"""Trees of hostile shapes on the embedded pair, as large and as deep as trees may be: plain vLLM's tokens, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from oracle import SHAPES

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 0.8, "top_p": 0.9, "top_k": 50}
#: What changes the distribution along a path, and what ends one.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"max_tokens": 48, "ignore_eos": True},
    {"max_tokens": 40, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"max_tokens": 48, "stop": ["\n\n", "= "]},
    {"max_tokens": 48, "min_tokens": 20},
    {"max_tokens": 4096, "ignore_eos": True},  # until the model's maximum length
    {"max_tokens": 40, "logprobs": 2, "ignore_eos": True},
)
PROMPTS = (9, 32, 60, 100, 470, 150)
PHASES = [(sampling, shape) for sampling in ("greedy", "seeded") for shape in SHAPES]


def requests(source: list[int], sampling: dict[str, Any]) -> list[dict[str, Any]]:
    """One prompt for each of the settings."""
    made = []
    for i, (length, settings) in enumerate(zip(PROMPTS, SETTINGS, strict=True)):
        seed = {"seed": 40 + i} if sampling["temperature"] else {}
        made.append({"prompt": source[500 * i : 500 * i + length], "sampling": sampling | settings | seed})
    return made


@pytest.fixture(scope="module")
def answers(
    run_engines: Callable[..., Any],
    plain_engine: dict[str, Any],
    jakiro_engine: dict[str, Any],
    source_tokens: list[int],
) -> tuple[dict[str, Any], dict[tuple[str, str], Any]]:
    """Plain vLLM's answers by sampling, and those of vLLM with trees by sampling and shape."""
    asked = {"greedy": requests(source_tokens, GREEDY), "seeded": requests(source_tokens, SEEDED)}
    largest = jakiro_engine["speculative_config"] | {
        "num_speculative_tokens": 63,
        "tree": {"depth": 16, "top_k": 3, "adaptive": False},
    }
    phases = [
        {
            "requests": asked[sampling],
            "oracle": [0, list(asked).index(sampling)],
            "shapes": [shape],
            "fresh_cache": True,
        }
        for sampling, shape in PHASES
    ]
    jobs = [
        (plain_engine, [{"requests": found} for found in asked.values()]),
        (jakiro_engine | {"max_num_batched_tokens": 256, "speculative_config": largest}, phases),
    ]
    plain, trees = run_engines(jobs)
    return dict(zip(asked, plain, strict=True)), dict(zip(PHASES, trees, strict=False))


@pytest.mark.parametrize(("sampling", "shape"), PHASES)
def test_same_tokens_as_plain(
    answers: tuple[dict[str, Any], dict[tuple[str, str], Any]], sampling: str, shape: str
) -> None:
    plain, trees = answers[0][sampling]["requests"], answers[1][sampling, shape]["requests"]
    for a, b in zip(plain, trees, strict=True):
        for key in ("tokens", "text", "finish", "stop_reason"):
            assert a[key] == b[key]


def test_shapes_were_what_they_are_called(answers: tuple[dict[str, Any], dict[tuple[str, str], Any]]) -> None:
    seen = {shape: answers[1]["greedy", shape]["acceptance"] for shape in SHAPES}
    lengths = {shape: {int(depth) for depth in counts["by_depth"]} for shape, counts in seen.items()}
    assert lengths["wrong"] == {0}
    assert lengths["single"] <= {0, 1}
    assert lengths["wide"] <= {0, 1}
    assert 16 in lengths["deep"]
    assert len(lengths["hidden"]) > 8
    assert seen["twins"]["accepted"] > 2 * seen["twins"]["drafts"]
    for shape in ("hidden", "wide", "twins"):
        assert seen[shape]["moved"] > 50
