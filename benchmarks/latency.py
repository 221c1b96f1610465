"""One request at a time: tokens per second of trees, chains, vLLM's own speculation and plain vLLM.

    .venv/bin/python benchmarks/latency.py --prompts 64 --output build/latency.csv

A server per side, all up at once; they take turns prompt by prompt, each prompt beginning with another side, so that a
machine whose speed drifts treats all alike. Prompts are cut from files that no training has seen, completions all have
--max-tokens tokens; greedy, then at temperature 1 with a seed per prompt. Seconds are the client's, from the request to
the last token, prompt included. Ratios are paired by prompt.

One CSV row per answer; medians and quartiles over prompts go to .json and .md, and a plot to .png. The acceptance
length comes from /metrics: tokens per verification, bonus token included; a step for which n-gram found nothing to
propose is no verification. With a dense head (--dense-head) vLLM's EAGLE chain is a side,
as long as the method's trees are deep, and once more as long as an adaptive tree may become. Pairs that
``benchmarks/cost_scaled.py`` makes are measured by --target, --head and --dense-head.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jakiro_vllm.server import Completion, Server

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

TEMPERATURES = (0.0, 1.0)
WARM_UP = 2
#: Sides that all others are compared with.
RIVALS = ("plain", "ngram", "eagle", "eagle-long")


def counters(server: Server) -> tuple[int, int]:
    """Verifications and accepted draft tokens since the server started."""
    names = ("vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_total")
    drafts, accepted = (int(server.counter(name)) for name in names)
    return drafts, accepted


def ask(server: Server, prompt: str, max_tokens: int, temperature: float, seed: int) -> tuple[Completion, int, int]:
    """An answer, its verifications and its accepted draft tokens."""
    drafts, accepted = counters(server)
    extra = {"ignore_eos": True}
    answer = server.complete(prompt, max_tokens, temperature=temperature, seed=seed, extra_body=extra)
    new_drafts, new_accepted = counters(server)
    return answer, new_drafts - drafts, new_accepted - accepted


def measure(
    servers: dict[str, Server],
    prompts: list[str],
    max_tokens: int,
    seed: int = 0,
    warm_up: int = WARM_UP,
    temperatures: Sequence[float] = TEMPERATURES,
) -> list[dict[str, Any]]:
    """One row per temperature, prompt and side.

    Args:
        servers: by side.
        prompts: the first ``warm_up`` are asked once more before, which is not measured.
        max_tokens: of a completion.
        seed: of the first prompt's samples.
        warm_up: prompts that pay for what is set up lazily.
        temperatures: one after the other.
    """
    rows = []
    for temperature in temperatures:
        for prompt in prompts[:warm_up]:
            for server in servers.values():
                ask(server, prompt, max_tokens, temperature, seed)
        for number, prompt in enumerate(prompts):
            found = {
                name: ask(servers[name], prompt, max_tokens, temperature, seed + number)
                for name in rotated(servers, number)
            }
            for name in servers:
                answer, drafts, accepted = found[name]
                rows.append(
                    {
                        "temperature": temperature,
                        "prompt": number,
                        "side": name,
                        "tokens": len(answer.tokens),
                        "seconds": round(answer.seconds, 6),
                        "verifications": drafts,
                        "accepted": accepted,
                        "as_plain": answer.tokens == found["plain"][0].tokens if "plain" in found else "",
                    }
                )
    return rows


def rate(row: dict[str, Any]) -> float:
    """Tokens per second of an answer."""
    return row["tokens"] / row["seconds"]


def summarise(rows: list[dict[str, Any]], dtype: str) -> list[dict[str, Any]]:
    """Per temperature and side: rates, ratios paired by prompt, acceptance length, and whether tokens are plain vLLM's.

    Args:
        rows: see ``measure``.
        dtype: that the servers computed in; only in float32 must tokens be the same.
    """
    found = []
    for temperature in sorted({row["temperature"] for row in rows}):
        here = [row for row in rows if row["temperature"] == temperature]
        rates: dict[str, dict[int, float]] = {}
        for row in here:
            rates.setdefault(row["side"], {})[row["prompt"]] = rate(row)
        for side in (name for name in LABELS if name in rates):
            own = [row for row in here if row["side"] == side]
            drafts, accepted = (sum(row[name] for row in own) for name in ("verifications", "accepted"))
            line: dict[str, Any] = {"temperature": temperature, "side": side, "prompts": len(own)}
            line |= Spread.of(list(rates[side].values())).columns("tokens_per_s")
            for rival in RIVALS:
                if rival in rates:
                    ratios = [value / rates[rival][prompt] for prompt, value in rates[side].items()]
                    line |= Spread.of(ratios).columns(f"to_{rival}")
            line["acceptance_length"] = round(1 + accepted / drafts, 4) if drafts else None
            line["differing"] = sum(row["as_plain"] is False for row in own) if "plain" in rates else None
            line["identical"] = line["differing"] == 0 if dtype == "float32" and "plain" in rates else None
            found.append(line)
    return found


def table_of(summary: list[dict[str, Any]]) -> str:
    """The summary as Markdown: medians, with quartiles in parentheses."""
    rivals = [name for name in RIVALS if f"to_{name}" in summary[0]]
    header = ["temperature", "side", "tokens/s", *(f"to {LABELS[name]}" for name in rivals), "acceptance length"]
    lines = []
    for line in summary:
        length = line["acceptance_length"]
        lines.append(
            [
                line["temperature"],
                LABELS[line["side"]],
                Spread.read(line, "tokens_per_s").cell(1),
                *("1" if name == line["side"] else Spread.read(line, f"to_{name}").cell() for name in rivals),
                "" if length is None else f"{length:.2f}",
                sameness(line),
            ]
        )
    return markdown([*header, "tokens of plain vLLM"], lines)


def sameness(line: dict[str, Any]) -> str:
    """Whether a side's tokens are plain vLLM's."""
    if line["differing"] is None or line["side"] == "plain":
        return ""
    return "all" if not line["differing"] else f"{line['differing']} of {line['prompts']} texts differ"


def plot(summary: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second as bars with quartiles, a panel for each temperature."""
    temperatures = sorted({line["temperature"] for line in summary})
    figure, axes = new_figure(1, len(temperatures), 6.5, 4.0)
    for axis, temperature in zip(axes.flat, temperatures, strict=True):
        lines = [line for line in summary if line["temperature"] == temperature]
        spreads = [Spread.read(line, "tokens_per_s") for line in lines]
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        axis.bar(range(len(lines)), [s.median for s in spreads], yerr=errors, capsize=3)
        axis.set_xticks(range(len(lines)), [LABELS[line["side"]].replace(", ", ",\n") for line in lines])
        axis.set(title=f"temperature {temperature}, one request at a time", ylabel="tokens/s")
        axis.grid(axis="y", alpha=0.3)
    save_figure(figure, path)


def main() -> int:
    """Starts the servers, asks all of them, and writes the results.

    Returns:
        1 if one of our sides gave other greedy tokens than plain vLLM in float32, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_options(parser, "latency.csv")
    add_server_options(parser)
    add_side_options(parser)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128, help="of a completion")
    parser.add_argument("--temperatures", type=float, nargs="+", default=list(TEMPERATURES))
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="prompts before the clock starts")
    args = parser.parse_args()
    chosen = chosen_sides(args, parser)
    arguments = {name: server_arguments(config, args, 1, args.max_tokens) for name, config in chosen.items()}
    prompts = held_out_texts(args.target, args.prompts, args.seed)
    with tempfile.TemporaryDirectory() as folder, running_sides(args.target, arguments, Path(folder)) as servers:
        rows = measure(servers, prompts, args.max_tokens, args.seed, args.warm_up, args.temperatures)
    summary = summarise(rows, args.dtype)
    write_report(args.output, rows, conditions(args), summary, table_of(summary))
    plot(summary, args.output.with_suffix(".png"))
    wrong = [line for line in summary if line["identical"] is False and line["side"] not in STOCK]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
