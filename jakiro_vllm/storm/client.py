"""Sends the requests of a storm and gathers what comes back, streamed or whole, from any endpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from jakiro_vllm.storm.cases import Case

#: Seconds that nothing in a storm takes, on a busy machine either; only so that a server that hangs ends it.
PATIENCE = 3600.0


@dataclass
class Choice:
    """One sample, or as much of it as came.

    Attributes:
        text: without the prompt, unless it was echoed.
        tokens: ids.
        finish: why it ended; None if it has not.
        stop: the stop string or token that ended it.
        logprobs: of its tokens, each followed by those of its alternatives in descending order.
        prompt: ids of the prompt.
        prompt_logprobs: of the prompt's tokens but the first.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    stop: str | int | None = None
    logprobs: list[float] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)


@dataclass
class Answer:
    """What a server said to one request.

    Attributes:
        status: of HTTP; 0 where there was none.
        choices: by index.
        usage: tokens of the prompt and of the answer, as the server counts them.
        complete: whether the answer came to its end.
        error: what went wrong.
    """

    status: int = 0
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: tuple[int, int] | None = None
    complete: bool = False
    error: str = ""

    def choice(self, index: int) -> Choice:
        """The choice of an index, which may begin here."""
        return self.choices.setdefault(index, Choice())


async def ask(session: aiohttp.ClientSession, url: str, case: Case, name: str, obey: bool = True) -> Answer:
    """Sends one request.

    Args:
        session: to send it with.
        url: of the server.
        case: the request.
        name: of the request, unique on the server.
        obey: meet the case's fate; else the request is sent whole and its answer waited for.
    """
    answer = Answer()
    fate = case.fate if obey else "finish"
    if fate == "abandon":
        try:
            await asyncio.wait_for(_exchange(session, url, case, name, obey, answer), case.delay)
        except TimeoutError:
            answer.error = "abandoned"
    else:
        await _exchange(session, url, case, name, obey, answer)
    return answer


async def _exchange(
    session: aiohttp.ClientSession, url: str, case: Case, name: str, obey: bool, answer: Answer
) -> None:
    body = case.body
    if isinstance(body, dict) and not obey:
        body = {k: v for k, v in body.items() if not k.startswith("stream")}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "X-Request-Id": name}
    try:
        async with session.post(url + case.path, data=data, headers=headers) as response:
            answer.status = response.status
            if response.status != 200 or not (isinstance(body, dict) and body.get("stream")):
                read(answer, json.loads(await response.read() or b"{}"))
                answer.complete = response.status == 200
                return
            seen = 0
            async for event in _events(response):
                read(answer, event)
                answer.complete = answer.complete or event.get("type") == "response.completed"
                seen += 1
                if obey and seen == case.chunks and case.fate == "cut":
                    answer.complete = False
                    response.close()
                    return
                if obey and seen == case.chunks and case.fate == "abort":
                    prefix = "cmpl-{}-0" if case.path == "/v1/completions" else "chatcmpl-{}"
                    wanted = {"request_ids": [prefix.format(name)]}
                    async with session.post(f"{url}/inference/v1/abort_requests", json=wanted) as done:
                        done.raise_for_status()
            if case.path != "/v1/responses" and answer.choices:
                answer.complete = all(choice.finish is not None for choice in answer.choices.values())
    except (aiohttp.ClientError, ConnectionError, json.JSONDecodeError, TimeoutError) as error:
        answer.error = f"{type(error).__name__}: {error}"


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        data = line.removeprefix(b"data: ").strip()
        if line.startswith(b"data: ") and data != b"[DONE]":
            yield json.loads(data)


def read(answer: Answer, event: dict[str, Any]) -> None:
    """Adds one event of a stream, or a whole answer."""
    if event.get("error"):
        answer.error = json.dumps(event["error"])[:500]
    kind = event.get("type") or event.get("object")
    if kind == "response.output_text.delta":
        answer.choice(0).text += event["delta"]
    elif kind == "response.completed":
        _read_response(answer, event["response"])
    elif kind == "response":
        _read_response(answer, event)
    for entry in event.get("choices") or ():
        _read_choice(answer.choice(entry["index"]), entry, event)
    usage = event.get("usage")
    if usage and "prompt_tokens" in usage:
        answer.usage = usage["prompt_tokens"], usage["completion_tokens"]


def _read_choice(choice: Choice, entry: dict[str, Any], event: dict[str, Any]) -> None:
    """Of a completion or a chat, whole or in pieces."""
    message = entry.get("message") or entry.get("delta") or {}
    choice.text += entry.get("text") or message.get("content") or ""
    choice.tokens += entry.get("token_ids") or ()
    choice.prompt += entry.get("prompt_token_ids") or event.get("prompt_token_ids") or ()
    if entry.get("finish_reason") is not None:
        choice.finish, choice.stop = entry["finish_reason"], entry.get("stop_reason")
    logprobs = entry.get("logprobs") or {}
    tops = logprobs.get("top_logprobs") or ()
    for value, alternatives in zip(logprobs.get("token_logprobs") or (), tops, strict=True):
        if value is not None:
            choice.logprobs += [value, *sorted((alternatives or {}).values(), reverse=True)]
    for content in logprobs.get("content") or ():
        choice.logprobs += _content_logprobs(content)
    told = entry.get("prompt_logprobs") or event.get("prompt_logprobs") or ()
    for token, position in zip(choice.prompt, told, strict=False):
        if position is not None:
            choice.prompt_logprobs.append(position[str(token)]["logprob"])


def _read_response(answer: Answer, response: dict[str, Any]) -> None:
    choice = answer.choice(0)
    streamed = choice.text
    contents = [c for item in response["output"] for c in item.get("content") or ()]
    choice.text = "".join(content["text"] for content in contents)
    if streamed and streamed != choice.text:
        answer.error = f"the stream said {streamed!r}, its end {choice.text!r}"
    details = response.get("incomplete_details") or {}
    choice.finish = details.get("reason") or response["status"]
    for content in contents:
        for position in content.get("logprobs") or ():
            choice.logprobs += _content_logprobs(position)
    choice.prompt = [t for m in response.get("input_messages") or () for t in m["tokens"]]
    choice.tokens = [t for m in response.get("output_messages") or () for t in m["tokens"]]
    usage = response.get("usage")
    if usage:
        answer.usage = usage["input_tokens"], usage["output_tokens"]


def _content_logprobs(position: dict[str, Any]) -> list[float]:
    tops = sorted((top["logprob"] for top in position.get("top_logprobs") or ()), reverse=True)
    return [position["logprob"], *tops]


async def ask_all(url: str, cases: Sequence[Case], concurrency: int, prefix: str, obey: bool = True) -> list[Answer]:
    """Sends requests, so many at a time, in their order.

    Args:
        url: of the server.
        cases: the requests.
        concurrency: requests under way.
        prefix: of their names.
        obey: meet the cases' fates.
    """
    answers: list[Answer] = [Answer() for _ in cases]
    waiting = iter(range(len(cases)))

    async def work(session: aiohttp.ClientSession) -> None:
        for i in waiting:
            answers[i] = await ask(session, url, cases[i], f"{prefix}{i}", obey)

    # A connection of its own for each request: one that idles might be closed by the server as it is used again.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=1 << 22) as session,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(concurrency):
            group.create_task(work(session))
    return answers
