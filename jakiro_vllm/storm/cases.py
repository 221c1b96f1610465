"""The requests of a storm, each a function of the storm's seed and its own number."""

from __future__ import annotations

import json
import random
import sysconfig
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
#: What becomes of a well-formed request: it is answered, its client leaves in mid-stream or before the answer, or it is
#: aborted by name in mid-stream.
FATES = ("finish", "cut", "abandon", "abort")
#: Files whose beginnings and middles are the prompts, so that many prompts share their first blocks.
SOURCES = ("argparse.py", "shlex.py", "heapq.py", "textwrap.py", "bisect.py", "queue.py")
REGEX = r"[0-9]{3}\.[0-9]{2}( [a-z]{4,12}){1,3}"
CHOICES = ("yes", "no", "perhaps, but only where the caller asked for it")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
_ONE = {"prompt": [5]}
#: Requests that must be refused, by what is wrong with them.
MALFORMED: dict[str, tuple[str, dict[str, Any] | bytes]] = {
    "cut JSON": (COMPLETIONS, b'{"model": "target", "prompt": '),
    "no text": (COMPLETIONS, b"\xff\xfe"),
    "a list": (COMPLETIONS, b"[]"),
    "nothing": (COMPLETIONS, {}),
    "negative token": (COMPLETIONS, {"prompt": [-1, 3]}),
    "token beyond the vocabulary": (COMPLETIONS, {"prompt": [1 << 20]}),
    "huge token": (COMPLETIONS, {"prompt": [10**30]}),
    "unknown model": (COMPLETIONS, {**_ONE, "model": "nobody"}),
    "long prompt": (COMPLETIONS, {"prompt": [5] * 5000}),
    "empty prompt": (COMPLETIONS, {"prompt": []}),
    "no tokens wanted": (COMPLETIONS, {**_ONE, "max_tokens": 0}),
    "negative max_tokens": (COMPLETIONS, {**_ONE, "max_tokens": -3, "stream": True}),
    "no samples": (COMPLETIONS, {**_ONE, "n": 0}),
    "greedy samples": (COMPLETIONS, {**_ONE, "n": 2, "temperature": 0}),
    "negative temperature": (COMPLETIONS, {**_ONE, "temperature": -1}),
    "no number": (COMPLETIONS, {**_ONE, "temperature": "hot"}),
    "top_p": (COMPLETIONS, {**_ONE, "top_p": 1.5}),
    "top_k": (COMPLETIONS, {**_ONE, "top_k": -5}),
    "seed": (COMPLETIONS, {**_ONE, "seed": 1 << 70}),
    "stop": (COMPLETIONS, {**_ONE, "stop": 7}),
    "stop token": (COMPLETIONS, {**_ONE, "stop_token_ids": [-7]}),
    "logprobs": (COMPLETIONS, {**_ONE, "logprobs": 1000}),
    "regex": (COMPLETIONS, {**_ONE, "structured_outputs": {"regex": "(["}}),
    "schema": (COMPLETIONS, {**_ONE, "structured_outputs": {"json": "{"}}),
    "allowed tokens": (COMPLETIONS, {**_ONE, "allowed_token_ids": [1 << 20]}),
    "bad words": (COMPLETIONS, {**_ONE, "bad_words": [""]}),
    "min_tokens": (COMPLETIONS, {**_ONE, "min_tokens": 9, "max_tokens": 3}),
    "penalty": (COMPLETIONS, {**_ONE, "repetition_penalty": 0}),
    "min_p": (COMPLETIONS, {**_ONE, "min_p": 0.5}),  # vLLM's rule with any speculation
    "no messages": (CHAT, {"messages": []}),
    "messages": (CHAT, {"messages": "hi"}),
    "long chat": (CHAT, {"messages": [{"role": "user", "content": "x " * 5000}]}),
    "top_logprobs": (CHAT, {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}),
    "input": (RESPONSES, {"input": 7}),
    "unknown response": (RESPONSES, {"input": "x", "previous_response_id": "nobody's"}),
    "no such path": ("/v1/nothing", {}),
}


@dataclass(frozen=True)
class Case:
    """One request and what becomes of it.

    Attributes:
        index: its number in the storm.
        kind: for counting.
        path: of the endpoint.
        body: JSON, or bytes that are none.
        fate: one of ``FATES``, or ``malformed``.
        chunks: events of the stream that the client reads before it leaves or aborts.
        delay: seconds before a client that abandons its request leaves.
    """

    index: int
    kind: str
    path: str
    body: dict[str, Any] | bytes
    fate: str = "finish"
    chunks: int = 0
    delay: float = 0.0

    @property
    def fields(self) -> dict[str, Any]:
        """The body of a well-formed request."""
        assert isinstance(self.body, dict)
        return self.body

    @property
    def greedy(self) -> bool:
        """Whether no randomness takes part."""
        return self.fields["temperature"] == 0

    @property
    def exact(self) -> bool:
        """Whether plain vLLM gives one certain answer."""
        return self.fate != "malformed" and (self.greedy or "seed" in self.fields)

    @property
    def max_tokens(self) -> int | None:
        """What the request allows; None for all that fit."""
        names = ("max_tokens", "max_completion_tokens", "max_output_tokens")
        return next((self.fields[name] for name in names if name in self.fields), None)

    @property
    def num_choices(self) -> int:
        """Answers to expect: samples per prompt."""
        prompt = self.fields.get("prompt")
        prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
        return prompts * self.fields.get("n", 1)

    @cached_property
    def key(self) -> str:
        """The same for requests that must be answered alike, streamed or not."""
        return self.path + json.dumps({k: v for k, v in self.fields.items() if not k.startswith("stream")})


class Cases:
    """Makes requests for one target."""

    def __init__(self, target: Path, seed: int, max_model_len: int) -> None:
        """Tokenizes the sources of the prompts.

        Args:
            target: folder with ``tokenizer.json``.
            seed: of the storm.
            max_model_len: of both servers.
        """
        self.seed = seed
        self.max_model_len = max_model_len
        self.tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
        self.vocab_size = self.tokenizer.get_vocab_size()
        library = Path(sysconfig.get_paths()["stdlib"])
        texts = [(library / name).read_text(encoding="utf-8") for name in SOURCES]
        self.documents = [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]

    def case(self, index: int) -> Case:
        """The request of a number."""
        rng = random.Random(f"{self.seed}/{index}")
        if rng.random() < 0.06:
            name = rng.choice(list(MALFORMED))
            path, body = MALFORMED[name]
            named: dict[str, Any] | bytes = body if isinstance(body, bytes) else {"model": "target"} | body
            return Case(index, f"malformed: {name}", path, named, "malformed")
        case = self._repeated(rng, index) or self._fresh(rng, index)
        return self._with_fate(rng, case)

    def _repeated(self, rng: random.Random, index: int) -> Case | None:
        """Now and then an earlier request once more, whatever became of it."""
        if index == 0 or rng.random() > 0.15:
            return None
        earlier = self.case(index - rng.randrange(1, min(index, 40) + 1))
        return None if earlier.fate == "malformed" else replace(earlier, index=index, fate="finish", chunks=0)

    def _with_fate(self, rng: random.Random, case: Case) -> Case:
        fate = rng.choices(FATES, (80, 8, 5, 7))[0]
        body = {k: v for k, v in case.fields.items() if not k.startswith("stream")}
        names_itself = case.path != RESPONSES  # a response has a name that its client learns too late
        if fate == "abort" and (not names_itself or case.num_choices > 1):
            fate = "cut"
        # Refused in streams; and a streamed response of vLLM loses the log-probabilities of text that it holds back.
        whole_only = "prompt_logprobs" in body or "echo" in body or "include" in body
        if whole_only and fate in ("cut", "abort"):
            fate = "abandon"
        streamed = fate in ("cut", "abort") or (fate == "finish" and not whole_only and rng.random() < 0.5)
        if streamed:
            body["stream"] = True
            if names_itself:
                body["stream_options"] = {"include_usage": True}
        return replace(
            case, body=body, fate=fate, chunks=rng.choice((1, 1, 2, 3, 5, 9)), delay=rng.choice((0.0, 0.02, 0.1, 0.3))
        )

    def _fresh(self, rng: random.Random, index: int) -> Case:
        path = rng.choices((COMPLETIONS, CHAT, RESPONSES), (62, 24, 14))[0]
        body: dict[str, Any] = {"model": "target"}
        kinds = [path.removeprefix("/v1/")]
        kinds.append(self._sampling(rng, body, path))
        structured = rng.random() < 0.1
        if structured:
            kinds.append("structured")
            kind, value = rng.choice((("regex", REGEX), ("choice", list(CHOICES)), ("json", SCHEMA)))
            if kind == "json" and path == CHAT and rng.random() < 0.5:
                body["response_format"] = {"type": "json_schema", "json_schema": {"name": "counted", "schema": SCHEMA}}
            else:
                body["structured_outputs"] = {kind: value}
        limit = self._ending(rng, body, path, structured)
        self._prompt(rng, body, path, limit)
        return Case(index, " ".join(kinds), path, body)

    def _sampling(self, rng: random.Random, body: dict[str, Any], path: str) -> str:
        kind = rng.choices(("greedy", "seeded", "unseeded"), (40, 47, 13))[0]
        body["temperature"] = 0 if kind == "greedy" else rng.choice((0.2, 0.7, 1.0, 1.5))
        if kind == "seeded":
            body["seed"] = rng.randrange(1 << 31)
        if kind != "greedy":
            if rng.random() < 0.4:
                body["top_k"] = rng.choice((1, 5, 50, 4000))
            if rng.random() < 0.4:
                body["top_p"] = rng.choice((0.1, 0.5, 0.9, 0.99))
            if path != RESPONSES and rng.random() < 0.2:
                body["n"] = rng.choice((2, 3))
        if rng.random() < 0.25:
            body["repetition_penalty"] = rng.choice((1.05, 1.3, 0.9))
        if rng.random() < 0.15:
            body["presence_penalty"] = rng.choice((-0.5, 0.5, 1.5))
        if rng.random() < 0.15:
            body["frequency_penalty"] = rng.choice((-0.1, 0.2, 1.0))
        return kind

    def _ending(self, rng: random.Random, body: dict[str, Any], path: str, structured: bool) -> int | None:
        """Sets what ends the answer and what it tells; returns the most tokens it may have."""
        names = {COMPLETIONS: "max_tokens", CHAT: "max_completion_tokens", RESPONSES: "max_output_tokens"}
        limit = 60 if structured else rng.choice((1, 2, 7, 24, 24, 48, 48, 90, 160, None))
        if limit is not None:
            body[names[path]] = limit
        elif path == COMPLETIONS:
            body["max_tokens"] = self.max_model_len  # cut at the model's maximum length
        if not structured:
            if rng.random() < 0.3:
                body["ignore_eos"] = True
            if rng.random() < 0.3:
                body["stop"] = rng.sample(["return", "\n\n", "= ", "self.", "):\n", "\u00e9"], rng.choice((1, 2)))
                if rng.random() < 0.4:
                    body["include_stop_str_in_output"] = True
            if rng.random() < 0.15:
                body["stop_token_ids"] = [rng.randrange(self.vocab_size), self._token(rng)]
            if path != RESPONSES:
                if limit is not None and rng.random() < 0.15:
                    body["min_tokens"] = rng.randrange(limit + 1)
                if rng.random() < 0.12:
                    body["bad_words"] = rng.sample(["return", "self.", "import os", "None", "def"], 2)
                if rng.random() < 0.08:
                    body["allowed_token_ids"] = sorted({self._token(rng) for _ in range(200)} | {0})
        self._telling(rng, body, path)
        return limit

    def _telling(self, rng: random.Random, body: dict[str, Any], path: str) -> None:
        if path == RESPONSES:
            body |= {"enable_response_messages": True, "store": False}
        else:
            body["return_token_ids"] = True
        if rng.random() < 0.2:
            count = rng.choice((1, 3, 20))
            if path == COMPLETIONS:
                body["logprobs"] = count
            elif path == CHAT:
                body |= {"logprobs": True, "top_logprobs": count}
            else:
                body |= {"include": ["message.output_text.logprobs"], "top_logprobs": count}
        if path == COMPLETIONS and rng.random() < 0.06:
            body["echo"] = True
        elif path != RESPONSES and rng.random() < 0.06:
            body["prompt_logprobs"] = rng.choice((0, 2))

    def _prompt(self, rng: random.Random, body: dict[str, Any], path: str, limit: int | None) -> None:
        # The templates of chat and responses add a token, and text need not give back the tokens it was made from.
        room = self.max_model_len - (limit or 1) - (0 if path == COMPLETIONS else 16)
        length = rng.choice((1, 2, 31, 32, 33, rng.randrange(3, 120), rng.randrange(3, 250), rng.randrange(200, room)))
        if rng.random() < 0.06:
            length = room
        tokens = self._stretch(rng, length)
        if path == COMPLETIONS:
            if length != room and rng.random() < 0.3:
                body["prompt"] = self.tokenizer.decode(tokens) or "x"
            elif rng.random() < 0.06:
                body["prompt"] = [tokens[:60], self._stretch(rng, 20)]
            else:
                body["prompt"] = tokens
            return
        text = self.tokenizer.decode(tokens[: room - 16]) or "x"
        if path == RESPONSES:
            body["input"] = text
        elif rng.random() < 0.3:
            half = len(text) // 2
            roles = zip(("system", "user"), (text[:half] or "x", text[half:] or "x"), strict=True)
            body["messages"] = [{"role": role, "content": part} for role, part in roles]
        else:
            body["messages"] = [{"role": "user", "content": text}]

    def _stretch(self, rng: random.Random, length: int) -> list[int]:
        document = rng.choice(self.documents)
        start = rng.choice((0, 0, 0, 32, 64, rng.randrange(1000)))
        start = min(start, max(0, len(document) - length))
        return document[start : start + length]

    def _token(self, rng: random.Random) -> int:
        return rng.choice(rng.choice(self.documents))
