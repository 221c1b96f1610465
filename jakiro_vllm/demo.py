"""The demo: the real server with trees beside plain vLLM, same prompts, same tokens.

Both servers run the whole time and take turns prompt by prompt, so that a machine whose speed drifts
treats both alike.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from jakiro_vllm.draft.registry import EMBEDDED_HEAD, EMBEDDED_TARGET
from jakiro_vllm.environment import server_environment
from jakiro_vllm.errors import JakiroError

START_TIMEOUT_S = 240.0

PROMPTS = {
    "stack": 'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self):\n        self._items = []\n\n',
    "read_lines": 'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a text file."""\n',
    "argparse": "import argparse\nimport sys\n\n\ndef main(argv=None):\n    parser = argparse.ArgumentParser(",
    "test_case": "import unittest\n\n\nclass StackTest(unittest.TestCase):\n    def setUp(self):\n        self.stack = Stack()\n\n",
    "point": "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n    def __repr__(self):\n",
    "retry": "def retry(function, attempts=3):\n    for attempt in range(attempts):\n        try:\n",
    "cache": "class Cache(dict):\n    def __getitem__(self, key):\n        try:\n            return super().__getitem__(key)\n        except KeyError:\n",
    "walk": "import os\n\n\ndef find_files(root, suffix):\n    for dirpath, dirnames, filenames in os.walk(root):\n",
}
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "extra_body": {"top_k": 50}}


@dataclass
class Completion:
    """One streamed answer.

    Attributes:
        tokens: token ids.
        seconds: from the request to the last chunk.
    """

    tokens: list[int]
    seconds: float


@dataclass
class Server:
    """A running ``vllm serve``.

    Attributes:
        port: on the loopback interface.
        log: where it writes.
        process: of the API server.
    """

    port: int
    log: Path
    process: subprocess.Popen[bytes]
    client: OpenAI = field(init=False)

    def __post_init__(self) -> None:
        self.client = OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def wait(self, deadline: float) -> None:
        """Returns when the server answers.

        Raises:
            JakiroError: if it ends, or does not answer in time.
        """
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2)
                return
            if self.process.poll() is not None:
                raise JakiroError(f"the server ended with code {self.process.returncode}:\n{_tail(self.log)}")
            if time.monotonic() > deadline:
                raise JakiroError(f"the server did not answer within {START_TIMEOUT_S:.0f} s:\n{_tail(self.log)}")
            time.sleep(0.5)

    def complete(self, prompt: str, max_tokens: int, **sampling: object) -> Completion:
        """Streams one completion."""
        extra = {"return_token_ids": True, **sampling.pop("extra_body", {})}  # type: ignore[dict-item]
        started = time.perf_counter()
        stream = self.client.completions.create(
            model="target", prompt=prompt, max_tokens=max_tokens, stream=True, extra_body=extra, **sampling
        )
        tokens: list[int] = []
        for chunk in stream:
            for choice in chunk.choices:
                tokens += getattr(choice, "token_ids", None) or []
        return Completion(tokens, time.perf_counter() - started)

    def counter(self, name: str) -> float:
        """Sum of a Prometheus counter over its labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as response:
            text = response.read().decode()
        return sum(float(v) for v in re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))

    def stop(self) -> None:
        """Ends the server and its engine."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def start_server(target: Path, arguments: list[str], log: Path) -> Server:
    """Starts ``vllm serve`` on a free loopback port."""
    port = _free_port()
    command = [
        *(str(Path(sys.executable).parent / "vllm"), "serve", str(target)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "target"),
        *("--dtype", "float32", "--max-num-seqs", "16", "--gpu-memory-utilization", "0.1"),
        *arguments,
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=server_environment(), start_new_session=True
        )
    return Server(port, log, process)


@contextlib.contextmanager
def running_servers(target: Path, sides: dict[str, list[str]], folder: Path) -> Iterator[dict[str, Server]]:
    """Starts one server per side, together, and stops them at the end."""
    servers: dict[str, Server] = {}
    try:
        for name, arguments in sides.items():
            servers[name] = start_server(target, arguments, folder / f"{name}.log")
        deadline = time.monotonic() + START_TIMEOUT_S
        for server in servers.values():
            server.wait(deadline)
        yield servers
    finally:
        for server in servers.values():
            server.stop()


def run_demo(output: Path, max_tokens: int) -> int:
    """Runs the comparison, prints a table and writes ``output``.

    Returns:
        0 if every token was identical, 1 otherwise.
    """
    console = Console()
    sides = {"plain": [], "jakiro": ["--speculative-model", str(EMBEDDED_HEAD)]}
    console.print("Starting two servers with the embedded target (fp32): plain vLLM, and vLLM with Jakiro trees ...")
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        with running_servers(EMBEDDED_TARGET, sides, Path(folder)) as servers:
            console.print(f"Both answer after {time.monotonic() - started:.0f} s. Streaming completions ...")
            result = _compare(servers, max_tokens, console)
    output.write_text(json.dumps(result, indent=2) + "\n")
    rates = result["tokens_per_second"]
    console.print(
        f"[bold]{'identical' if result['identical'] else 'DIFFERENT'}[/bold]: acceptance length "
        f"{result['acceptance_length']:.2f} tokens per target forward; {rates['jakiro']:.0f} against "
        f"{rates['plain']:.0f} tokens/s at batch 1 ({rates['jakiro'] / rates['plain']:.2f}x). Written to {output}."
    )
    return 0 if result["identical"] else 1


def _compare(servers: dict[str, Server], max_tokens: int, console: Console) -> dict:
    jakiro, plain = servers["jakiro"], servers["plain"]
    for server in servers.values():  # the first request pays for what is set up lazily
        server.complete(PROMPTS["stack"], 16, **GREEDY)
    table = Table(title=f"Same prompts, one at a time, up to {max_tokens} tokens")
    for column in ("prompt", "sampling", "tokens", "acceptance", "plain tok/s", "jakiro tok/s", "ratio", "identical"):
        table.add_column(column, justify="left" if column in ("prompt", "sampling") else "right")
    rows, seed = [], 0
    for kind, sampling in (("greedy", GREEDY), ("seeded", SAMPLED)):
        for name, prompt in PROMPTS.items():
            seed += 1
            settings = dict(sampling) | ({"seed": seed} if kind == "seeded" else {})
            order = (plain, jakiro) if seed % 2 else (jakiro, plain)
            drafts, accepted = _spec_counters(jakiro)
            answers = {id(server): server.complete(prompt, max_tokens, **settings) for server in order}
            a, b = answers[id(plain)], answers[id(jakiro)]
            new_drafts, new_accepted = _spec_counters(jakiro)
            row = {
                "prompt": name,
                "sampling": kind,
                "tokens": len(b.tokens),
                "drafts": new_drafts - drafts,
                "accepted": new_accepted - accepted,
                "seconds": {"plain": a.seconds, "jakiro": b.seconds},
                "identical": a.tokens == b.tokens and len(a.tokens) > 0,
            }
            rows.append(row)
            table.add_row(
                name,
                kind,
                str(row["tokens"]),
                f"{1 + row['accepted'] / max(1, row['drafts']):.2f}",
                f"{len(a.tokens) / a.seconds:.0f}",
                f"{len(b.tokens) / b.seconds:.0f}",
                f"{a.seconds / b.seconds:.2f}",
                "yes" if row["identical"] else "NO",
            )
    console.print(table)
    tokens = [row["tokens"] for row in rows]
    return {
        "identical": all(row["identical"] for row in rows),
        "acceptance_length": 1 + sum(r["accepted"] for r in rows) / max(1, sum(r["drafts"] for r in rows)),
        "tokens_per_second": {
            side: statistics.median(n / r["seconds"][side] for n, r in zip(tokens, rows, strict=True))
            for side in ("plain", "jakiro")
        },
        "dtype": "float32",
        "rows": rows,
    }


def _spec_counters(server: Server) -> tuple[float, float]:
    return (
        server.counter("vllm:spec_decode_num_drafts_total"),
        server.counter("vllm:spec_decode_num_accepted_tokens_total"),
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
