"""What an answer with trees must have in common with plain vLLM's, and what any answer must obey."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jakiro_vllm.storm.cases import CHOICES, REGEX, RESPONSES, SCHEMA, Case
from jakiro_vllm.storm.client import Answer, Choice

#: fp32 of one row and of many rows round differently; measured at 1e-5.
LOGPROB_TOLERANCE = 1e-3
#: Nats between two tokens that rounding may exchange. Only such a difference counts as a tie.
TIE = 1e-4


@dataclass
class Difference:
    """Where an answer with trees leaves plain vLLM's.

    Attributes:
        index: of the case.
        kind: of the case.
        choice: of the answer.
        what: differs first: ``tokens``, or another of an answer's parts.
        position: of the first token or number that differs.
        plain: that token of plain vLLM, numbers from there, or the whole part.
        trees: the same with trees.
        margin: nats by which the target preferred one to the other; None where no token differs.
    """

    index: int
    kind: str
    choice: int
    what: str
    position: int | None = None
    plain: Any = None
    trees: Any = None
    margin: float | None = None

    @property
    def tie(self) -> bool:
        """Whether rounding explains it."""
        return self.margin is not None and self.margin < TIE


#: ``margin(case, choice, prompt, common, plain, trees)``: nats between two tokens after the common ones.
Margin = Callable[[Case, int, list[int], list[int], int, int], float]


def compare(case: Case, plain: Answer, trees: Answer, margin: Margin) -> list[Difference]:
    """Compares a request's answers.

    An answer that was cut short must be the beginning of plain vLLM's.

    Args:
        case: a request with one certain answer.
        plain: the whole answer without trees.
        trees: the answer with trees, or as much of it as came.
        margin: tells how close two tokens were.
    """
    if plain.status != 200 or trees.status not in (0, 200):
        same = plain.status == trees.status or trees.status == 0
        return [] if same else [_difference(case, 0, "status", plain.status, trees.status)]
    found = []
    for index, partial in sorted(trees.choices.items()):
        if index not in plain.choices:
            found.append(_difference(case, index, "choices", sorted(plain.choices), sorted(trees.choices)))
            continue
        whole = trees.complete and partial.finish != "abort"
        difference = _compare_choice(case, index, plain.choices[index], partial, whole, margin)
        if difference is not None:
            found.append(difference)
    if trees.complete and not found:
        if sorted(trees.choices) != sorted(plain.choices):
            found.append(_difference(case, 0, "choices", sorted(plain.choices), sorted(trees.choices)))
        elif trees.usage != plain.usage and all(c.finish != "abort" for c in trees.choices.values()):
            found.append(_difference(case, 0, "usage", plain.usage, trees.usage))
    return found


def _compare_choice(
    case: Case, index: int, plain: Choice, trees: Choice, whole: bool, margin: Margin
) -> Difference | None:
    position = first_difference(plain.tokens, trees.tokens)
    if position is not None:
        a, b = plain.tokens[position], trees.tokens[position]
        nats = margin(case, index, plain.prompt, plain.tokens[:position], a, b)
        return Difference(case.index, case.kind, index, "tokens", position, a, b, nats)
    stops = case.fields.get("stop", ()) if plain.finish == "stop" else ()
    parts: tuple[str, ...] = ("text", "tokens")
    if whole:
        parts = ("tokens", "text", "finish", "stop", "prompt")
    for part in parts:
        a, b = getattr(plain, part), getattr(trees, part)
        if a != b if whole else not _begins(a, b, stops if part == "text" else ()):
            return _difference(case, index, part, a, b)
    for part in ("logprobs", "prompt_logprobs") if whole else ():
        a, b = getattr(plain, part), getattr(trees, part)
        apart = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if abs(x - y) > LOGPROB_TOLERANCE]
        if apart or len(a) != len(b):
            at = min(apart, default=min(len(a), len(b)))
            difference = _difference(case, index, part, a[at : at + 5], b[at : at + 5])
            difference.position = at
            return difference
    return None


def _begins(whole: Any, part: Any, stops: Sequence[str]) -> bool:
    """Whether an answer begins with what came before its request was aborted.

    vLLM holds back the last characters while they may be the beginning of a stop string, which would not be shown; when
    a request is aborted it shows them.
    """
    return bool(whole[: len(part)] == part) or any((whole + stop).startswith(part) for stop in stops)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first index at which both have something else; None if one begins with the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


def _difference(case: Case, choice: int, what: str, plain: Any, trees: Any) -> Difference:
    return Difference(case.index, case.kind, choice, what, None, plain, trees)


def faults(case: Case, answer: Answer, vocab_size: int, max_model_len: int) -> list[str]:
    """What is wrong with an answer, whatever plain vLLM says.

    Args:
        case: the request.
        answer: with trees.
        vocab_size: of the target.
        max_model_len: of the server.
    """
    if case.fate == "malformed":
        refused = 400 <= answer.status < 500
        return [] if refused else [f"a malformed request got {answer.status} {answer.error}"]
    if case.fate == "abandon" and not answer.complete:
        return []
    if answer.status != 200 or (answer.error and case.fate != "cut"):
        return [f"got {answer.status} {answer.error}"]
    found = []
    if case.fate == "finish" and not answer.complete:
        found.append("the answer has no end")
    if answer.complete and len(answer.choices) != case.num_choices:
        found.append(f"{len(answer.choices)} choices instead of {case.num_choices}")
    for choice in answer.choices.values():
        found += _choice_faults(case, choice, answer.complete, vocab_size, max_model_len)
    return found


def _choice_faults(case: Case, choice: Choice, complete: bool, vocab_size: int, max_model_len: int) -> list[str]:
    fields, found = case.fields, []
    allowed = fields.get("allowed_token_ids")
    wrong = [t for t in choice.tokens if not 0 <= t < vocab_size or (allowed is not None and t not in allowed)]
    if wrong:
        found.append(f"tokens that may not be there: {wrong[:5]}")
    if not all(math.isfinite(value) and value < 1e-3 for value in choice.logprobs + choice.prompt_logprobs):
        found.append("log-probabilities that are none")
    count, limit = len(choice.tokens), case.max_tokens
    if limit is not None and count > limit:
        found.append(f"{count} tokens, of at most {limit}")
    # Stop strings are not looked for among the first min_tokens, so there they may stand in the text.
    looked_for = not fields.get("include_stop_str_in_output") and not fields.get("min_tokens")
    for stop in fields.get("stop", ()) if looked_for else ():
        if stop in choice.text:
            found.append(f"the stop string {stop!r} in the text")
    if not complete or choice.finish == "abort":
        return found
    if choice.finish in ("length", "max_output_tokens"):
        if count != limit and len(choice.prompt) + count != max_model_len:
            found.append(f"ended for its length after {count} tokens")
    elif choice.finish not in ("stop", "completed"):
        found.append(f"finish reason {choice.finish!r}")
    elif count < fields.get("min_tokens", 0):
        found.append(f"{count} tokens, of at least {fields['min_tokens']}")
    elif not follows_structure(fields, choice.text) and not follows_structure(fields, _without_prompt(choice.text)):
        found.append(f"{choice.text!r} breaks its structure")
    told = choice.logprobs
    if "logprobs" in fields and case.path != RESPONSES and "echo" not in fields and len(told) < count:
        found.append(f"{len(told)} log-probabilities for {count} tokens")
    return found


def _without_prompt(text: str) -> str:
    """The text behind what vLLM repeats of a prompt that ends within a character: all up to that character."""
    return text.rpartition("\ufffd")[2]


def follows_structure(fields: dict[str, Any], text: str) -> bool:
    """Whether a finished text is what its structured output asks for."""
    wanted = fields.get("structured_outputs") or {}
    if "regex" in wanted:
        return re.fullmatch(REGEX, text) is not None
    if "choice" in wanted:
        return text in CHOICES
    if "json" in wanted or "response_format" in fields:
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            return False
        return isinstance(value, dict) and set(value) == set(SCHEMA["required"]) and isinstance(value["count"], int)
    return True


@dataclass
class Tally:
    """What a storm has found so far.

    Attributes:
        requests: sent to the server with trees, malformed ones included.
        kinds: how many of each.
        fates: what became of them.
        compared: requests whose whole answer was compared with plain vLLM's.
        beginnings: requests that were cut short, and whose beginning was compared.
        tokens: compared.
        unseeded: requests that have no certain answer, and were only checked for being well formed.
        refused: well-formed requests that both servers refused.
        ties: differences that rounding explains.
        differences: all others.
        faults: answers that are wrong in themselves.
    """

    requests: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    fates: dict[str, int] = field(default_factory=dict)
    compared: int = 0
    beginnings: int = 0
    tokens: int = 0
    unseeded: int = 0
    refused: int = 0
    ties: list[dict[str, Any]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.differences and not self.faults

    def add(
        self, case: Case, trees: Answer, plain: Answer | None, margin: Margin, vocab_size: int, max_model_len: int
    ) -> None:
        """Counts one request.

        Args:
            case: the request.
            trees: its answer with trees.
            plain: its answer without, if it has a certain one.
            margin: tells how close two tokens were.
            vocab_size: of the target.
            max_model_len: of the servers.
        """
        self.requests += 1
        self.kinds[case.kind] = self.kinds.get(case.kind, 0) + 1
        self.fates[case.fate] = self.fates.get(case.fate, 0) + 1
        if plain is not None and plain.status == trees.status == 400:
            self.refused += 1
            return
        wrong = faults(case, trees, vocab_size, max_model_len)
        if wrong:
            self.faults.append({"index": case.index, "kind": case.kind, "faults": wrong})
        if case.fate == "malformed":
            return
        if plain is None:
            self.unseeded += 1
            return
        self.compared += trees.complete
        self.beginnings += bool(trees.choices) and not trees.complete
        self.tokens += sum(len(choice.tokens) for choice in trees.choices.values())
        for difference in compare(case, plain, trees, margin):
            (self.ties if difference.tie else self.differences).append(asdict(difference))
