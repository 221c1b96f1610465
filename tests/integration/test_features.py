"""Features of vLLM beside trees: the same answers, whether the request drafts or is served plainly.

Plain vLLM and vLLM with trees run in one process here, one after the other, which must not matter either. All features
stand beside each other in one batch, in a KV cache so small that requests are preempted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from published_heads import published_head, write_head

from jakiro_vllm.demo import PROMPTS

#: One row of fp32 and many round differently.
LOGPROB_TOLERANCE = 1e-3

#: Texts that stand for the marks of a reasoning model; its budget forces the second.
THINK, ANSWER = "import os", "raise SystemExit"

Answer = dict[str, Any]
SAMPLINGS = {"greedy": {"temperature": 0.0}, "seeded": {"temperature": 0.8}}
BOTH = tuple(SAMPLINGS)


def tokens_differ(answer: Answer, without: Answer) -> bool:
    return answer["tokens"] != without["tokens"]


def parsed(answer: Answer) -> Any:
    """The text as JSON; None where it is none, as where it was cut short."""
    try:
        return json.loads(answer["text"])
    except ValueError:
        return None


@dataclass(frozen=True)
class Feature:
    """What a request asks for.

    Attributes:
        sampling: its parameters.
        effect: whether it did something to plain vLLM's answer, given another without it; for one of its prompts at
            least, or the comparison proves nothing.
        trees: whether such a request gets trees; None where it depends on what the grammar leaves of them.
        samplings: of ``SAMPLINGS``.
        prompts: of ``prompts``.
    """

    sampling: dict[str, Any] = field(default_factory=dict)
    effect: Callable[[Answer, Answer], bool] = tokens_differ
    trees: bool | None = True
    samplings: tuple[str, ...] = BOTH
    prompts: str = "code"


def structured(effect: Callable[[Answer, Answer], bool], **constraint: Any) -> Feature:
    return Feature({"structured_outputs": constraint}, effect, trees=None)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "count": {"type": "integer", "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<call>", "schema": SCHEMA, "end": "</call>"}],
    "triggers": ["<call>"],
}

FEATURES: dict[str, Feature] = {
    "nothing": Feature(effect=lambda answer, _: answer["finish"] == "length"),
    "temperature": Feature({"temperature": 1.4}, samplings=("seeded",)),
    "top_k": Feature({"top_k": 3}, samplings=("seeded",)),
    "top_p": Feature({"top_p": 0.5}, samplings=("seeded",)),
    "seed": Feature({"seed": 77}, samplings=("seeded",)),
    "n": Feature({"n": 3}, lambda answer, _: len({str(s) for s in answer["samples"]}) == 3, samplings=("seeded",)),
    "stop_strings": Feature({"stop": ["return", "\n\n", "= "]}, lambda a, _: isinstance(a["stop_reason"], str)),
    "stop_string_kept": Feature(
        {"stop": ["self", "("], "include_stop_str_in_output": True}, lambda a, _: a["text"].endswith(("self", "("))
    ),
    "stop_token_ids": Feature({"stop_token_ids": [*range(260, 330)]}, lambda a, _: isinstance(a["stop_reason"], int)),
    "end_of_text": Feature(
        {"max_tokens": 60}, lambda a, _: (a["finish"], a["stop_reason"]) == ("stop", None), prompts="definitions"
    ),
    "ignore_eos": Feature(
        {"max_tokens": 60, "ignore_eos": True},
        lambda a, b: a["finish"] == "length" and b["finish"] == "stop",
        prompts="definitions",
    ),
    "min_tokens": Feature({"min_tokens": 15, "stop_token_ids": [*range(260, 330)]}),
    "min_tokens_before_stop_string": Feature({"min_tokens": 15, "stop": ["self", "="]}),
    "max_tokens": Feature({"max_tokens": 7}, lambda answer, _: len(answer["tokens"]) == 7),
    "one_token": Feature({"max_tokens": 1}, lambda answer, _: len(answer["tokens"]) == 1, trees=False),
    "repetition_penalty": Feature({"repetition_penalty": 1.3}),
    "presence_penalty": Feature({"presence_penalty": 1.0}),
    "frequency_penalty": Feature({"frequency_penalty": 0.7}),
    "all_penalties": Feature({"repetition_penalty": 0.9, "presence_penalty": -0.3, "frequency_penalty": 0.9}),
    "bad_words": Feature({"bad_words": ["self", " return", "    def", " ="]}),
    "allowed_token_ids": Feature({"allowed_token_ids": [*range(5, 400)]}),
    "logprobs": Feature({"logprobs": 3}, lambda answer, _: len(answer["logprobs"][0]) >= 3),
    "all_logprobs": Feature({"logprobs": -1, "max_tokens": 8}, lambda answer, _: len(answer["logprobs"][0]) > 1000),
    "prompt_logprobs": Feature({"prompt_logprobs": 1}, lambda answer, _: len(answer["prompt_logprobs"]) > 10),
    "thinking_token_budget": Feature(
        {"thinking_token_budget": 6}, lambda answer, _: ANSWER in answer["text"], trees=False, prompts="thinking"
    ),
    "structured_regex": structured(lambda answer, _: answer["text"].endswith(")"), regex=r"[a-z]{3,8}\([0-9]{2}\)"),
    "structured_choice": structured(
        lambda a, _: a["text"].startswith("return "), choice=["return self.items", "return None"]
    ),
    "structured_json": structured(lambda answer, _: "count" in (parsed(answer) or ()), json=SCHEMA),
    "structured_json_object": structured(lambda answer, _: answer["text"].lstrip().startswith("{"), json_object=True),
    "structured_grammar": structured(
        lambda answer, _: answer["text"].startswith("SELECT "),
        grammar='root ::= "SELECT " [a-z]{1,6} " FROM " [a-z]{1,6}',
    ),
    "structured_tag": structured(lambda answer, _: True, structural_tag=json.dumps(TAG)),
    "chunked_prefill": Feature(effect=lambda answer, _: True, prompts="longer than a step"),
    "long_prompt": Feature(effect=lambda answer, _: True, prompts="many blocks"),
    "maximum_length": Feature(
        {"max_tokens": 4096, "ignore_eos": True}, lambda a, _: len(a["tokens"]) < 4096, prompts="near the end"
    ),
}
CASES = [(name, sampling) for name, feature in FEATURES.items() for sampling in feature.samplings]


@pytest.fixture(scope="module")
def prompts(source_tokens: list[int], definitions: list[list[int]], tokenizer: Any) -> dict[str, list[list[int]]]:
    """Some of each kind."""

    def source(start: int, length: int) -> list[int]:
        return source_tokens[start : start + length]

    think = tokenizer(THINK, add_special_tokens=False)["input_ids"]
    return {
        "code": [tokenizer(PROMPTS[name], add_special_tokens=False)["input_ids"] for name in ("stack", "retry")],
        "definitions": definitions[15:18],
        "thinking": [source(900, 20) + think, source(1300, 31) + think],
        "longer than a step": [source(5000, 300), source(6000, 340)],
        "many blocks": [source(7000, 450), source(8000, 421)],
        "near the end": [source(9000, 480), source(9700, 497)],
    }


def requests_of(name: str, sampling: str, prompts: dict[str, list[list[int]]]) -> list[dict[str, Any]]:
    feature = FEATURES[name]
    defaults = {"max_tokens": 40, **SAMPLINGS[sampling]}
    found = []
    for i, prompt in enumerate(prompts[feature.prompts]):
        seed = {"seed": 3 + i} if sampling == "seeded" else {}
        if seed and feature.prompts == "definitions":
            seed["temperature"] = 0.02  # else the target hardly finds an end
        found.append({"prompt": prompt, "sampling": defaults | seed | feature.sampling})
    return found


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
    prompts: dict[str, list[list[int]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Both engines' answers, by case; and those of other heads, with small trees and the largest."""
    by_case = {case: requests_of(*case, prompts) for case in CASES}
    requests = [request for group in by_case.values() for request in group]
    # Neighbours differ, so that steps mix trees with what is served plainly.
    order = sorted(range(len(requests)), key=lambda i: (i % 7, i))
    mixed = {"requests": [requests[i] for i in order]}
    cached = [
        {
            "requests": [
                {"prompt": source_tokens[2000:end], "sampling": {"temperature": 0.8, "seed": 5, "max_tokens": 20}}
            ]
        }
        for end in (2100, 2130)
    ]
    long = [
        {
            "prompt": source_tokens[31 * i : 31 * i + 90],
            "sampling": SAMPLINGS[BOTH[i % 2]] | {"seed": i, "max_tokens": 120, "ignore_eos": True},
        }
        for i in range(8)
    ]
    phases = [mixed, *cached, {"requests": long}]
    extra = {"max_logprobs": -1, "reasoning_config": {"reasoning_start_str": THINK, "reasoning_end_str": ANSWER}}
    extra["structured_outputs_config"] = {
        "backend": "xgrammar",
        "disable_any_whitespace": True,
    }  # of which the target would never tire
    tight = {"num_gpu_blocks_override": 32}  # eight long requests want 56
    speculation = jakiro_engine["speculative_config"]
    heads = [
        speculation | {"model": random_head(tmp_path_factory.mktemp("heads") / "head", **head)}
        for head in OTHER_HEADS.values()
    ]
    heads[0] |= {"num_speculative_tokens": 63, "tree": {"depth": 6, "top_k": 12, "adaptive": False}}
    plain, jakiro, *others = run_engines(
        [
            (plain_engine | extra, phases),
            (jakiro_engine | extra | tight, phases),
            *((jakiro_engine | {"speculative_config": head}, [{"requests": long[:4]}]) for head in heads),
        ]
    )

    def sorted_out(answer: dict[str, Any]) -> dict[tuple[str, str], list[Answer]]:
        found = dict(zip(order, answer["requests"], strict=True))
        in_order = iter(found[i] for i in range(len(requests)))
        return {case: [next(in_order) for _ in group] for case, group in by_case.items()}

    return {
        "plain": sorted_out(plain[0]),
        "jakiro": sorted_out(jakiro[0]),
        "mixed": jakiro[0]["acceptance"],
        "cached": (plain[1:3], jakiro[1:3]),
        "long": (plain[3], jakiro[3]),
        "other heads": {name: found[0]["requests"] for name, found in zip(OTHER_HEADS, others, strict=True)},
    }


def same(plain: Answer, jakiro: Answer) -> None:
    """Everything that a user is told."""
    for what in ("tokens", "samples", "text", "finish", "stop_reason"):
        assert jakiro[what] == plain[what]
    if plain["prompt_logprobs"] is not None:
        difference = torch.tensor(plain["prompt_logprobs"]) - torch.tensor(jakiro["prompt_logprobs"])
        assert difference.abs().max() < LOGPROB_TOLERANCE
    if plain["logprobs"] is not None:
        for a, b in zip(plain["logprobs"], jakiro["logprobs"], strict=True):
            assert a.keys() == b.keys()
            known = [token for token in a if a[token] > -torch.inf]
            assert all(abs(a[token] - b[token]) < LOGPROB_TOLERANCE for token in known)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(("name", "sampling"), CASES, ids=["-".join(case) for case in CASES])
def test_feature(answers: dict[str, Any], name: str, sampling: str) -> None:
    feature = FEATURES[name]
    without = "end_of_text" if feature.prompts == "definitions" else "nothing"
    plain, jakiro = (answers[side][name, sampling] for side in ("plain", "jakiro"))
    for a, b in zip(plain, jakiro, strict=True):
        same(a, b)
    pairs = zip(plain, answers["plain"][without, sampling], strict=True)
    assert any([feature.effect(*pair) for pair in pairs]), "the same as without the feature: nothing is proved"
    if feature.trees is not None:
        assert {bool(answer["trees"]) for answer in jakiro} == {feature.trees}


@pytest.mark.vllm
@pytest.mark.slow
def test_trees_stood_beside_them(answers: dict[str, Any]) -> None:
    assert answers["mixed"]["mixed"] > 50
    assert answers["mixed"]["accepted"] > 1000
    assert answers["mixed"]["resumed"] > 0, "no feature was preempted"


@pytest.mark.vllm
@pytest.mark.slow
def test_prefix_caching(answers: dict[str, Any]) -> None:
    for plain, jakiro in zip(*answers["cached"], strict=True):
        same(plain["requests"][0], jakiro["requests"][0])
    assert jakiro["requests"][0]["cached"] >= 96
    assert jakiro["requests"][0]["trees"] > 0


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_preemption(answers: dict[str, Any], sampling: str) -> None:
    plain, jakiro = answers["long"]
    first = BOTH.index(sampling)
    for a, b in zip(plain["requests"][first::2], jakiro["requests"][first::2], strict=True):
        same(a, b)
        assert b["trees"] > 0
    assert jakiro["acceptance"]["accepted"] > 100
    assert jakiro["acceptance"]["resumed"] > 0, "nothing was preempted: the test proves nothing"


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("head", OTHER_HEADS)
def test_other_heads(answers: dict[str, Any], head: str) -> None:
    found, plain = answers["other heads"][head], answers["long"][0]["requests"]
    assert [r["tokens"] for r in found] == [r["tokens"] for r in plain[:4]]
