"""The HTTP path, with the real server and the ``openai`` client."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jakiro_vllm.demo import GREEDY, PROMPTS, SAMPLED
from jakiro_vllm.draft.registry import EMBEDDED_HEAD, EMBEDDED_TARGET
from jakiro_vllm.environment import server_environment
from jakiro_vllm.server import Server, running_servers

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``vllm serve`` with the embedded pair."""
    arguments = ["--speculative-model", "jakiro", "--max-model-len", "1024", "--enforce-eager"]
    with running_servers(EMBEDDED_TARGET, {"jakiro": arguments}, tmp_path_factory.mktemp("server")) as servers:
        yield servers["jakiro"]


def metrics(server: Server) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as response:
        return response.read().decode()


def running(server: Server) -> float:
    return server.counter("vllm:num_requests_running")


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


def test_chat(server: Server) -> None:
    answer = server.client.chat.completions.create(
        model="target", messages=[{"role": "user", "content": PROMPTS["point"]}], max_tokens=32, temperature=0
    )
    assert answer.choices[0].message.content


def test_structured_output_is_served_without_drafts(server: Server) -> None:
    before = server.counter("vllm:spec_decode_num_drafts_total")
    answer = server.client.completions.create(
        model="target",
        prompt="x = ",
        max_tokens=32,
        temperature=0,
        extra_body={"structured_outputs": {"regex": r"[0-9]{3}\.[0-9]{2}"}},
    )
    assert re.fullmatch(r"[0-9]{3}\.[0-9]{2}", answer.choices[0].text)
    assert server.counter("vllm:spec_decode_num_drafts_total") == before


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
    assert sorted(depths) == [1, 2, 3, 4, 5, 6]
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
