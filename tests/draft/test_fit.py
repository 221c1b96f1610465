"""A head and its target must share their sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from jakiro_vllm.draft.checkpoint import read_spec
from jakiro_vllm.draft.fit import TargetSizes, check_fit
from jakiro_vllm.draft.head import HeadSpec
from jakiro_vllm.draft.registry import EMBEDDED_HEAD, EMBEDDED_TARGET
from jakiro_vllm.errors import HeadCheckpointError

TARGET = TargetSizes("the-target", hidden_size=16, num_kv_heads=2, head_dim=4)


def test_a_head_that_fits(tiny_spec: Callable[..., HeadSpec]) -> None:
    check_fit(tiny_spec("jakiro"), "the-head", TARGET)
    # Query heads are the head's own affair.
    check_fit(tiny_spec("jakiro", num_heads=8), "the-head", TARGET)


@pytest.mark.parametrize(
    ("size", "value", "words"),
    [
        ("hidden_size", 32, ["hidden size is 16", "target's is 32"]),
        ("num_kv_heads", 4, ["KV heads is 2", "target's is 4"]),
        ("head_dim", 8, ["head size is 4", "target's is 8"]),
    ],
)
def test_a_head_of_another_target(size: str, value: int, words: list[str], tiny_spec: Callable[..., HeadSpec]) -> None:
    with pytest.raises(HeadCheckpointError) as error:
        check_fit(tiny_spec("jakiro"), "the-head", replace(TARGET, **{size: value}))
    for word in ["'the-head'", "'the-target'", *words]:
        assert word in str(error.value)


def test_the_embedded_pair_fits() -> None:
    config = json.loads((EMBEDDED_TARGET / "config.json").read_text())
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    target = TargetSizes("embedded", config["hidden_size"], config["num_key_value_heads"], dim)
    check_fit(read_spec(EMBEDDED_HEAD), str(EMBEDDED_HEAD), target)
