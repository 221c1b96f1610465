"""The demo: the real server with trees beside plain vLLM, same prompts, same tokens.

Both servers run the whole time and take turns prompt by prompt, so that a machine whose speed drifts
treats both alike.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jakiro_vllm.draft.registry import EMBEDDED_HEAD, EMBEDDED_TARGET
from jakiro_vllm.server import Server, running_servers

#: Beginnings of Python code, written for this demo.
PROMPTS = {
    "stack": """\
class Stack:
    \"\"\"A last-in, first-out container.\"\"\"

    def __init__(self):
        self._items = []

""",
    "read_lines": """\
def read_lines(path, encoding="utf-8"):
    \"\"\"Return the lines of a text file.\"\"\"
""",
    "argparse": """\
import argparse
import sys


def main(argv=None):
    parser = argparse.ArgumentParser(""",
    "test_case": """\
import unittest


class StackTest(unittest.TestCase):
    def setUp(self):
        self.stack = Stack()

""",
    "point": """\
class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __repr__(self):
""",
    "retry": """\
def retry(function, attempts=3):
    for attempt in range(attempts):
        try:
            return function()
        except""",
    "cache": """\
class Cache(dict):
    def __getitem__(self, key):
        try:
            return super().__getitem__(key)
        except KeyError:
            self""",
    "walk": """\
import os


def find_files(root, suffix):
    for dirpath, dirnames, filenames in os.walk(root):
""",
}
GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "extra_body": {"top_k": 50}}


@dataclass
class Row:
    """One prompt on both sides.

    Attributes:
        prompt: its name.
        sampling: ``greedy`` or ``seeded``.
        tokens: answered with trees.
        trees: verified for it.
        accepted: draft tokens accepted for it.
        seconds: per side.
        identical: whether both sides gave the same tokens.
    """

    prompt: str
    sampling: str
    tokens: int
    trees: int
    accepted: int
    seconds: dict[str, float]
    identical: bool

    @property
    def acceptance_length(self) -> float:
        """Tokens per target forward, bonus token included."""
        return 1 + self.accepted / max(1, self.trees)


def run_demo(output: Path, max_tokens: int) -> int:
    """Runs the comparison, prints a table and writes ``output``.

    Returns:
        0 if every token was identical, 1 otherwise.
    """
    console = Console() if sys.stdout.isatty() else Console(width=100)
    sides: dict[str, list[str]] = {"plain": [], "jakiro": ["--speculative-model", str(EMBEDDED_HEAD)]}
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
        f"{rates['plain']:.0f} tokens/s at batch 1 ({result['speedup']:.2f}x). Written to {output}."
    )
    return 0 if result["identical"] else 1


def _compare(servers: dict[str, Server], max_tokens: int, console: Console) -> dict[str, Any]:
    for server in servers.values():  # the first request pays for what is set up lazily
        server.complete(PROMPTS["stack"], 16, **GREEDY)
    rows: list[Row] = []
    for kind, sampling in (("greedy", GREEDY), ("seeded", SAMPLED)):
        for name, prompt in PROMPTS.items():
            seed = {"seed": len(rows)} if kind == "seeded" else {}
            rows.append(_ask_both(servers, name, kind, prompt, max_tokens, sampling | seed, len(rows) % 2 == 0))
    _print_table(rows, max_tokens, console)
    rates = {side: statistics.median(row.tokens / row.seconds[side] for row in rows) for side in servers}
    return {
        "identical": all(row.identical for row in rows),
        "acceptance_length": 1 + sum(row.accepted for row in rows) / max(1, sum(row.trees for row in rows)),
        "tokens_per_second": {side: rates[side] for side in ("plain", "jakiro")},
        "speedup": statistics.median(row.seconds["plain"] / row.seconds["jakiro"] for row in rows),
        "dtype": "float32",
        "rows": [asdict(row) for row in rows],
    }


def _ask_both(
    servers: dict[str, Server],
    name: str,
    kind: str,
    prompt: str,
    max_tokens: int,
    sampling: dict[str, Any],
    plain_first: bool,
) -> Row:
    trees, accepted = _spec_counters(servers["jakiro"])
    order = ("plain", "jakiro") if plain_first else ("jakiro", "plain")
    answers = {side: servers[side].complete(prompt, max_tokens, **sampling) for side in order}
    new_trees, new_accepted = _spec_counters(servers["jakiro"])
    return Row(
        prompt=name,
        sampling=kind,
        tokens=len(answers["jakiro"].tokens),
        trees=new_trees - trees,
        accepted=new_accepted - accepted,
        seconds={side: answer.seconds for side, answer in answers.items()},
        identical=answers["plain"].tokens == answers["jakiro"].tokens and bool(answers["plain"].tokens),
    )


def _print_table(rows: list[Row], max_tokens: int, console: Console) -> None:
    table = Table(title=f"Same prompts, one at a time, up to {max_tokens} tokens")
    for column in ("prompt", "sampling"):
        table.add_column(column)
    for column in ("tokens", "acceptance", "plain tok/s", "jakiro tok/s", "ratio", "identical"):
        table.add_column(column, justify="right")
    for row in rows:
        plain, jakiro = row.seconds["plain"], row.seconds["jakiro"]
        table.add_row(
            row.prompt,
            row.sampling,
            str(row.tokens),
            f"{row.acceptance_length:.2f}",
            f"{row.tokens / plain:.0f}",
            f"{row.tokens / jakiro:.0f}",
            f"{plain / jakiro:.2f}",
            "yes" if row.identical else "NO",
        )
    console.print(table)


def _spec_counters(server: Server) -> tuple[int, int]:
    return (
        int(server.counter("vllm:spec_decode_num_drafts_total")),
        int(server.counter("vllm:spec_decode_num_accepted_tokens_total")),
    )
