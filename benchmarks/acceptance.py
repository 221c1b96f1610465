"""Acceptance length by depth on code that no training has seen.

    .venv/bin/python benchmarks/acceptance.py --prompts 64 --max-tokens 128

Prompts are cut from the held-out files of the interpreter's standard library. One row per configuration goes
to a CSV file: the true mean of tokens per target forward (bonus token included), and how often each depth was
accepted. ``--ablate-parents`` adds the run in which the last level hangs under the beam by position.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.v1.metrics.reader import Counter, Vector

from jakiro_vllm import __version__
from jakiro_vllm.config import TreeConfig
from jakiro_vllm.draft.registry import EMBEDDED_HEAD, EMBEDDED_TARGET
from jakiro_vllm.training.corpus import python_sources


def held_out_prompts(tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    """Cuts ``count`` prompts of 32 to 160 tokens from held-out sources."""
    rng = random.Random(seed)
    documents = [document.text for document in python_sources() if document.held_out]
    prompts = []
    while len(prompts) < count:
        tokens = tokenizer(rng.choice(documents), add_special_tokens=False, verbose=False)["input_ids"]
        length = rng.randrange(32, 161)
        if len(tokens) > length + 1:
            start = rng.randrange(len(tokens) - length)
            prompts.append(tokens[start : start + length])
    return prompts


def counts(llm: LLM) -> tuple[float, list[float]]:
    """Trees verified, and accepted tokens per depth, since the engine started."""
    drafts, depths = 0.0, [0.0]
    for metric in llm.get_metrics():
        if metric.name == "vllm:spec_decode_num_drafts" and isinstance(metric, Counter):
            drafts = metric.value
        if metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos" and isinstance(metric, Vector):
            depths = list(metric.values)
    return drafts, depths


def measure(llm: LLM, prompts: list[list[int]], params: SamplingParams, depth: int) -> dict[str, float]:
    """Runs the prompts and returns the acceptance length and the rate of each depth."""
    drafts, depths = counts(llm)
    llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False)
    new_drafts, new_depths = counts(llm)
    trees = new_drafts - drafts
    accepted = [after - before for after, before in zip(new_depths, depths, strict=False)]
    rates = {f"depth_{d}": round(accepted[d - 1] / trees, 4) for d in range(1, depth + 1)}
    return {"trees": trees, "acceptance_length": round(1 + sum(accepted) / trees, 4), **rates}


def main() -> int:
    """Runs the configurations and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(EMBEDDED_TARGET))
    parser.add_argument("--head", default=str(EMBEDDED_HEAD))
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

    llm = LLM(
        model=args.target,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=16,
        kv_cache_memory_bytes=1 << 29,
        disable_log_stats=False,
        speculative_config={
            "method": "jakiro",
            "model": args.head,
            "num_speculative_tokens": args.budget,
            "tree": {"depth": args.depth, "top_k": args.top_k, "policy": args.policy},
        },
    )
    prompts = held_out_prompts(llm.get_tokenizer(), args.prompts, args.seed)
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    rows = []
    for gather in (True, False) if args.ablate_parents else (True,):
        runner.drafter.drafter.gather_parents = gather
        for temperature in args.temperatures:
            params = SamplingParams(temperature=temperature, max_tokens=args.max_tokens, seed=args.seed)
            row = {
                "version": __version__,
                "head": Path(args.head).name,
                "policy": runner.drafter.drafter.policy,
                "forwards": runner.drafter.drafter.num_forwards,
                "budget": args.budget,
                "top_k": args.top_k,
                "gather_parents": gather,
                "temperature": temperature,
                "prompts": args.prompts,
                "max_tokens": args.max_tokens,
                **measure(llm, prompts, params, args.depth),
            }
            rows.append(row)
            print(row, flush=True)
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
