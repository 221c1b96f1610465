"""Sends a storm wave by wave, first to the server with trees, then what has a certain answer to a plain one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from jakiro_vllm.draft.registry import EMBEDDED_HEAD, EMBEDDED_TARGET
from jakiro_vllm.errors import JakiroError
from jakiro_vllm.server import Server, running_servers
from jakiro_vllm.storm.cases import Case, Cases
from jakiro_vllm.storm.client import Answer, ask_all
from jakiro_vllm.storm.compare import Margin, Tally

MAX_MODEL_LEN = 512
#: Room for two and a half requests of the maximum length, where eight may run: vLLM preempts and computes again.
BLOCKS, BLOCK_SIZE = 40, 32
TREE = {"num_speculative_tokens": 24, "tree": {"depth": 6, "top_k": 8}}
_BOTH = (
    *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8", "--block-size", str(BLOCK_SIZE)),
    *("--enforce-eager", "--enable-scale-out"),  # which has the endpoint that aborts
)
SIDES = {
    "trees": [
        *_BOTH,
        *("--speculative-config", json.dumps({"method": "jakiro", "model": str(EMBEDDED_HEAD), **TREE})),
        *("--num-gpu-blocks-override", str(BLOCKS)),
        *("--max-num-batched-tokens", "160"),  # chunks prompts, and cuts trees
    ],
    # Its budget holds every prompt at once: vLLM 0.32 ends the CPU engine when a seeded request's prompt is chunked.
    "plain": [*_BOTH, "--max-num-batched-tokens", str(8 * MAX_MODEL_LEN), "--kv-cache-memory-bytes", str(1 << 28)],
}
#: Seconds for the last aborted request to leave the engine.
SETTLING = 60.0
COUNTERS = {
    "trees": "vllm:jakiro_trees_total",
    "accepted_tokens": "vllm:jakiro_accepted_tokens_per_depth_total",
    "preemptions": "vllm:num_preemptions_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",
}


@contextlib.contextmanager
def storm_servers(folder: Path) -> Iterator[dict[str, Server]]:
    """The embedded pair with trees and a tiny cache, and its target alone."""
    with running_servers(EMBEDDED_TARGET, SIDES, folder) as servers:
        yield servers


def storm_cases(seed: int) -> Cases:
    """The requests for these servers."""
    return Cases(EMBEDDED_TARGET, seed, MAX_MODEL_LEN)


def send_wave(servers: dict[str, Server], cases: Sequence[Case], concurrency: int, prefix: str) -> list[Answer]:
    """Sends requests to the server with trees, each to its fate."""
    return asyncio.run(ask_all(_url(servers["trees"]), cases, concurrency, prefix))


def plain_answers(servers: dict[str, Server], cases: Sequence[Case], concurrency: int) -> dict[str, Answer]:
    """What plain vLLM says to the requests that have a certain answer, by their keys; equal ones are asked once."""
    chosen = list({case.key: case for case in cases if case.exact}.values())
    answers = asyncio.run(ask_all(_url(servers["plain"]), chosen, concurrency, "plain", obey=False))
    return {case.key: answer for case, answer in zip(chosen, answers, strict=True)}


def run_wave(
    servers: dict[str, Server], cases: Cases, indices: Sequence[int], concurrency: int, tally: Tally, margin: Margin
) -> None:
    """Sends a wave to both servers, one after the other, and counts what comes back.

    Args:
        servers: ``trees`` and ``plain``.
        cases: makes the requests.
        indices: of the requests.
        concurrency: requests under way at once.
        tally: receives the counts.
        margin: tells how close two tokens were.
    """
    wave = [cases.case(index) for index in indices]
    trees = send_wave(servers, wave, concurrency, f"storm{indices[0]}-")
    plain = plain_answers(servers, wave, concurrency)
    for case, answer in zip(wave, trees, strict=True):
        expected = plain[case.key] if case.exact else None
        if expected is not None and expected.status == 0:
            raise JakiroError(f"plain vLLM did not answer request {case.index}: {expected.error}")
        tally.add(case, answer, expected, margin, cases.vocab_size, cases.max_model_len)


def settle(server: Server) -> dict[str, float]:
    """Waits until no request runs or waits and no KV block is in use.

    Returns:
        What remains, by metric: zeros, unless it stays.
    """
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    deadline = time.monotonic() + SETTLING
    while True:
        left = {name: server.counter(name) for name in names}
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def memory(server: Server) -> float:
    """Memory of the server's processes that they share with no other, in MiB."""
    parent = psutil.Process(server.process.pid)
    family = [parent, *parent.children(recursive=True)]
    return sum(process.memory_full_info().uss for process in family) / 2**20


def engine_core(server: Server) -> psutil.Process:
    """The process of the server that computes."""
    for child in psutil.Process(server.process.pid).children(recursive=True):
        if "EngineCore" in " ".join(child.cmdline()) or "EngineCore" in child.name():
            return child
    raise JakiroError("the server has no engine process")


def counters(server: Server) -> dict[str, float]:
    """What the server with trees has counted since it started."""
    return {name: server.counter(metric) for name, metric in COUNTERS.items()}


def report(tally: Tally, **more: Any) -> dict[str, Any]:
    """A storm's result, for JSON."""
    found = asdict(tally)
    found["kinds"] = dict(sorted(tally.kinds.items()))
    return {"clean": tally.clean, **more, **found}


def _url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"
