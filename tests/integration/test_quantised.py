"""Quantised targets in their published layouts, with trees and without.

int8 runs in fp32 on vLLM's CPU build, and gives the same tokens. The int4 layouts run in bf16 and fp16 only, where
forwards over one row and over many round differently: texts may part where two tokens are nearly equal, and only there.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_targets import QUANTISATIONS, VOCAB, Family, quantise_target, write_fitting_head, write_target

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

FAMILY = Family("llama", hidden=128)
DTYPES = {"w8a8": "float32", "w4a16": "float16", "awq": "bfloat16", "gptq": "float16"}
#: By how much less probable a token may be that rounding put first: two units in the last place of a logit between 8
#: and 16, which is as large as they get here.
NEAR_TIE = {"float32": 0.0, "float16": 2**-6, "bfloat16": 2**-3}
ENGINE = {
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 192,
    "max_num_seqs": 6,
    "kv_cache_memory_bytes": 1 << 26,
    "skip_tokenizer_init": True,
    "seed": 0,
}
TREE = {"num_speculative_tokens": 20, "tree": {"depth": 6, "top_k": 4, "adaptive": False}}
PHASES = ("greedy", "seeded", "mask")
LENGTHS = (1, 17, 32, 33, 64, 100)

Answers = dict[str, dict[str, Any]]


def requests(**sampling: Any) -> list[dict[str, Any]]:
    rng = random.Random(3)
    made = []
    for i, length in enumerate(LENGTHS):
        prompt = [rng.randrange(3, VOCAB) for _ in range(length)]
        seed = {"seed": 60 + i} if sampling["temperature"] else {}
        made.append({"prompt": prompt, "sampling": {"max_tokens": 40, "ignore_eos": True, **sampling, **seed}})
    return made


def jobs_of(kind: str, folder: Path, first: int) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Plain vLLM, which is job number ``first``, and vLLM with trees."""
    target = quantise_target(write_target(folder / "target", FAMILY), kind)
    head = write_fitting_head(folder / "head", FAMILY)
    engine = ENGINE | {"model": str(target), "dtype": DTYPES[kind]}
    greedy = {"requests": requests(temperature=0.0, logprobs=5)}
    seeded = {"requests": requests(temperature=0.9, top_p=0.9, top_k=40)}
    phases = [
        greedy | {"oracle": [first, 0]},
        seeded | {"oracle": [first, 1]},
        greedy | {"oracle": [first, 0], "sabotage": "mask"},
    ]
    trees = {"max_num_batched_tokens": 100, "speculative_config": {"method": "jakiro", "model": str(head), **TREE}}
    return [(engine | {"max_num_batched_tokens": 6 * 192}, [greedy, seeded]), (engine | trees, phases)]


@pytest.fixture(scope="module")
def answers(
    run_engines: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Answers, Answers]]:
    """Per layout the answers of plain vLLM and of vLLM with trees, by phase."""
    jobs = []
    for kind in QUANTISATIONS:
        jobs += jobs_of(kind, tmp_path_factory.mktemp(kind), len(jobs))
    found = run_engines(jobs)
    plain, trees = found[::2], found[1::2]
    return {
        kind: (dict(zip(PHASES, plain[i], strict=False)), dict(zip(PHASES, trees[i], strict=False)))
        for i, kind in enumerate(QUANTISATIONS)
    }


def partings(plain: dict[str, Any], trees: dict[str, Any]) -> list[float]:
    """For each text that parts from plain decoding's, how much less probable the other token was there."""
    found = []
    for expected, request in zip(plain["requests"], trees["requests"], strict=True):
        pairs = zip(expected["tokens"], request["tokens"], strict=True)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if at is not None:
            known = expected["logprobs"][at]
            best = known[str(expected["tokens"][at])]
            found.append(best - known.get(str(request["tokens"][at]), float("-inf")))
    return found


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_greedy_texts_part_at_near_ties_only(answers: dict[str, tuple[Answers, Answers]], kind: str) -> None:
    plain, trees = answers[kind]
    found = partings(plain["greedy"], trees["greedy"])
    assert all(gap <= NEAR_TIE[DTYPES[kind]] for gap in found), found
    assert len(found) <= len(LENGTHS) // 2


def test_int8_has_the_tokens_of_plain_decoding(answers: dict[str, tuple[Answers, Answers]]) -> None:
    plain, trees = answers["w8a8"]
    for phase in ("greedy", "seeded"):
        assert [r["tokens"] for r in trees[phase]["requests"]] == [r["tokens"] for r in plain[phase]["requests"]]


@pytest.mark.parametrize("phase", ["greedy", "seeded"])
@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_trees_were_really_used(answers: dict[str, tuple[Answers, Answers]], kind: str, phase: str) -> None:
    seen = answers[kind][1][phase]["acceptance"]
    assert seen["accepted"] > 100
    assert seen["moved"] > 30
    assert seen["mixed"] > 2


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_a_wrong_mask_is_noticed(answers: dict[str, tuple[Answers, Answers]], kind: str) -> None:
    plain, trees = answers[kind]
    found = partings(plain["greedy"], trees["mask"])
    assert sum(gap > NEAR_TIE[DTYPES[kind]] for gap in found) > len(LENGTHS) // 2
