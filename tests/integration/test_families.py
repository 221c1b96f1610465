"""Targets of several architectures, with trees and without: token for token the same, in fp32.

Their weights are random, so no head foresees them; an oracle (``reference/oracle.py``) hides the right tokens in trees
of every shape. A random head of fitting shape still runs beside it, and drafts by itself in one phase.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_targets import FAMILIES, VOCAB, write_fitting_head, write_target

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

#: Prompts that end inside, at and past blocks, and past the windows of sliding layers.
LENGTHS = (1, 3, 31, 32, 33, 64, 90, 150)
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 256,
    "max_num_seqs": 6,
    "kv_cache_memory_bytes": 1 << 26,
    "enable_prefix_caching": True,
    "skip_tokenizer_init": True,
    "seed": 0,
}
TREE = {"num_speculative_tokens": 20, "tree": {"depth": 6, "top_k": 4, "adaptive": False}}
#: Budgets that hold every prompt, for plain vLLM (see conftest), and that chunk prompts and cut trees.
PLAIN_TOKENS, TREE_TOKENS = 6 * 256, 100
FEW = 4
PHASES = ("greedy", "again", "seeded", "head", "mask")

Answers = dict[str, dict[str, Any]]


def requests(kind: str) -> list[dict[str, Any]]:
    """Random prompts; the texts are long enough to slide windows, and one runs into the model's maximum length."""
    rng = random.Random(5)
    sampling: dict[str, Any] = {"temperature": 0.0}
    if kind == "seeded":
        sampling = {"temperature": 0.9, "top_p": 0.9, "top_k": 40}
    made = []
    for i, length in enumerate(LENGTHS):
        prompt = [rng.randrange(3, VOCAB) for _ in range(length)]
        tokens = 4096 if length == max(LENGTHS) else 50
        seed = {"seed": 100 + i} if kind == "seeded" else {}
        made.append({"prompt": prompt, "sampling": sampling | {"max_tokens": tokens, "ignore_eos": True} | seed})
    return made


def jobs_of(family: str, folder: Path, first: int) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Plain vLLM, which is job number ``first``, and vLLM with trees."""
    target = write_target(folder / "target", FAMILIES[family])
    head = write_fitting_head(folder / "head", FAMILIES[family])
    engine = ENGINE | {"model": str(target)}
    speculative = {"method": "jakiro", "model": str(head), **TREE}
    greedy, seeded = {"requests": requests("greedy")}, {"requests": requests("seeded")}
    again = greedy | {"after": [first, 0]}
    fresh = {"fresh_cache": True}
    with_trees = {
        "greedy": greedy | fresh | {"oracle": [first, 0]},
        "again": again | {"oracle": [first, 1]},  # on blocks that speculation wrote
        "seeded": seeded | fresh | {"oracle": [first, 2]},
        "head": {"requests": requests("greedy")[:FEW]} | fresh,
        "mask": {"requests": requests("greedy")[:FEW]} | fresh | {"oracle": [first, 0], "sabotage": "mask"},
    }
    return [
        (engine | {"max_num_batched_tokens": PLAIN_TOKENS}, [greedy, again, seeded]),
        (
            engine | {"max_num_batched_tokens": TREE_TOKENS, "speculative_config": speculative},
            list(with_trees.values()),
        ),
    ]


@pytest.fixture(scope="module")
def answers(
    run_engines: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Answers, Answers]]:
    """Per family the answers of plain vLLM and of vLLM with trees, by phase."""
    jobs = []
    for family in FAMILIES:
        jobs += jobs_of(family, tmp_path_factory.mktemp("family"), len(jobs))
    found = run_engines(jobs)
    plain, trees = found[::2], found[1::2]
    return {
        family: (
            dict(zip(("greedy", "again", "seeded"), plain[i], strict=True)),
            dict(zip(PHASES, trees[i], strict=False)),
        )
        for i, family in enumerate(FAMILIES)
    }


def tokens(answer: dict[str, Any]) -> list[list[int]]:
    return [request["tokens"] for request in answer["requests"]]


@pytest.mark.parametrize("phase", ["greedy", "again", "seeded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_plain(answers: dict[str, tuple[Answers, Answers]], family: str, phase: str) -> None:
    plain, trees = answers[family]
    assert tokens(trees[phase]) == tokens(plain[phase])
    texts = tokens(plain[phase])
    assert sum(len(set(text)) for text in texts) > 0.2 * sum(map(len, texts)), "texts repeat one token"
    assert max(len(r) for r in texts) + max(LENGTHS) == ENGINE["max_model_len"] or phase == "again"


@pytest.mark.parametrize("phase", ["greedy", "again", "seeded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trees_were_really_used(answers: dict[str, tuple[Answers, Answers]], family: str, phase: str) -> None:
    seen = answers[family][1][phase]["acceptance"]
    assert seen["drafts"] > 100
    assert seen["accepted"] > seen["drafts"]
    assert seen["moved"] > 50
    assert seen["mixed"] > (2 if phase == "again" else 5)  # prefix hits leave few prompt chunks beside trees
    assert len(seen["by_depth"]) == TREE["tree"]["depth"] + 1, "some length of an accepted path was never seen"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_random_weights_changes_nothing(answers: dict[str, tuple[Answers, Answers]], family: str) -> None:
    plain, trees = answers[family]
    assert tokens(trees["head"]) == tokens(plain["greedy"])[:FEW]
    assert trees["head"]["acceptance"]["drafts"] > 100


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_mask_is_noticed(answers: dict[str, tuple[Answers, Answers]], family: str) -> None:
    plain, trees = answers[family]
    assert tokens(trees["mask"]) != tokens(plain["greedy"])[:FEW]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_speculation_wrote_are_hit(answers: dict[str, tuple[Answers, Answers]], family: str) -> None:
    expected, cached = ([request["cached"] for request in side["again"]["requests"]] for side in answers[family])
    assert cached == expected
    assert sum(cached) > 200
