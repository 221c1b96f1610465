"""A storm of requests of every kind against the real server, each answer compared with plain vLLM's.

    .venv/bin/python benchmarks/storm.py --requests 10000 --seed 0 --output docs/results/storm.json

The embedded pair is served twice in fp32: with trees and a KV cache so small that vLLM preempts, and plainly.
Requests follow from the seed: completions, chats and responses, streamed and whole, greedy, seeded and unseeded, with
the settings that vLLM takes beside speculation; some are malformed, some are aborted, and some clients leave. Greedy
and seeded answers must be plain vLLM's to the token; the beginning of an answer that was cut short must be the
beginning of plain vLLM's; the rest must be well formed. A difference counts as a tie only if the target preferred one
token to the other by less than 1e-4 nats. After each wave no request may be left, nor a KV block in use.

A run that ``--minutes`` cut short goes on when it is started again with the same seed and output. Exit code: 0 if all
is well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jakiro_vllm import __version__
from jakiro_vllm.draft.registry import EMBEDDED_TARGET
from jakiro_vllm.server import Server
from jakiro_vllm.storm.compare import Tally
from jakiro_vllm.storm.drive import counters, memory, report, run_wave, settle, storm_cases, storm_servers
from jakiro_vllm.storm.margin import Judge

WAVE = 250
#: Requests after which memory is first measured: by then caches and allocators have grown.
WARM_UP = 1000
#: MiB that a server may have grown since then.
GROWTH = 64.0


def resume(output: Path, seed: int) -> tuple[Tally, list[dict[str, Any]]]:
    """What an earlier run with the same seed has found, and its sittings."""
    if not output.exists():
        return Tally(), []
    found = json.loads(output.read_text())
    if found["seed"] != seed:
        sys.exit(f"{output} has seed {found['seed']}; remove it, or name another file")
    return Tally(**{name: found[name] for name in vars(Tally())}), found["sittings"]


@contextlib.contextmanager
def servers_with_logs(folder: Path, output: Path) -> Iterator[dict[str, Server]]:
    """The storm's servers, whose logs are kept beside the report if it ends in an error, as when one of them dies."""
    with storm_servers(folder) as servers:
        try:
            yield servers
        except Exception:
            for side, server in servers.items():
                kept = output.with_suffix(f".{side}.log")
                shutil.copy(server.log, kept)
                print(f"the log of the server {side!r} is kept in {kept}", file=sys.stderr)
            raise


def sit(args: argparse.Namespace, tally: Tally, earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """Goes on with a storm until it is over or the time is up, writing the report after each wave."""
    started = time.monotonic()
    cases, judge = storm_cases(args.seed), Judge(EMBEDDED_TARGET)
    sitting: dict[str, Any] = {"first": tally.requests, "left": {}, "memory_mib": []}
    with tempfile.TemporaryDirectory() as folder, servers_with_logs(Path(folder), args.output) as servers:
        while tally.requests < args.requests and (time.monotonic() - started) / 60 < args.minutes:
            until = min(args.requests, tally.requests + WAVE)
            run_wave(servers, cases, range(tally.requests, until), args.concurrency, tally, judge)
            for side, server in servers.items():
                stays = {name: value for name, value in settle(server).items() if value}
                if stays:
                    sitting["left"][f"{side} after {until}"] = stays
            used = {side: round(memory(server), 1) for side, server in servers.items()}
            sitting["memory_mib"].append({"requests": until - sitting["first"], **used})
            sitting |= {"minutes": round((time.monotonic() - started) / 60, 1), **counters(servers["trees"])}
            found = report(
                tally,
                seed=args.seed,
                wanted=args.requests,
                concurrency=args.concurrency,
                versions={"jakiro-vllm": __version__, "vllm": version("vllm"), "torch": version("torch")},
                sittings=[*earlier, sitting],
            )
            args.output.write_text(json.dumps(found, indent=2) + "\n")
            print(
                f"{until} requests, {sitting['minutes']} min: {tally.compared} answers and {tally.beginnings} "
                f"beginnings compared, {len(tally.ties)} ties, {len(tally.differences)} differences, "
                f"{len(tally.faults)} faults, "
                f"{sitting['preemptions']:.0f} preemptions, {used} MiB",
                flush=True,
            )
    return sitting


def growth(sitting: dict[str, Any]) -> dict[str, float] | None:
    """MiB by which each server grew after the warm-up; None if the sitting was no longer than that."""
    warm = [row for row in sitting["memory_mib"] if row["requests"] >= WARM_UP]
    if len(warm) < 2:
        return None
    return {side: round(warm[-1][side] - warm[0][side], 1) for side in ("trees", "plain")}


def main() -> int:
    """Runs the storm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=12, help="more than run at once, so that some wait")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after the wave that passes this")
    parser.add_argument("--output", type=Path, default=Path("storm.json"))
    args = parser.parse_args()
    tally, earlier = resume(args.output, args.seed)
    sitting = sit(args, tally, earlier)
    grown = growth(sitting)
    print(f"grown since the first {WARM_UP} requests: {grown} MiB, allowed {GROWTH:.0f}")
    for wrong in (*tally.differences, *tally.faults)[:20]:
        print(json.dumps(wrong)[:1000])
    well = tally.clean and not sitting["left"] and (grown is None or grown["trees"] <= GROWTH)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
