"""The storm's checker notices what is wrong: negative controls, one changed answer at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from jakiro_vllm.storm.cases import CHAT, CHOICES, COMPLETIONS, MALFORMED, RESPONSES, Case, Cases
from jakiro_vllm.storm.client import Answer, Choice, read
from jakiro_vllm.storm.compare import TIE, Tally, compare, faults
from jakiro_vllm.storm.drive import storm_cases

VOCAB, MAX_LEN = 4096, 512
BODY = {"model": "target", "prompt": [5, 6], "temperature": 0, "max_tokens": 4, "logprobs": 1}


def case(**changes: Any) -> Case:
    """A greedy completion; ``fate`` and fields of the body can be changed."""
    fate = changes.pop("fate", "finish")
    return Case(7, "completions greedy", COMPLETIONS, {**BODY, **changes}, fate)


def answer() -> Answer:
    """A right one."""
    choice = Choice("ab cd", [9, 8, 7, 6], "length", None, [-0.1, -0.1, -0.2, -0.1, -1.0, -0.5, -0.3, -0.3], [5, 6])
    return Answer(200, {0: choice}, (2, 4), True)


def wide(*unused: Any) -> float:
    return 0.7


def narrow(*unused: Any) -> float:
    return TIE / 3


def tallied(wrong: Answer, about: Case | None = None, margin: Callable[..., float] = wide) -> Tally:
    tally = Tally()
    tally.add(about or case(), wrong, answer(), margin, VOCAB, MAX_LEN)
    return tally


def test_the_right_answer_is_right() -> None:
    tally = tallied(answer())
    assert tally.clean
    assert (tally.requests, tally.compared, tally.tokens) == (1, 1, 4)


def set_choice(**values: Any) -> Callable[[Answer], None]:
    def change(wrong: Answer) -> None:
        wrong.choices[0] = replace(wrong.choices[0], **values)

    return change


WRONG = {
    "token": set_choice(tokens=[9, 8, 3, 6]),
    "first token": set_choice(tokens=[1, 8, 7, 6]),
    "one more": set_choice(tokens=[9, 8, 7, 6, 5]),
    "one less": set_choice(tokens=[9, 8, 7]),
    "text": set_choice(text="ab ce"),
    "finish": set_choice(finish="stop"),
    "stop": set_choice(stop="d"),
    "prompt": set_choice(prompt=[5, 7]),
    "log-probability": set_choice(logprobs=[-0.1, -0.1, -0.2, -0.1, -1.1, -0.5, -0.3, -0.3]),
    "fewer log-probabilities": set_choice(logprobs=[-0.1] * 6),
    "prompt's log-probability": set_choice(prompt_logprobs=[-1.0]),
    "another choice": lambda wrong: wrong.choices.update({1: Choice(finish="stop")}),
    "no choice": lambda wrong: wrong.choices.clear(),
    "usage": lambda wrong: setattr(wrong, "usage", (2, 5)),
    "status": lambda wrong: setattr(wrong, "status", 500),
    "no answer": lambda wrong: setattr(wrong, "status", 0),
    "no end": lambda wrong: setattr(wrong, "complete", False),
    "an error": lambda wrong: setattr(wrong, "error", "the engine died"),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_one_changed_answer_is_noticed(change: Callable[[Answer], None]) -> None:
    wrong = answer()
    change(wrong)
    assert not tallied(wrong).clean
    assert not tallied(wrong).ties


def test_a_tie_is_reported_apart_and_nothing_else_is_a_tie() -> None:
    wrong = answer()
    wrong.choices[0].tokens[2] = 3
    tally = tallied(wrong, margin=narrow)
    assert tally.clean
    assert [(t["position"], t["plain"], t["trees"], t["margin"]) for t in tally.ties] == [(2, 7, 3, TIE / 3)]
    tally = tallied(wrong, margin=lambda *_: TIE)
    assert not tally.clean
    assert not tally.ties
    for change in ("text", "finish", "usage", "one less"):
        wrong = answer()
        WRONG[change](wrong)
        assert not tallied(wrong, margin=narrow).clean, "no margin explains this"


@pytest.mark.parametrize("fate", ["cut", "abort", "abandon"])
def test_a_beginning_must_be_the_beginning(fate: str) -> None:
    partial = Answer(200, {0: Choice("ab", [9, 8], prompt=[5, 6])}, None, False)
    assert tallied(partial, case(fate=fate)).clean
    assert tallied(partial, case(fate=fate)).beginnings == 1
    partial.choices[0].text = "ax"
    assert not tallied(partial, case(fate=fate)).clean
    partial.choices[0] = Choice("ab", [9, 1])
    assert not tallied(partial, case(fate=fate)).clean


def test_a_structured_answer_may_repeat_the_end_of_a_prompt_that_was_cut_within_a_character() -> None:
    about = case(structured_outputs={"choice": list(CHOICES)})

    def wrong(text: str) -> list[str]:
        return faults(
            about, Answer(200, {0: Choice(text, [1, 2], "stop", None, [-0.1] * 8)}, (2, 2), True), VOCAB, MAX_LEN
        )

    assert not wrong(CHOICES[0])
    assert not wrong(f"'ÀÁ\ufffd{CHOICES[0]}")
    assert wrong(f"'ÀÁ{CHOICES[0]}")
    assert wrong(f"{CHOICES[0]}\ufffd")


def test_an_aborted_answer_may_show_the_beginning_of_its_stop_string() -> None:
    """Of the one that plain vLLM's answer ended by; the tokens tell the rest."""

    def clean(text: str, plain_finish: str, fate: str = "abort") -> bool:
        plain, aborted, tally = answer(), answer(), Tally()
        plain.choices[0] = replace(plain.choices[0], finish=plain_finish)
        aborted.choices[0] = Choice(text, [9, 8, 7], "abort")
        tally.add(case(fate=fate, stop=["= ", "!!"]), aborted, plain, wide, VOCAB, MAX_LEN)
        return tally.clean

    assert clean("ab cd=", "stop")
    assert clean("ab cd!", "stop")
    assert not clean("ab cd=!", "stop")
    assert not clean("ab c=", "stop")
    assert not clean("ab cd=", "length")


def test_an_aborted_answer_that_ended_is_compared_whole() -> None:
    aborted = answer()
    assert tallied(aborted, case(fate="abort")).clean
    aborted.choices[0] = Choice("ab", [9, 8], "abort")
    assert tallied(aborted, case(fate="abort")).clean
    aborted.choices[0] = Choice("ab", [9, 8], "length")
    assert not tallied(aborted, case(fate="abort")).clean


FAULTS = {
    "a token beyond the vocabulary": ({}, set_choice(tokens=[9, 8, VOCAB, 6])),
    "a negative token": ({}, set_choice(tokens=[9, 8, -1, 6])),
    "a token that is not allowed": ({"allowed_token_ids": [9, 8, 7]}, set_choice()),
    "too many tokens": ({"max_tokens": 3}, set_choice()),
    "too few tokens": ({"min_tokens": 3}, set_choice(tokens=[9], finish="stop")),
    "ended early": ({}, set_choice(tokens=[9, 8])),
    "a stop string": ({"stop": ["b c"]}, set_choice()),
    "no finish": ({}, set_choice(finish="error")),
    "no number": ({}, set_choice(logprobs=[float("nan")] * 8)),
    "no probability": ({}, set_choice(logprobs=[0.5] * 8)),
    "too few log-probabilities": ({}, set_choice(logprobs=[-0.5] * 3)),
    "too few choices": ({"n": 2}, set_choice()),
    "no regex": ({"structured_outputs": {"regex": "..."}}, set_choice(finish="stop")),
    "no choice": ({"structured_outputs": {"choice": ["..."]}}, set_choice(finish="stop")),
    "no JSON": ({"structured_outputs": {"json": {}}}, set_choice(finish="stop")),
    "another JSON": ({"structured_outputs": {"json": {}}}, set_choice(finish="stop", text='{"name": "x"}')),
}


@pytest.mark.parametrize(("fields", "change"), FAULTS.values(), ids=FAULTS)
def test_faults_of_an_unseeded_answer(fields: dict[str, Any], change: Callable[[Answer], None]) -> None:
    """They have no certain answer; a right one passes."""
    assert faults(case(), answer(), VOCAB, MAX_LEN) == []
    wrong = answer()
    change(wrong)
    assert faults(case(**fields), wrong, VOCAB, MAX_LEN)


def test_stop_strings_are_not_looked_for_before_the_least_number_of_tokens() -> None:
    assert faults(case(stop=["b c"]), answer(), VOCAB, MAX_LEN)
    assert faults(case(stop=["b c"], min_tokens=2), answer(), VOCAB, MAX_LEN) == []
    assert faults(case(stop=["b c"], include_stop_str_in_output=True), answer(), VOCAB, MAX_LEN) == []


@pytest.mark.parametrize(("status", "well"), [(400, True), (404, True), (200, False), (500, False), (0, False)])
def test_a_malformed_request_must_be_refused(status: int, well: bool) -> None:
    tally = Tally()
    tally.add(Case(0, "x", COMPLETIONS, b"{", "malformed"), Answer(status), None, wide, VOCAB, MAX_LEN)
    assert tally.clean == well


def test_what_only_one_server_refuses_is_a_difference() -> None:
    refused = Answer(400, error="no")
    assert compare(case(), answer(), refused, wide)
    assert compare(case(), refused, answer(), wide)
    tally = Tally()
    tally.add(case(), refused, refused, wide, VOCAB, MAX_LEN)
    assert tally.clean
    assert tally.refused == 1


@pytest.fixture(scope="module")
def cases() -> Cases:
    """The requests of seed 3."""
    return storm_cases(3)


def test_a_storm_follows_from_its_seed(cases: Cases) -> None:
    again, other = storm_cases(3), storm_cases(4)
    drawn = [cases.case(i) for i in range(100)]
    assert drawn == [again.case(i) for i in range(100)]
    assert drawn != [other.case(i) for i in range(100)]
    assert drawn[90] == storm_cases(3).case(90), "a request depends on its number only"


def test_a_storm_has_every_kind_of_request(cases: Cases) -> None:
    drawn = [cases.case(i) for i in range(5000)]
    assert {c.fate for c in drawn} == {"finish", "cut", "abandon", "abort", "malformed"}
    assert {c.path for c in drawn} >= {COMPLETIONS, CHAT, RESPONSES}
    assert {c.kind for c in drawn if c.fate == "malformed"} == {f"malformed: {name}" for name in MALFORMED}
    whole = [c for c in drawn if c.fate != "malformed"]
    seen = {name for c in whole for name in c.fields}
    assert seen >= {
        *("stream", "seed", "top_k", "top_p", "n", "stop", "stop_token_ids", "ignore_eos", "min_tokens"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty", "bad_words", "allowed_token_ids"),
        *("logprobs", "prompt_logprobs", "echo", "structured_outputs", "response_format", "include"),
    }
    kinds = {kind for c in whole for kind in c.fields.get("structured_outputs", ())}
    assert kinds == {"regex", "choice", "json"}
    prompts = [c.fields["prompt"] for c in whole if c.path == COMPLETIONS]
    lengths = {len(p) for p in prompts if isinstance(p, list) and isinstance(p[0], int)}
    assert {1, 2, 32} <= lengths
    assert MAX_LEN - 1 in lengths, "no prompt of the maximum length"
    assert max(c.num_choices for c in whole) > 3
    repeated = len(whole) - len({c.key for c in whole})
    assert 100 < repeated < 1500
    assert sum(c.exact for c in whole) > 0.8 * len(whole)
    for c in whole:
        json.dumps(c.body)


CHUNKS = {
    COMPLETIONS: [
        {"choices": [{"index": 0, "text": "a", "token_ids": [1], "prompt_token_ids": [5, 6], "finish_reason": None}]},
        {"choices": [{"index": 1, "text": "x", "token_ids": [3], "prompt_token_ids": [5, 6], "finish_reason": None}]},
        {"choices": [{"index": 0, "text": "b", "token_ids": [2, 7], "finish_reason": "stop", "stop_reason": "c"}]},
        {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 4}},
    ],
    CHAT: [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "prompt_token_ids": [5, 6]},
        {"choices": [{"index": 1, "delta": {"content": "x"}, "token_ids": [3]}]},
        {"choices": [{"index": 0, "delta": {"content": "a"}, "token_ids": [1]}]},
        {
            "choices": [
                {
                    "index": 0,
                    "delta": {"content": "b"},
                    "token_ids": [2, 7],
                    "finish_reason": "stop",
                    "stop_reason": "c",
                }
            ]
        },
        {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 4}},
    ],
}


@pytest.mark.parametrize("path", CHUNKS)
def test_streams_are_put_together(path: str) -> None:
    found = Answer()
    for chunk in CHUNKS[path]:
        read(found, copy.deepcopy(chunk))
    first, second = found.choices[0], found.choices[1]
    assert (first.text, first.tokens, first.finish, first.stop, first.prompt) == ("ab", [1, 2, 7], "stop", "c", [5, 6])
    assert (second.text, second.tokens, second.finish) == ("x", [3], None)
    assert found.usage == (2, 4)


def test_a_response_whose_stream_differs_from_its_end_is_wrong() -> None:
    response = {
        "object": "response",
        "status": "incomplete",
        "incomplete_details": {"reason": "max_output_tokens"},
        "output": [{"content": [{"text": "ab"}]}],
        "output_messages": [{"tokens": [1, 2]}],
    }
    for delta, wrong in (("ab", False), ("ax", True)):
        found = Answer()
        read(found, {"type": "response.output_text.delta", "delta": delta})
        read(found, {"type": "response.completed", "response": response})
        assert bool(found.error) == wrong
        assert (found.choices[0].tokens, found.choices[0].finish) == ([1, 2], "max_output_tokens")
