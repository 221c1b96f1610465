"""Acceptance length by depth on code that no training has seen.

    .venv/bin/python benchmarks/acceptance.py --prompts 64 --max-tokens 128

Prompts are cut from the held-out files of the interpreter's standard library. One row per configuration goes
to a CSV file: the true mean of tokens per target forward (bonus token included) with its 95% bootstrap interval over
prompts,
and how often each depth was accepted. ``--ablate-parents`` adds the run in which the last level hangs under the beam by
position.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams

from jakiro_vllm import __version__
from jakiro_vllm.config import TreeConfig
from jakiro_vllm.draft.registry import EMBEDDED_HEAD, EMBEDDED_TARGET
from jakiro_vllm.integration.acceptance import Acceptance, AcceptanceMeter

sys.path.append(str(Path(__file__).resolve().parent / "shared"))

from sides import held_out_prompts, write_csv


def open_engine(target: str, head: str, budget: int, **arguments: Any) -> LLM:
    """An fp32 engine in this process, for trees of at most ``budget`` nodes."""
    return LLM(
        model=target,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=16,
        kv_cache_memory_bytes=1 << 29,
        speculative_config={"method": "jakiro", "model": head, "num_speculative_tokens": budget},
        **arguments,
    )


def row_of(found: Acceptance, depth: int) -> dict[str, float]:
    """The figures of one run."""
    low, high = found.interval()
    rates = {f"depth_{d}": round(rate, 4) for d, rate in enumerate(found.depth_rates(depth), start=1)}
    lengths = {"acceptance_length": found.length, "low": low, "high": high}
    return {"trees": found.trees} | {name: round(value, 4) for name, value in lengths.items()} | rates


def main() -> int:
    """Runs the configurations and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(EMBEDDED_TARGET))
    parser.add_argument("--head", nargs="+", default=[str(EMBEDDED_HEAD)], help="one or more, of one target")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--budget", type=int, default=TreeConfig.node_budget)
    parser.add_argument("--depth", type=int, default=TreeConfig.depth)
    parser.add_argument("--top-k", type=int, default=TreeConfig.top_k)
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ablate-parents", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("acceptance.csv"))
    args = parser.parse_args()

    llm = open_engine(args.target, args.head[0], args.budget)
    meter = AcceptanceMeter(llm)
    prompts = held_out_prompts(llm.get_tokenizer(), args.prompts, args.seed)
    tree = TreeConfig(node_budget=args.budget, depth=args.depth, top_k=args.top_k, policy=args.policy)
    rows = []
    for head, gather in itertools.product(args.head, (True, False) if args.ablate_parents else (True,)):
        drafter = meter.use(head, tree)
        drafter.gather_parents = gather
        for temperature in args.temperatures:
            params = SamplingParams(temperature=temperature, max_tokens=args.max_tokens, seed=args.seed)
            row = {
                "version": __version__,
                "head": Path(head).name,
                "policy": drafter.policy,
                "forwards": drafter.num_forwards,
                "budget": args.budget,
                "top_k": args.top_k,
                "gather_parents": gather,
                "temperature": temperature,
                "prompts": args.prompts,
                "max_tokens": args.max_tokens,
                **row_of(meter.measure(prompts, params), args.depth),
            }
            rows.append(row)
            print(row, flush=True)
    write_csv(rows, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
