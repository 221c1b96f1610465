"""The CUDA runner path inside vLLM's engine, on CPU tensors: Triton interprets every kernel of this package.

What a machine without a GPU cannot show is left out: compiled kernels, CUDA graphs, streams. Everything else is the
shipped code: the runner's mixin, the Triton backend, sampling of all rows at once, the walk, compaction, and drafts
from persistent buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SESSION = Path(__file__).with_name("interpreted_session.py")
TREE = {"depth": 4, "top_k": 3, "adaptive": False}
NODES = 9


def greedy(prompt: list[int], **sampling: Any) -> dict[str, Any]:
    return {"prompt": prompt, "sampling": {"temperature": 0.0, "max_tokens": 10, "ignore_eos": True} | sampling}


def seeded(prompt: list[int], seed: int, **sampling: Any) -> dict[str, Any]:
    return greedy(prompt, temperature=0.7, top_p=0.9, top_k=40, seed=seed, **sampling)


@pytest.fixture(scope="module")
def answers(
    run_engines: Callable[..., Any],
    plain_engine: dict[str, Any],
    jakiro_engine: dict[str, Any],
    source_tokens: list[int],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Answers of plain vLLM and of the CUDA path, phase by phase."""
    short = [source_tokens[start : start + count] for start, count in ((300, 7), (900, 20))]
    mixed = [
        greedy(source_tokens[400:433]),  # longer than the step's budget: processed in chunks beside trees
        seeded(source_tokens[700:712], 5),
        greedy(source_tokens[1300:1309], repetition_penalty=1.2, logprobs=2),  # sampled level by level
        seeded(source_tokens[1500:1531], 6, max_tokens=6),
    ]
    phases = {
        "all kernels": {"requests": [greedy(short[0], max_tokens=8), seeded(short[1], 3, max_tokens=8)]},
        "seeded": {"requests": [seeded(p, i) for i, p in enumerate(short)]},
        "mixed": {"requests": mixed},
        "control": {"requests": [greedy(p, max_tokens=16) for p in (*short, source_tokens[1800:1812])]},
    }
    phases["all kernels"]["draft_kernels"] = True
    broken = {
        f"without {what}": phases["control"] | {"sabotage": what, "fresh_cache": True}
        for what in ("mask", "compaction", "positions")
    }
    small = {"max_num_seqs": 3, "max_model_len": 128, "kv_cache_memory_bytes": 1 << 26}
    trees = jakiro_engine["speculative_config"] | {"num_speculative_tokens": NODES, "tree": TREE}
    path = jakiro_engine | small | {"max_num_batched_tokens": 32, "speculative_config": trees}
    jobs = [(plain_engine | small, list(phases.values())), (path, [*phases.values(), *broken.values()])]
    plain, found = run_engines(jobs, SESSION)
    return dict(zip(phases, plain, strict=False)), dict(zip((*phases, *broken), found, strict=False))


def tokens(answer: dict[str, Any]) -> list[list[int]]:
    return [request["tokens"] for request in answer["requests"]]


@pytest.mark.parametrize("phase", ["all kernels", "seeded", "mixed", "control"])
def test_same_tokens(answers: tuple[dict[str, Any], dict[str, Any]], phase: str) -> None:
    plain, found = answers
    assert tokens(found[phase]) == tokens(plain[phase])
    if phase != "mixed":
        assert found[phase]["acceptance"]["accepted"] > 0
    else:
        assert found[phase]["acceptance"]["mixed"] > 0, "no step with both trees and other rows"


def test_trees_are_worth_something(answers: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Else equal tokens would say nothing: paths are long enough to be moved in the cache."""
    counts = [answers[1][phase]["acceptance"] for phase in ("all kernels", "seeded", "control")]
    assert sum(count["moved"] for count in counts) > 10


@pytest.mark.parametrize("what", ["mask", "compaction", "positions"])
def test_sabotage_is_noticed(answers: tuple[dict[str, Any], dict[str, Any]], what: str) -> None:
    plain, found = answers
    assert tokens(found[f"without {what}"]) != tokens(plain["control"])


def test_logprobs_of_accepted_tokens(answers: tuple[dict[str, Any], dict[str, Any]]) -> None:
    wanted, found = (side["mixed"]["requests"][2]["logprobs"] for side in answers)
    assert len(found) == len(wanted) == 10
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        assert mine == pytest.approx(theirs, abs=1e-3)
