"""Where a step's time goes: target, draft, sampling, compaction, scheduler, bookkeeping, front end.

    .venv/bin/python benchmarks/overhead.py --rounds 5 --output build/overhead.csv

An engine per side, each in a process of its own, all of them up at once; they take turns, round by round and batch by
batch, each round beginning with another side. Timers are wrapped around methods of vLLM's engine and runner from
outside. Only steps count in which all requests of the batch decode, so prompts are left out. The draft of our sides is
the head's work (observe and grow), that of vLLM's own is all of ``propose_draft_token_ids``; what else a step does for
its draft is bookkeeping.

One CSV row per round, batch and side: the median step in microseconds, its quartiles, the medians of its parts, and
tokens per step. Medians and quartiles over rounds go to .json and .md, and a stacked plot to .png. Parts are medians of
their own, so their sum is near the step's median, not equal to it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent / "shared"))

from sides import (
    LABELS,
    Spread,
    add_pair_options,
    add_side_options,
    chosen_sides,
    conditions,
    held_out_prompts,
    markdown,
    model_length,
    new_figure,
    rotated,
    save_figure,
    write_report,
)
from step_clock import PARTS, EngineProcess, Step

#: First steps of a run that are not counted, for buffers grow then.
WARM_UP = 2


def start(chosen: dict[str, dict[str, Any] | None], args: argparse.Namespace) -> dict[str, EngineProcess]:
    """The engines, one after the other, for starting takes memory and all cores."""
    engines: dict[str, EngineProcess] = {}
    most = max(args.batches)
    for side, speculation in chosen.items():
        engines[side] = EngineProcess(
            model=args.target,
            dtype=args.dtype,
            enforce_eager=args.enforce_eager,
            max_num_seqs=most,
            max_num_batched_tokens=max(2048, 256 * most),
            max_model_len=model_length(args.max_tokens),
            kv_cache_memory_bytes=args.kv_cache_bytes,
            gpu_memory_utilization=0.1,  # of which every engine wants its own free at start
            enable_prefix_caching=False,
            **({} if speculation is None else {"speculative_config": speculation}),
        )
        engines[side].wait()
    return engines


def row_of(side: str, batch: int, number: int, steps: list[Step]) -> dict[str, Any]:
    """The medians of a round, in microseconds.

    Args:
        side: that ran.
        batch: requests.
        number: of the round.
        steps: of the run; those that do not decode for the whole batch are dropped.

    Raises:
        ValueError: if none is left.
    """
    steps = [step for step in steps if step.decoding and step.requests == batch][WARM_UP:]
    if not steps:
        raise ValueError(f"no step of {side} decoded for all {batch} requests at once; raise --max-tokens")
    row: dict[str, Any] = {"side": side, "batch": batch, "round": number, "steps": len(steps)}
    row |= Spread.of([1e6 * step.total for step in steps]).columns("step_us")
    row["tokens_per_step"] = round(statistics.mean(step.tokens for step in steps), 4)
    for part in PARTS:
        row[part] = round(1e6 * statistics.median(step.seconds[part] for step in steps), 2)
    return row


def measure(engines: dict[str, EngineProcess], prompts: list[list[int]], args: argparse.Namespace) -> list[dict]:
    """One row per round, batch and side."""
    rows = []
    for batch in args.batches:
        for engine in engines.values():
            engine.steps(prompts[:batch], args.max_tokens, args.temperature)
        for number in range(args.rounds):
            chosen = [prompts[(number * batch + i) % len(prompts)] for i in range(batch)]
            for side in rotated(engines, number):
                steps = engines[side].steps(chosen, args.max_tokens, args.temperature)
                rows.append(row_of(side, batch, number, steps))
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per batch and side: spreads over rounds of a step, of a token of each request, and of the parts."""
    found = []
    for batch in sorted({row["batch"] for row in rows}):
        for side in LABELS:
            own = [row for row in rows if (row["side"], row["batch"]) == (side, batch)]
            if not own:
                continue
            line: dict[str, Any] = {"batch": batch, "side": side, "rounds": len(own)}
            line |= Spread.of([row["step_us"] for row in own]).columns("step_us")
            each = [row["step_us"] / row["tokens_per_step"] * batch for row in own]
            line |= Spread.of(each).columns("token_us")
            line |= Spread.of([row["tokens_per_step"] / batch for row in own]).columns("tokens_per_request")
            for part in PARTS:
                line |= Spread.of([row[part] for row in own]).columns(part)
            found.append(line)
    return found


def table_of(summary: list[dict[str, Any]]) -> str:
    """The summary as Markdown: medians over rounds, of the totals with quartiles."""
    header = ["batch", "side", *PARTS, "step", "tokens per step and request", "per token"]
    lines = [
        [
            line["batch"],
            LABELS[line["side"]],
            *(f"{line[part]:,.0f}" for part in PARTS),
            Spread.read(line, "step_us").cell(0),
            f"{line['tokens_per_request']:.2f}",
            Spread.read(line, "token_us").cell(0),
        ]
        for line in summary
    ]
    return "Microseconds.\n\n" + markdown(header, lines)


def plot(summary: list[dict[str, Any]], path: Path) -> None:
    """Stacked parts of a step, a panel for each batch size, and the step's median as a mark."""
    batches = sorted({line["batch"] for line in summary})
    figure, axes = new_figure(1, len(batches), 5.0, 4.5)
    for axis, batch in zip(axes.flat, batches, strict=True):
        lines = [line for line in summary if line["batch"] == batch]
        places, base = range(len(lines)), [0.0] * len(lines)
        for part in PARTS:
            heights = [line[part] / 1e3 for line in lines]
            axis.bar(places, heights, 0.7, bottom=base, label=part)
            base = [low + height for low, height in zip(base, heights, strict=True)]
        axis.plot(places, [line["step_us"] / 1e3 for line in lines], "k_", markersize=18, label="whole step")
        axis.set_xticks(places, [LABELS[line["side"]].replace(", ", ",\n") for line in lines], fontsize=8)
        axis.set(title=f"batch {batch}", ylabel="ms per step")
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].legend(fontsize=8)
    save_figure(figure, path)


def main() -> int:
    """Starts the engines, measures, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_options(parser, "overhead.csv")
    add_side_options(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=96, help="of a completion")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--enforce-eager", action="store_true", help="without torch.compile and CUDA graphs")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    prompts = held_out_prompts(AutoTokenizer.from_pretrained(args.target), 2 * max(args.batches), args.seed)
    engines = start(chosen_sides(args, parser), args)
    try:
        rows = measure(engines, prompts, args)
    finally:
        for engine in engines.values():
            engine.stop()
    summary = summarise(rows)
    write_report(args.output, rows, conditions(args), summary, table_of(summary))
    plot(summary, args.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
