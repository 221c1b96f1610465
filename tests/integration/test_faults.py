"""What goes wrong around a server costs errors or time, never a wrong token: dead engines, full caches, cut streams."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from published_heads import published_head, write_head
from safetensors.torch import load_file, save_file

from jakiro_vllm.draft.registry import EMBEDDED_HEAD, EMBEDDED_TARGET
from jakiro_vllm.environment import server_environment
from jakiro_vllm.server import Server
from jakiro_vllm.storm.cases import COMPLETIONS, MALFORMED, Case
from jakiro_vllm.storm.client import Answer, ask_all
from jakiro_vllm.storm.compare import compare, faults
from jakiro_vllm.storm.drive import MAX_MODEL_LEN, settle, storm_cases, storm_servers
from jakiro_vllm.storm.margin import Judge

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]

#: Seconds for a server to notice something; nothing waits that long where all is well.
PATIENCE = 120.0


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """With trees and a cache of two and a half requests, and plainly."""
    with storm_servers(tmp_path_factory.mktemp("servers")) as started:
        yield started


@pytest.fixture(scope="module")
def judge() -> Judge:
    """Tells how close two tokens were."""
    return Judge(EMBEDDED_TARGET)


def long_requests(count: int, max_tokens: int = 200) -> list[Case]:
    """Requests that go on for long, every second one seeded, every second pair streamed."""
    documents = storm_cases(0).documents
    found = []
    for i in range(count):
        start = 37 * i
        body: dict[str, Any] = {
            "model": "target",
            "prompt": documents[i % len(documents)][start : start + 30 + 11 * i],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "return_token_ids": True,
            "temperature": 0.8 * (i % 2),
        }
        if i % 2:
            body |= {"seed": i, "top_p": 0.9}
        if i // 2 % 2:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        found.append(Case(i, "long", COMPLETIONS, body))
    return found


def ask(server: Server, cases: list[Case], obey: bool = True, name: str = "fault") -> list[Answer]:
    """Sends all requests at once."""
    return asyncio.run(ask_all(f"http://127.0.0.1:{server.port}", cases, len(cases), name, obey))


def check(cases: list[Case], plain: list[Answer], trees: list[Answer], judge: Judge) -> None:
    """Every answer with trees, or its beginning, is plain vLLM's."""
    for case, expected, found in zip(cases, plain, trees, strict=True):
        assert expected.complete
        assert [d for d in compare(case, expected, found, judge) if not d.tie] == []


def wait_for(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.1)


def test_a_cache_that_is_too_small_changes_no_token(servers: dict[str, Server], judge: Judge) -> None:
    cases = long_requests(16)
    preempted = servers["trees"].counter("vllm:num_preemptions_total")
    trees = ask(servers["trees"], cases)
    assert servers["trees"].counter("vllm:num_preemptions_total") > preempted + 3
    assert all(answer.complete for answer in trees)
    check(cases, ask(servers["plain"], cases, obey=False), trees, judge)
    assert not any(settle(servers["trees"]).values())


@pytest.mark.parametrize("fate", ["cut", "abort"])
def test_clients_that_leave_free_their_blocks_and_disturb_nobody(
    fate: str, servers: dict[str, Server], judge: Judge
) -> None:
    cases = long_requests(8)
    leaving = [replace(c, fate=fate, chunks=4, body=c.fields | {"stream": True}) for c in cases[::2]]
    mixed = [case for pair in zip(leaving, cases[1::2], strict=True) for case in pair]
    trees = ask(servers["trees"], mixed)
    ends = [answer.choices[0].finish if answer.complete else answer.error for answer in trees]
    assert [end == "length" for end in ends] == [False, True] * 4, ends
    assert all(answer.choices[0].tokens for answer in trees)
    check(mixed, ask(servers["plain"], mixed, obey=False), trees, judge)
    assert not any(settle(servers["trees"]).values())


def test_malformed_requests_are_refused_and_disturb_nobody(servers: dict[str, Server], judge: Judge) -> None:
    cases = long_requests(6, max_tokens=100)
    wrong = [
        Case(i, name, path, body if isinstance(body, bytes) else {"model": "target"} | body, "malformed")
        for i, (name, (path, body)) in enumerate(MALFORMED.items())
    ]
    mixed = [*cases[:3], *wrong, *cases[3:]]
    trees = ask(servers["trees"], mixed)
    for case, answer in zip(mixed, trees, strict=True):
        assert faults(case, answer, 4096, MAX_MODEL_LEN) == [], case.kind
    kept = [*trees[:3], *trees[-3:]]
    check(cases, ask(servers["plain"], cases, obey=False), kept, judge)


def part_of(server: Server, name: str) -> psutil.Process:
    """A process of the server, by what vLLM calls it."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    return next(process for process in family if name in " ".join(process.cmdline()))


def outcome(answer: Answer) -> str:
    """What a client sees of an answer that it does not get."""
    if answer.complete:
        return "complete"
    return "an error in the stream" if answer.status == 200 else f"status {answer.status}"


@pytest.mark.parametrize("victim", ["EngineCore", "Worker"])
def test_a_killed_engine_gives_errors_and_no_wrong_token(victim: str, tmp_path: Path, judge: Judge) -> None:
    """Killed under load, the server with trees tells its clients what plain vLLM tells them, and ends as it does."""
    cases = [c for c in long_requests(8, max_tokens=400) if len(c.fields["prompt"]) < 110]
    with storm_servers(tmp_path) as started, ThreadPoolExecutor(1) as pool:
        expected = ask(started["plain"], cases, obey=False)
        seen: dict[str, list[Answer]] = {}
        for side, server in started.items():
            generated = server.counter("vllm:generation_tokens_total")
            asking = pool.submit(ask, server, cases, True, "killed")

            def under_load(server: Server = server, since: float = generated) -> bool:
                return server.counter("vllm:generation_tokens_total") > since + 50

            wait_for(under_load, "requests under way")
            part_of(server, victim).kill()
            seen[side] = asking.result(PATIENCE)
            wait_for(lambda server=server: server.process.poll() is not None, f"the end of the server, {side}")
            assert outcome(ask(server, cases[:1])[0]) == "status 0"
        begun = [i for i, answer in enumerate(seen["trees"]) if answer.status == 200]
        check([cases[i] for i in begun], [expected[i] for i in begun], [seen["trees"][i] for i in begun], judge)
        assert any(answer.choices for answer in seen["trees"]), "nothing was streamed before the end"
        assert not any(answer.complete for answer in seen["trees"])
        assert {outcome(a) for a in seen["trees"]} == {outcome(a) for a in seen["plain"]}
        assert started["trees"].process.returncode == started["plain"].process.returncode


@pytest.mark.parametrize("what", ["overflow", "constant"])
def test_a_broken_head_costs_drafts_but_no_token(
    what: str,
    run_engines: Callable[..., Any],
    plain_engine: dict[str, Any],
    jakiro_engine: dict[str, Any],
    source_tokens: list[int],
    tmp_path: Path,
) -> None:
    """Weights that are not finite are refused; finite ones can still overflow, and every draft is then nonsense."""
    head = tmp_path / "head"
    head.mkdir()
    (head / "config.json").write_text((EMBEDDED_HEAD / "config.json").read_text())
    tensors = {name: t.float() for name, t in load_file(EMBEDDED_HEAD / "model.safetensors").items()}
    changed = {name: t * 1e36 if what == "overflow" else torch.zeros_like(t) for name, t in tensors.items()}
    assert all(t.isfinite().all() for t in changed.values())
    save_file(changed, head / "model.safetensors")
    broken = jakiro_engine | {"speculative_config": jakiro_engine["speculative_config"] | {"model": str(head)}}
    requests = [
        {
            "prompt": source_tokens[50 * i : 50 * i + 20 + 9 * i],
            "sampling": {"max_tokens": 40, "temperature": 0.8 * (i % 2)} | ({"seed": i} if i % 2 else {}),
        }
        for i in range(12)
    ]
    phase = {"requests": requests}
    (plain,), (trees, _) = run_engines([(plain_engine, [phase]), (broken, [phase])])
    assert [a["tokens"] for a in trees["requests"]] == [a["tokens"] for a in plain["requests"]]
    seen = trees["acceptance"]
    assert seen["drafts"] > 100
    assert seen["accepted"] < 0.3 * seen["drafts"]


class Touch:
    """Creates a file when it is unpickled by an ordinary unpickler."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_serving_a_head_of_pickled_code_does_not_run_it(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    config, tensors = published_head("jakiro")
    folder = write_head(tmp_path / "head", config, tensors, "bin")
    torch.save({**tensors, "trap": Touch(trap)}, folder / "pytorch_model.bin")
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(EMBEDDED_TARGET), "--speculative-model"]
    done = subprocess.run(
        [*command, str(folder)], env=server_environment(), capture_output=True, text=True, timeout=480, check=False
    )
    assert done.returncode != 0
    assert "never loaded" in done.stderr
    assert "Traceback" not in done.stderr
    assert not trap.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert trap.exists(), "the trap does not work"
