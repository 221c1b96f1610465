"""A real ``vllm serve`` as a child process, with a client: for the demo and the tests."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import OpenAI

from jakiro_vllm.environment import server_environment
from jakiro_vllm.errors import JakiroError

START_TIMEOUT_S = 480.0


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

    def complete(self, prompt: str, max_tokens: int, **sampling: Any) -> Completion:
        """Streams one completion."""
        extra = {"return_token_ids": True, **sampling.pop("extra_body", {})}
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
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=20)
        # A server that ended otherwise than asked, or was still starting, leaves its engine behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tail(log: Path, lines: int = 60) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
