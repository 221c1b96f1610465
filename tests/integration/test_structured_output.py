"""Structured output with trees: plain vLLM's tokens, from trees in which the grammar forbids no node."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex

from jakiro_vllm.integration.scheduler import first_rows, path_of, paths

SESSION = Path(__file__).with_name("structured_session.py")

#: Checked by an engine of regular expressions that knows partial matches; neither it nor its grammar is vLLM's.
PATTERN = r"(self|return|def|import|[a-z_]{2,12})( ?[=(.,)] ?([a-z_]{2,12}|[0-9]{1,3}))*\n?"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["a", "self", "return"]}, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= term (" + " term)*\nterm ::= "self" ("." [a-z]+)? | [0-9]+ | "(" root ")"'
KINDS: dict[str, dict[str, Any]] = {
    "regex": {"regex": PATTERN},
    "json": {"json": SCHEMA},
    "choice": {"choice": ["return self", "return None", "import os", "import sys", "def f(self):"]},
    "grammar": {"grammar": GRAMMAR},
}
SAMPLINGS = {"greedy": {"temperature": 0.0}, "seeded": {"temperature": 1.0, "top_p": 0.95}}


def workload(source: list[int], sampling: str) -> list[dict[str, Any]]:
    """Every kind four times, each beside a request that is free."""
    requests = []
    for i, structured in enumerate([*KINDS.values()] * 4):
        for own in ({"structured_outputs": structured}, {}):
            start = 170 * i
            seed = {"seed": 50 + i} if sampling == "seeded" else {}
            settings = SAMPLINGS[sampling] | seed | {"max_tokens": 48} | own
            requests.append({"prompt": source[start : start + 30 + i], "sampling": settings})
    return requests


@pytest.fixture(scope="module")
def answers(
    run_engines: Callable[..., Any],
    plain_engine: dict[str, Any],
    jakiro_engine: dict[str, Any],
    source_tokens: list[int],
) -> dict[tuple[str, str], Any]:
    """Both engines' answers, and those of a scheduler that masks the roots of trees only."""
    phases = [{"requests": workload(source_tokens, sampling)} for sampling in SAMPLINGS]
    control = phases[1] | {"unmask": True}
    plain, jakiro = run_engines([(plain_engine, phases), (jakiro_engine, [*phases, control])], session=SESSION)
    found: dict[tuple[str, str], Any] = {}
    for i, sampling in enumerate(SAMPLINGS):
        found["plain", sampling] = plain[i]["requests"]
        found["jakiro", sampling] = jakiro[i]["requests"]
    found["unmasked", "seeded"] = jakiro[2]["requests"]
    return found


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_tokens_as_plain(answers: dict[tuple[str, str], Any], kind: str, sampling: str) -> None:
    of_kind = slice(2 * list(KINDS).index(kind), None, 2 * len(KINDS))
    plain, jakiro = answers["plain", sampling][of_kind], answers["jakiro", sampling][of_kind]
    assert len(plain) == 4
    for a, b in zip(plain, jakiro, strict=True):
        assert (b["tokens"], b["finish"], b["stop_reason"]) == (a["tokens"], a["finish"], a["stop_reason"])
    if kind == "json":
        assert all(json.loads(a["text"]).keys() == SCHEMA["properties"].keys() for a in jakiro if a["finish"] == "stop")


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_free_requests_beside_them(answers: dict[tuple[str, str], Any], sampling: str) -> None:
    free = slice(1, None, 2)
    tokens = [[a["tokens"] for a in answers[side, sampling][free]] for side in ("plain", "jakiro")]
    assert tokens[0] == tokens[1]


@pytest.mark.vllm
@pytest.mark.slow
def test_trees_were_really_used(answers: dict[tuple[str, str], Any]) -> None:
    for sampling in SAMPLINGS:
        trees = answers["jakiro", sampling][0]["structured_trees"]
        branching = [tree for tree in trees if len(set(tree["parents"])) < len(tree["parents"])]
        assert len(branching) > 30
        assert sum(tree["accepted"] for tree in trees) > 30, "nothing was accepted: the test proves little"
        assert any(-1 in tree["drafts"] for tree in trees), "nothing was forbidden: the test proves little"


@pytest.mark.vllm
@pytest.mark.slow
def test_no_node_is_forbidden(answers: dict[tuple[str, str], Any], tokenizer: Any) -> None:
    """By the regular expression, which another engine checks along every path."""
    pattern, checked = regex.compile(PATTERN), 0
    for sampling in SAMPLINGS:
        found = answers["jakiro", sampling]
        ours = [a["tokens"] for a in found[0 :: 2 * len(KINDS)]]
        for tree in found[0]["structured_trees"]:
            if not any(tokens[: len(tree["written"])] == tree["written"] for tokens in ours) or not tree["written"]:
                continue
            for node, token in enumerate(tree["drafts"]):
                if token > 0:  # 0 ends the text
                    text = tokenizer.decode(tree["written"] + path_of(node, tree["drafts"], tree["parents"]))
                    assert pattern.fullmatch(text, partial=True), text
                    checked += 1
    assert checked > 100


@pytest.mark.vllm
@pytest.mark.slow
def test_missing_masks_are_noticed(answers: dict[tuple[str, str], Any]) -> None:
    honest, unmasked = ([a["tokens"] for a in answers[side, "seeded"]] for side in ("jakiro", "unmasked"))
    assert honest != unmasked


def test_paths_visit_every_node_once_from_the_root() -> None:
    tokens, parents = [10, 11, 12, 13, -1, 15], [-1, -1, 0, 0, 1, 2]
    assert [*paths(tokens, parents)] == [[1], [0, 3], [0, 2, 5]]
    assert path_of(5, tokens, parents) == [10, 12, 15]
    assert [*paths([-1, -1], [-1, 0])] == []


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param(9, [0, 3, 4], id="one after the other"),
        pytest.param(15, [0, 5, 10], id="blocks"),
    ],
)
def test_where_masks_begin(rows: int, expected: list[int]) -> None:
    assert first_rows([3, 1, 5], rows) == expected
