"""vLLM end to end on a GPU: same tokens with and without trees, full graphs replayed, and the speed of both.

    python benchmarks/gpu_smoke.py --output build/gpu_smoke.json

Needs vLLM 0.32 or 0.33 for CUDA and jakiro-vllm; uses the embedded pair unless ``--target`` and ``--head`` name
another. Each engine runs in a process of its own. In fp32, greedy and seeded requests must give the same tokens on
both sides (plain vLLM with its Triton backend, whose arithmetic is the closest); in the model's own dtype both sides
alternate and the rates are compared. The exit status is 1 where tokens differ in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jakiro_vllm.draft.registry import EMBEDDED_HEAD, EMBEDDED_TARGET

PROMPTS = [
    "def quick_sort(items):\n",
    "import os\n\nclass Cache:\n    def __init__(self, size):\n",
    "for line in file:\n    parts = line.split(",
    "try:\n    value = int(text)\nexcept ",
    "def test_empty(self):\n        self.assert",
    "if __name__ == ",
    "    return [x for x in ",
    "class Node:\n    def __repr__(self):\n",
]


def run_side(job: dict[str, Any]) -> dict[str, Any]:
    """One engine: tokens of every request, tokens per second, and what was accepted."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.v1.metrics.reader import Counter

    llm = LLM(**job["engine"])
    params = [
        SamplingParams(temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True)
        if i % 2 == 0 or not job["seeded"]
        else SamplingParams(temperature=0.8, top_p=0.9, top_k=50, seed=i, max_tokens=job["max_tokens"], ignore_eos=True)
        for i in range(len(PROMPTS))
    ]
    llm.generate(PROMPTS, params, use_tqdm=False)  # warm
    rates: dict[str, list[float]] = {}
    for batch in job["batches"]:
        for _ in range(job["repeats"]):
            started = time.perf_counter()
            answers = llm.generate(PROMPTS[:batch], params[:batch], use_tqdm=False)
            produced = sum(len(answer.outputs[0].token_ids) for answer in answers)
            rates.setdefault(str(batch), []).append(produced / (time.perf_counter() - started))
    answers = llm.generate(PROMPTS, params, use_tqdm=False)
    counts = {m.name: m.value for m in llm.get_metrics() if isinstance(m, Counter)}
    drafts = counts.get("vllm:spec_decode_num_drafts", 0)
    accepted = counts.get("vllm:spec_decode_num_accepted_tokens", 0)
    config = llm.llm_engine.vllm_config
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "rates": rates,
        "acceptance_length": 1 + accepted / drafts if drafts else 1.0,
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "draft_graphs": sorted(getattr(getattr(runner, "_graphs", None), "graphs", {})),
        "attention": type(next(iter(config.compilation_config.static_forward_context.values())).impl).__name__,
    }


def in_process(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one side in a process of its own, so that its memory is given back."""
    with tempfile.TemporaryDirectory() as folder:
        request, response = Path(folder, "job.json"), Path(folder, "answer.json")
        request.write_text(json.dumps(job))
        subprocess.run([sys.executable, __file__, "--side", str(request), str(response)], check=True)
        return json.loads(response.read_text())


def engine(args: argparse.Namespace, dtype: str, trees: bool) -> dict[str, Any]:
    """Engine arguments of one side."""
    found: dict[str, Any] = {
        "model": args.target,
        "dtype": dtype,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "gpu_memory_utilization": args.memory,
        "enable_prefix_caching": False,
    }
    if trees:
        found["speculative_config"] = {
            "method": "jakiro",
            "model": args.head,
            "num_speculative_tokens": args.budget,
            "tree": {"depth": 6, "top_k": args.top_k},
        }
    elif dtype == "float32":
        found["attention_backend"] = "TRITON_ATTN"
    return found


def main() -> int:
    """Compares and reports."""
    if len(sys.argv) == 4 and sys.argv[1] == "--side":
        Path(sys.argv[3]).write_text(json.dumps(run_side(json.loads(Path(sys.argv[2]).read_text()))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(EMBEDDED_TARGET))
    parser.add_argument("--head", default=str(EMBEDDED_HEAD))
    parser.add_argument("--dtype", default="auto", help="of the speed comparison")
    parser.add_argument("--budget", type=int, default=60)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--memory", type=float, default=0.5)
    parser.add_argument("--output", type=Path, default=Path("gpu_smoke.json"))
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        parser.error("no GPU answers; on a CPU, `jakiro-vllm demo` makes the same comparison")

    def job(dtype: str, trees: bool, seeded: bool, batches: list[int]) -> dict[str, Any]:
        return {
            "engine": engine(args, dtype, trees),
            "max_tokens": args.max_tokens,
            "seeded": seeded,
            "batches": batches,
            "repeats": 3,
        }

    exact = {trees: in_process(job("float32", trees, True, [])) for trees in (False, True)}
    pairs = zip(exact[False]["tokens"], exact[True]["tokens"], strict=True)
    differing = [i for i, (plain, tree) in enumerate(pairs) if plain != tree]
    rates: dict[bool, dict[str, list[float]]] = {False: {}, True: {}}
    for _ in range(args.rounds):
        for trees in (False, True):
            answer = in_process(job(args.dtype, trees, False, [1, 8]))
            for batch, values in answer["rates"].items():
                rates[trees].setdefault(batch, []).extend(values)
    medians = {trees: {b: statistics.median(v) for b, v in found.items()} for trees, found in rates.items()}
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "target": Path(args.target).name,
        "fp32_requests": len(PROMPTS),
        "fp32_differing": differing,
        **{k: v for k, v in exact[True].items() if k not in ("tokens", "rates")},
        "tokens_per_s_plain": medians[False],
        "tokens_per_s_tree": medians[True],
        "speedup": {batch: medians[True][batch] / medians[False][batch] for batch in medians[False]},
        "samples": {"plain": rates[False], "tree": rates[True]},
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "samples"}, indent=2))
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
