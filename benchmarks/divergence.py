"""Where bf16 output parts from plain vLLM's: how close the two tokens were, with trees and with vLLM's own speculation.

    .venv/bin/python benchmarks/divergence.py --prompts 128 --max-tokens 128 --output docs/results/divergence.csv

A forward over one row and one over many round differently, so in bf16 a greedy token changes where two logits are
nearly equal; after that the texts are different texts. For every prompt and side, one row tells where the first
difference is and how far plain vLLM had the two tokens apart there (nats). The control is vLLM's n-gram speculation,
which has nothing of ours. A wrong mask or a wrong KV entry would show as differences of any size, not as near ties.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams

from jakiro_vllm.draft.registry import EMBEDDED_HEAD, EMBEDDED_TARGET
from jakiro_vllm.training.corpus import cut_prompts, encode_documents, python_sources

sys.path.append(str(Path(__file__).resolve().parent / "shared"))

from sides import NGRAM, write_csv

#: Tokens whose log-probabilities plain vLLM reports at each position.
REPORTED = 8


def sides(head: str, budget: int) -> dict[str, dict[str, Any]]:
    """Engine arguments of everything that is compared with plain vLLM."""
    return {
        "plain": {},
        "plain, one request at a time": {"max_num_seqs": 1},
        "n-gram": {"speculative_config": NGRAM | {"prompt_lookup_min": 1}},
        "trees": {"speculative_config": {"method": "jakiro", "model": head, "num_speculative_tokens": budget}},
    }


@dataclass(frozen=True)
class Text:
    """A completion.

    Attributes:
        tokens: of it.
        logprobs: of the most probable tokens at each position; None where they were not asked for.
    """

    tokens: list[int]
    logprobs: list[dict[int, float]] | None


def run(target: str, dtype: str, arguments: dict[str, Any], prompts: list[list[int]], max_tokens: int) -> list[Text]:
    """Greedy completions of one engine."""
    llm = LLM(
        model=target,
        dtype=dtype,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 29,
        **{"max_num_seqs": 16} | arguments,
    )
    logprobs = None if arguments else REPORTED
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=logprobs)
    found = [o.outputs[0] for o in llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)]
    return [
        Text(
            list(output.token_ids),
            output.logprobs and [{t: entry.logprob for t, entry in place.items()} for place in output.logprobs],
        )
        for output in found
    ]


def first_difference(plain: Text, other: Text) -> tuple[int, float | None] | None:
    """Position of the first difference, and the plain engine's margin between the two tokens there.

    Returns:
        None where all tokens are the same; a margin of None where the other's token was not among those reported.
    """
    for position, (a, b) in enumerate(zip(plain.tokens, other.tokens, strict=True)):
        if a != b:
            assert plain.logprobs is not None
            reported = plain.logprobs[position]
            return position, reported[a] - reported[b] if b in reported else None
    return None


def usual_margins(plain: list[Text]) -> list[float]:
    """Between the two most probable tokens, at every position."""
    found = []
    for output in plain:
        for position in output.logprobs or ():
            best, second = sorted(position.values(), reverse=True)[:2]
            found.append(best - second)
    return found


def main() -> int:
    """Runs all sides and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(EMBEDDED_TARGET))
    parser.add_argument("--head", default=str(EMBEDDED_HEAD))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--budget", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("divergence.csv"))
    args = parser.parse_args()

    from transformers import AutoTokenizer

    documents = [document.text for document in python_sources() if document.held_out]
    encoded = encode_documents(AutoTokenizer.from_pretrained(args.target), documents)
    prompts = [prompt.tolist() for prompt in cut_prompts(encoded, args.prompts, 32, 160)]
    found = {}
    for side, arguments in sides(args.head, args.budget).items():
        # A process each: vLLM does not start every kind of engine after another in one.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found[side] = pool.submit(run, args.target, args.dtype, arguments, prompts, args.max_tokens).result()
    plain = found.pop("plain")
    rows: list[dict[str, Any]] = []
    usual = sorted(usual_margins(plain))
    for side, outputs in found.items():
        places = [first_difference(a, b) for a, b in zip(plain, outputs, strict=True)]
        for i, place in enumerate(places):
            position, margin = ("", "") if place is None else (place[0], "more" if place[1] is None else place[1])
            rows.append({"side": side, "dtype": args.dtype, "prompt": i, "position": position, "margin": margin})
        margins = [place[1] for place in places if place is not None]
        known = [margin for margin in margins if margin is not None]
        print(
            f"{side}: {len(margins)} of {len(places)} texts part from plain vLLM's"
            + (
                f", at margins of at most {max(known):.4f} nats (median {statistics.median(known):.4f})"
                if known
                else ""
            )
            + (
                f"; {len(margins) - len(known)} beyond the {REPORTED} reported tokens"
                if len(known) < len(margins)
                else ""
            )
        )
    print(f"margins at all positions: median {statistics.median(usual):.2f} nats")
    if rows and any(row["margin"] not in ("", "more") for row in rows):
        largest = max(row["margin"] for row in rows if row["margin"] not in ("", "more"))
        share = sum(margin <= largest for margin in usual) / len(usual)
        print(f"positions with a margin of at most {largest:.4f}: {100 * share:.1f} %")
    write_csv(rows, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
