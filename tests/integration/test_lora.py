"""LoRA adapters on the target, several and none in one batch: the tokens of plain vLLM with the same adapters."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_targets import ATTENTION, EVERYTHING, FAMILIES, VOCAB, write_adapter, write_fitting_head, write_target

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

FAMILY = FAMILIES["llama GQA"]
#: One changes the embedding and the LM head, which the draft head shares with the target.
ADAPTERS = {"attention1": ATTENTION, "everything2": EVERYTHING, "mlp3": ("gate_proj", "up_proj", "down_proj")}
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
    "enable_lora": True,
    # One slot stays empty: on a CPU, vLLM 0.32 gives requests without an adapter what the last slot holds.
    "max_loras": 4,
    "max_lora_rank": 8,
}
#: A budget that holds every prompt, for plain vLLM (see conftest), and the least that vLLM takes with LoRA and trees.
PLAIN_TOKENS, TREE_TOKENS = 6 * 256, 6 * 21
PHASES = ("greedy", "again", "seeded", "base only", "head", "mask")
LENGTHS = (1, 17, 40, 64, 100, 33, 8, 180, 65, 5, 32, 31)

Answers = dict[str, dict[str, Any]]


def requests(kind: str, adapters: list[str | None]) -> list[dict[str, Any]]:
    """The same prompts with every adapter and with none, so that only an adapter tells their texts apart."""
    rng = random.Random(7)
    made = []
    for i, length in enumerate(LENGTHS):
        prompt = [rng.randrange(3, VOCAB) for _ in range(length)]
        for adapter in {adapters[i % len(adapters)]: 0, adapters[(i + 1) % len(adapters)]: 0}:
            sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
            if kind == "seeded":
                sampling |= {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 300 + i}
            made.append({"prompt": prompt, "adapter": adapter, "sampling": sampling})
    return made


@pytest.fixture(scope="module")
def answers(run_engines: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, Answers]:
    """Answers of plain vLLM and of vLLM with trees, by phase."""
    folder = tmp_path_factory.mktemp("lora")
    plain, trees = jobs(folder)
    found = run_engines([plain, trees])
    asked = {"asked": plain[1][0]}
    return (
        asked | dict(zip(("greedy", "again", "seeded", "base only"), found[0], strict=True)),
        asked | dict(zip(PHASES, found[1], strict=False)),
    )


def jobs(folder: Path) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Plain vLLM and vLLM with trees."""
    target = write_target(folder / "target", FAMILY)
    head = write_fitting_head(folder / "head", FAMILY)
    adapters: list[str | None] = [None]
    for i, (name, modules) in enumerate(ADAPTERS.items()):
        adapters.append(str(write_adapter(folder / name, FAMILY, modules, seed=10 + i)))
    engine = ENGINE | {"model": str(target)}
    speculative = {
        "method": "jakiro",
        "model": str(head),
        "num_speculative_tokens": 20,
        "tree": {"depth": 6, "top_k": 4, "adaptive": False},
    }
    fresh = {"fresh_cache": True}
    greedy, seeded = ({"requests": requests(kind, adapters)} for kind in ("greedy", "seeded"))
    again = greedy | {"after": [0, 0]}
    base_only = {"requests": requests("greedy", [None])}
    with_trees = {
        "greedy": greedy | fresh | {"oracle": [0, 0]},
        "again": again | {"oracle": [0, 1]},  # on blocks that speculation wrote
        "seeded": seeded | fresh | {"oracle": [0, 2]},
        "base only": base_only | fresh | {"oracle": [0, 3]},
        "head": greedy | fresh,
        "mask": greedy | fresh | {"oracle": [0, 0], "sabotage": "mask"},
    }
    speculation = {"max_num_batched_tokens": TREE_TOKENS, "speculative_config": speculative}
    return [
        (engine | {"max_num_batched_tokens": PLAIN_TOKENS}, [greedy, again, seeded, base_only]),
        (engine | speculation, list(with_trees.values())),
    ]


def tokens(answer: dict[str, Any]) -> list[list[int]]:
    return [request["tokens"] for request in answer["requests"]]


@pytest.mark.parametrize("phase", ["greedy", "again", "seeded", "base only"])
def test_same_tokens_as_plain(answers: tuple[Answers, Answers], phase: str) -> None:
    plain, trees = answers
    assert tokens(trees[phase]) == tokens(plain[phase])


def test_adapters_change_most_texts(answers: tuple[Answers, Answers]) -> None:
    """Else an adapter that is applied to the wrong rows would go unnoticed."""
    found = tokens(answers[0]["greedy"])
    assert all(a != b for a, b in zip(found[::2], found[1::2], strict=True)), "the same prompt, two adapters"


def test_requests_without_adapter_are_the_base_model(answers: tuple[Answers, Answers]) -> None:
    """Also in a batch with adapters."""
    plain, trees = answers
    alone = dict(zip(LENGTHS, tokens(plain["base only"]), strict=True))
    for side in (plain, trees):
        beside = [
            (len(request["prompt"]), text)
            for request, text in zip(side["asked"]["requests"], tokens(side["greedy"]), strict=True)
            if request["adapter"] is None
        ]
        assert len(beside) == len(LENGTHS) // 2
        assert all(alone[length] == text for length, text in beside)


@pytest.mark.parametrize("phase", ["greedy", "again", "seeded"])
def test_trees_were_really_used(answers: tuple[Answers, Answers], phase: str) -> None:
    seen = answers[1][phase]["acceptance"]
    assert seen["drafts"] > 150
    assert seen["accepted"] > seen["drafts"]
    assert seen["moved"] > 100
    assert seen["mixed"] > 5


def test_the_head_drafts_beside_adapters(answers: tuple[Answers, Answers]) -> None:
    """What it shares with the target is the base model's, whichever rows the target last computed."""
    plain, trees = answers
    assert tokens(trees["head"]) == tokens(plain["greedy"])
    assert trees["head"]["acceptance"]["drafts"] > 400


def test_a_wrong_mask_is_noticed(answers: tuple[Answers, Answers]) -> None:
    assert tokens(answers[1]["mask"]) != tokens(answers[0]["greedy"])
