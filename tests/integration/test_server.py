"""The HTTP path, with real servers, with and without trees, and the ``openai`` client."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError

from jakiro_vllm.config import TreeConfig
from jakiro_vllm.demo import GREEDY, PROMPTS, SAMPLED
from jakiro_vllm.draft.registry import EMBEDDED_HEAD, EMBEDDED_TARGET
from jakiro_vllm.environment import server_environment
from jakiro_vllm.server import Server, running_servers

PARSER = Path(__file__).with_name("reasoning_parser.py")

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


TREES = ["--speculative-model", "jakiro"]
SIDES = ("plain", "jakiro")
GRAMMARS = {"backend": "xgrammar", "enable_in_reasoning": True, "disable_any_whitespace": True}
Ask = Callable[[Server], Any]

LOOKUP: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Looks a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "maxLength": 8}, "page": {"type": "integer", "maximum": 99}},
            "required": ["word", "page"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """``vllm serve`` with the embedded target, and with the embedded pair."""
    shared = [
        *("--max-model-len", "1024", "--enforce-eager"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--reasoning-parser", "python", "--reasoning-parser-plugin", str(PARSER)),
        # Grammars hold from the first token, and leave no room for the spaces that this target likes best.
        *("--structured-outputs-config", json.dumps(GRAMMARS)),
    ]
    sides = {"plain": shared, "jakiro": [*shared, *TREES]}
    with running_servers(EMBEDDED_TARGET, sides, tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def server(servers: dict[str, Server]) -> Server:
    """The one with trees."""
    return servers["jakiro"]


def metrics(server: Server) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as response:
        return response.read().decode()


def running(server: Server) -> float:
    return server.counter("vllm:num_requests_running")


def both(servers: dict[str, Server], ask: Ask, trees: bool = True) -> Any:
    """What both servers answer, which must be one thing; ``trees`` says whether it took trees."""
    before = servers["jakiro"].counter("vllm:spec_decode_num_drafts_total")
    plain, jakiro = (ask(servers[side]) for side in SIDES)
    assert jakiro == plain
    # Counters are written once a step is over, which may be after its tokens were sent.
    drafts = partial(servers["jakiro"].counter, "vllm:spec_decode_num_drafts_total")
    if trees:
        deadline = time.monotonic() + 30
        while drafts() == before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert drafts() > before
    else:
        assert drafts() == before
    return plain


def test_streaming_and_whole_answers_agree(server: Server) -> None:
    for prompt in list(PROMPTS.values())[:3]:
        streamed = server.complete(prompt, 64, **GREEDY)
        whole = server.client.completions.create(
            model="target", prompt=prompt, max_tokens=64, temperature=0, extra_body={"return_token_ids": True}
        )
        assert whole.choices[0].token_ids == streamed.tokens


def test_several_choices(server: Server) -> None:
    def ask() -> list[str]:
        answer = server.client.completions.create(
            model="target", prompt=PROMPTS["stack"], max_tokens=48, n=3, seed=5, temperature=0.9
        )
        return [choice.text for choice in sorted(answer.choices, key=lambda c: c.index)]

    first = ask()
    assert len(set(first)) == 3
    assert ask() == first


def test_concurrent_clients_get_the_answers_of_a_lone_client(server: Server) -> None:
    jobs = [(prompt, kind, seed) for seed, prompt in enumerate(PROMPTS.values()) for kind in ("greedy", "seeded")]

    def ask(job: tuple[str, str, int]) -> list[int]:
        prompt, kind, seed = job
        settings = dict(GREEDY) if kind == "greedy" else {**SAMPLED, "seed": seed}
        return server.complete(prompt, 96, **settings).tokens

    alone = [ask(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, jobs))
    assert together == alone


def test_client_that_disconnects(server: Server) -> None:
    expected = server.complete(PROMPTS["walk"], 64, **GREEDY).tokens
    stream = server.client.completions.create(
        model="target",
        prompt=PROMPTS["retry"],
        max_tokens=900,
        stream=True,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    for _ in range(3):
        next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 30
    while running(server) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running(server) == 0
    assert server.complete(PROMPTS["walk"], 64, **GREEDY).tokens == expected


def messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": PROMPTS[prompt]}]


def chat(prompt: str, **settings: Any) -> Ask:
    """Asks for a whole chat answer; returns its reasoning, content, tool calls and why it ended."""

    def ask(server: Server) -> Any:
        answer = server.client.chat.completions.create(
            model="target", messages=messages(prompt), **{"max_tokens": 48} | settings
        )
        message = answer.choices[0].message
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
        return getattr(message, "reasoning", None), message.content, calls, answer.choices[0].finish_reason

    return ask


def streamed_chat(prompt: str, **settings: Any) -> Ask:
    """The same, put together from its parts."""

    def ask(server: Server) -> Any:
        stream = server.client.chat.completions.create(
            model="target", messages=messages(prompt), stream=True, **{"max_tokens": 48} | settings
        )
        reasoning, content, calls, finish = "", "", dict[int, list[str]](), None
        for chunk in stream:
            for choice in chunk.choices:
                reasoning += getattr(choice.delta, "reasoning", None) or ""
                content += choice.delta.content or ""
                finish = choice.finish_reason or finish
                for call in choice.delta.tool_calls or ():
                    parts = calls.setdefault(call.index, ["", ""])
                    parts[0] += call.function.name or ""
                    parts[1] += call.function.arguments or ""
        return reasoning or None, content or None, [tuple(parts) for parts in calls.values()], finish

    return ask


@pytest.mark.parametrize("sampling", ["greedy", "seeded"])
def test_chat(servers: dict[str, Server], sampling: str) -> None:
    settings = dict(GREEDY) if sampling == "greedy" else {**SAMPLED, "seed": 9}
    _, content, calls, _ = both(servers, chat("walk", **settings))
    assert content
    assert not calls
    assert both(servers, streamed_chat("walk", **settings))[1] == content


@pytest.mark.parametrize("choice", ["auto", "required", "named"])
def test_tool_calls(servers: dict[str, Server], choice: str) -> None:
    wanted: Any = {"type": "function", "function": {"name": "lookup"}} if choice == "named" else choice
    # Only strict tools constrain the arguments.
    tool = LOOKUP | {"function": LOOKUP["function"] | {"strict": choice != "auto"}}
    settings = {"tools": [tool], "tool_choice": wanted, "temperature": 0, "max_tokens": 120}
    _, content, calls, _ = both(servers, chat("retry", **settings))
    if choice == "named":
        ((name, arguments),) = calls
        assert name == "lookup"
        assert json.loads(arguments).keys() == {"word", "page"}
    else:
        # Told to call, this target calls until it is cut short, and vLLM then hands out the text.
        assert ("<tool_call>" in content) == (choice == "required")
    # Of an answer without reasoning, plain vLLM streams the text of the calls; so be it with trees.
    _, content, calls, _ = both(servers, streamed_chat("retry", **settings))
    assert (calls or "<tool_call>" in content) == (choice != "auto")


def test_reasoning(servers: dict[str, Server]) -> None:
    reasoning, content, _, _ = both(servers, chat("stack", **GREEDY, max_tokens=64))
    assert reasoning
    assert content


def test_responses(servers: dict[str, Server]) -> None:
    def whole(server: Server) -> Any:
        answer = server.client.responses.create(
            model="target", input=PROMPTS["walk"], max_output_tokens=48, temperature=0, store=False
        )
        return answer.output_text, answer.status

    def streamed(server: Server) -> str:
        stream = server.client.responses.create(
            model="target", input=PROMPTS["walk"], max_output_tokens=48, temperature=0, store=False, stream=True
        )
        return "".join(event.delta for event in stream if event.type == "response.output_text.delta")

    text, _ = both(servers, whole)
    assert text
    assert both(servers, streamed) == text


@pytest.mark.parametrize(
    "setting", [{"min_p": 0.1}, {"logit_bias": {"5": 1.0}}], ids=lambda setting: next(iter(setting))
)
def test_what_vllm_refuses_with_any_speculation(server: Server, setting: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError, match=r"speculative decoding"):
        server.client.completions.create(model="target", prompt="x", max_tokens=4, extra_body=setting)


def test_several_api_servers(servers: dict[str, Server], tmp_path: Path) -> None:
    """In processes of their own, in front of one engine; counters are those of all of them."""
    always = json.dumps({"tree": {"adaptive": False}})  # so that it is known how many trees there are at least
    arguments = [*TREES, "--speculative-config", always, "--max-model-len", "1024", "--enforce-eager"]
    arguments += ["--api-server-count", "2"]
    jobs = [(prompt, seed) for prompt in PROMPTS.values() for seed in (1, 2)]

    def ask(server: Server) -> list[list[int]]:
        def complete(job: tuple[str, int]) -> list[int]:
            return server.complete(job[0], 48, **SAMPLED, seed=job[1]).tokens

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(complete, jobs))

    with running_servers(EMBEDDED_TARGET, {"two": arguments}, tmp_path) as started:
        two = started["two"]
        assert ask(two) == ask(servers["plain"])
        trees = two.counter("vllm:jakiro_trees_total")
        assert trees == two.counter("vllm:spec_decode_num_drafts_total") > 100
        assert two.counter("vllm:jakiro_accepted_tokens_per_depth_total") > 0


def test_structured_output_has_trees(servers: dict[str, Server]) -> None:
    pattern = r"[a-z_]{3,12}(\.[a-z_]{3,12}){1,4}\(\)"

    def ask(server: Server) -> str:
        answer = server.client.completions.create(
            model="target",
            prompt="x = ",
            max_tokens=64,
            temperature=0,
            extra_body={"structured_outputs": {"regex": pattern}},
        )
        return answer.choices[0].text

    assert re.fullmatch(pattern, both(servers, ask))


def test_metrics(server: Server) -> None:
    server.complete(PROMPTS["cache"], 64, **GREEDY)
    text = metrics(server)
    trees = server.counter("vllm:jakiro_trees_total")
    accepted = server.counter("vllm:jakiro_accepted_tokens_per_depth_total")
    assert trees == server.counter("vllm:spec_decode_num_drafts_total") > 0
    assert accepted == server.counter("vllm:spec_decode_num_accepted_tokens_total") > 0
    depths = {
        int(depth): float(value)
        for depth, value in re.findall(
            r'^vllm:jakiro_accepted_tokens_per_depth_total\{.*depth="(\d+)".*\} (\S+)$', text, re.MULTILINE
        )
    }
    assert sorted(depths) == list(range(1, TreeConfig.node_budget + 1))  # of the longest continuation
    assert list(depths.values()) == sorted(depths.values(), reverse=True)
    assert depths[1] <= trees


def test_refusal_is_one_sentence(tmp_path: Path) -> None:
    head = tmp_path / "head"
    head.mkdir()
    (head / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(EMBEDDED_TARGET), "--speculative-model"]
    done = subprocess.run(
        [*command, str(head)], env=server_environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode != 0
    assert f"jakiro-vllm: {head}: no weights; expected model.safetensors or pytorch_model.bin" in done.stderr
    assert "Traceback" not in done.stderr


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    from jakiro_vllm.cli import main

    assert main(["inspect", str(EMBEDDED_HEAD), "--target", str(EMBEDDED_TARGET)]) == 0
    shown = capsys.readouterr().out
    assert "jakiro" in shown
    assert "fits" in shown
    assert main(["inspect", "/nowhere"]) == 1
    assert "neither a folder nor a hub name" in capsys.readouterr().err
