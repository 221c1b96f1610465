"""Throughput and latency behind the HTTP server, by concurrency: trees, chains, vLLM's own speculation, plain vLLM.

    .venv/bin/python benchmarks/serving.py --rounds 3 --output build/serving.csv

A server per side, all up at once. At each concurrency the client of ``vllm bench serve`` drives them one after the
other, round by round, each round beginning with another side; all get the same prompts, cut from files that no training
has seen, and complete each with --max-tokens tokens. The client is called in this process rather than as a command, so
that it does not load vLLM anew for every row; what it is given is ``client_arguments``.

One CSV row per side, concurrency and round: output tokens per second, time to the first token (TTFT) and per token
thereafter (TPOT) in milliseconds. Medians and quartiles over rounds go to .json and .md, and a plot of the ratios to
.png. Ratios are paired by round: to plain vLLM, and to the best of vLLM's own sides in that round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jakiro_vllm.errors import JakiroError
from jakiro_vllm.server import Server

sys.path.append(str(Path(__file__).resolve().parent / "shared"))

from sides import (
    LABELS,
    STOCK,
    Spread,
    add_pair_options,
    add_server_options,
    add_side_options,
    chosen_sides,
    conditions,
    held_out_texts,
    markdown,
    new_figure,
    rotated,
    running_sides,
    save_figure,
    server_arguments,
    write_report,
)

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
#: What a row has of the client's report.
FIGURES = ("output_throughput", "p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms")


def client_arguments(
    port: int, target: str, prompts: Path, count: int, concurrency: int, max_tokens: int, temperature: float, seed: int
) -> list[str]:
    """Arguments of ``vllm bench serve`` for one row.

    Args:
        port: of the server.
        target: folder or name, for its tokenizer.
        prompts: JSON lines with ``prompt``.
        count: prompts that are sent.
        concurrency: requests under way.
        max_tokens: of a completion.
        temperature: of the sampling.
        seed: of every request's sampling.
    """
    return [
        *("--backend", "openai", "--endpoint", "/v1/completions"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--model", "target", "--tokenizer", target),
        *("--dataset-name", "custom", "--dataset-path", str(prompts), "--skip-chat-template", "--disable-shuffle"),
        *("--num-prompts", str(count), "--custom-output-len", str(max_tokens), "--ignore-eos"),
        *("--max-concurrency", str(concurrency), "--temperature", str(temperature)),
        *("--extra-body", json.dumps({"seed": seed})),
        *("--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,99", "--disable-tqdm"),
    ]


def drive(arguments: Sequence[str], log: Path) -> dict[str, Any]:
    """Runs the client of ``vllm bench serve``; what it prints goes to a file.

    Raises:
        JakiroError: if a request failed.
    """
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    with log.open("w") as out, contextlib.redirect_stdout(out):
        found: dict[str, Any] = serve.main(parser.parse_args(list(arguments)))
    if found["failed"]:
        raise JakiroError(f"{found['failed']} requests failed at concurrency {found['max_concurrency']}")
    return found


def measure(servers: dict[str, Server], args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row per concurrency, round and side."""
    most = max(needed(concurrency, args) for concurrency in args.concurrencies)
    prompts = folder / "prompts.jsonl"
    texts = held_out_texts(args.target, most, args.seed)
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))

    def run(side: str, concurrency: int, count: int) -> dict[str, Any]:
        how = (count, concurrency, args.max_tokens, args.temperature, args.seed)
        arguments = client_arguments(servers[side].port, args.target, prompts, *how)
        return drive(arguments, folder / "client.log")

    rows = []
    for concurrency in args.concurrencies:
        for side in servers:  # the first batch of a size pays for what is set up lazily
            run(side, concurrency, concurrency)
        for number in range(args.rounds):
            for side in rotated(servers, number):
                found = run(side, concurrency, needed(concurrency, args))
                row = {"side": side, "concurrency": concurrency, "round": number, "requests": found["completed"]}
                rows.append(row | {name: round(float(found[name]), 3) for name in FIGURES})
                print(rows[-1], flush=True)
    return rows


def needed(concurrency: int, args: argparse.Namespace) -> int:
    """Prompts of a run: so many that its beginning and end, where fewer are under way, weigh little."""
    return max(args.prompts, args.waves * concurrency)


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per concurrency and side: spreads over rounds, and ratios of throughput paired by round."""
    found = []
    for concurrency in sorted({row["concurrency"] for row in rows}):
        here = [row for row in rows if row["concurrency"] == concurrency]
        throughput = {(row["side"], row["round"]): row["output_throughput"] for row in here}
        sides = [name for name in LABELS if any(row["side"] == name for row in here)]
        rivals = [name for name in sides if name in STOCK]
        for side in sides:
            own = [row for row in here if row["side"] == side]
            line: dict[str, Any] = {"concurrency": concurrency, "side": side, "rounds": len(own)}
            for name in FIGURES:
                line |= Spread.of([row[name] for row in own]).columns(name)
            if "plain" in rivals:
                ratios = [row["output_throughput"] / throughput["plain", row["round"]] for row in own]
                line |= Spread.of(ratios).columns("to_plain")
            if rivals:
                best = {row["round"]: max(throughput[name, row["round"]] for name in rivals) for row in own}
                ratios = [row["output_throughput"] / best[row["round"]] for row in own]
                line |= Spread.of(ratios).columns("to_best_stock")
            found.append(line)
    return found


def table_of(summary: list[dict[str, Any]]) -> str:
    """The summary as Markdown: medians over rounds, with quartiles in parentheses where they are ratios' or rates'."""
    ratios = {"to_plain": "to plain vLLM", "to_best_stock": "to the best of vLLM's own"}
    ratios = {name: title for name, title in ratios.items() if name in summary[0]}
    header = ["concurrency", "side", "output tokens/s", *ratios.values()]
    lines = [
        [
            line["concurrency"],
            LABELS[line["side"]],
            Spread.read(line, "output_throughput").cell(1),
            *(Spread.read(line, name).cell() for name in ratios),
            *(f"{line[f'p50_{name}_ms']:.1f} / {line[f'p99_{name}_ms']:.1f}" for name in ("ttft", "tpot")),
        ]
        for line in summary
    ]
    return markdown([*header, "TTFT p50 / p99, ms", "TPOT p50 / p99, ms"], lines)


def plot(summary: list[dict[str, Any]], path: Path) -> None:
    """Ratio of throughput to plain vLLM over concurrency, quartiles shaded; tokens/s without plain vLLM."""
    value, label = "output_throughput", "output tokens/s"
    if "to_plain" in summary[0]:
        value, label = "to_plain", "throughput to plain vLLM"
    figure, axes = new_figure(1, 1, 7.5, 4.5)
    axis = axes[0][0]
    for side in LABELS:
        lines = [line for line in summary if line["side"] == side]
        if not lines:
            continue
        places = [line["concurrency"] for line in lines]
        spreads = [Spread.read(line, value) for line in lines]
        (drawn,) = axis.plot(places, [s.median for s in spreads], marker="o", label=LABELS[side])
        axis.fill_between(
            places, [s.low for s in spreads], [s.high for s in spreads], alpha=0.2, color=drawn.get_color()
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(places, [str(place) for place in places])
    axis.set(xlabel="concurrency", ylabel=label)
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)


def main() -> int:
    """Starts the servers, drives all of them, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_options(parser, "serving.csv")
    add_server_options(parser)
    add_side_options(parser)
    parser.add_argument("--concurrencies", type=int, nargs="+", default=list(CONCURRENCIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=16, help="of a run, at least")
    parser.add_argument("--waves", type=int, default=4, help="prompts of a run per concurrent request, at least")
    parser.add_argument("--max-tokens", type=int, default=128, help="of a completion")
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    chosen = chosen_sides(args, parser)
    most = max(args.concurrencies)
    arguments = {n: server_arguments(config, args, most, args.max_tokens) for n, config in chosen.items()}
    with tempfile.TemporaryDirectory() as folder, running_sides(args.target, arguments, Path(folder)) as servers:
        rows = measure(servers, args, Path(folder))
    summary = summarise(rows)
    write_report(args.output, rows, conditions(args), summary, table_of(summary))
    plot(summary, args.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
