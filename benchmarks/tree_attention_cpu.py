"""Tree attention against vLLM's own CPU operator at the same number of query rows.

    .venv/bin/python benchmarks/tree_attention_cpu.py --threads 1

The compiled kernel, the one in PyTorch and vLLM's operator alternate in one run; the rows give p20, p50 and p80 in
microseconds and the ratios of the medians to vLLM's. Its operator is causal, so it does another computation of nearly
the same size. With one thread the clock is the thread's own processor time, which other programs do not lengthen
except through shared caches and memory; with more it is the wall's.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from vllm import _custom_ops as ops

from jakiro_vllm.kernels import native
from jakiro_vllm.kernels.tree_attention import PagedCache, TreeJobs, tree_attention
from jakiro_vllm.kernels.tree_attention.reference import tree_attention_reference

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 128


def sides(
    jobs: int, rows: int, context: int, dtype: torch.dtype
) -> tuple[Callable[[], torch.Tensor], Callable[[], None]]:
    """Returns both computations on the same pages."""
    pages_each = -(-(context + rows) // BLOCK)
    cache = torch.randn(jobs * pages_each + 1, KV_HEADS, BLOCK, 2 * DIM).to(dtype)
    table = torch.randperm(jobs * pages_each).view(jobs, pages_each).int()
    query = torch.randn(jobs * rows, HEADS, DIM).to(dtype)
    keys, values = (torch.randn(jobs * rows, KV_HEADS, DIM).to(dtype) for _ in range(2))
    starts, order = torch.arange(jobs) * rows, torch.arange(rows).repeat(jobs)
    counts = torch.full((jobs,), rows)
    layout = TreeJobs(table, torch.full((jobs,), context), starts, counts, starts, counts)
    bits = torch.ones_like(order) << order
    words = bits | (bits >> 1) | 1
    out = torch.empty_like(query)

    def tree() -> torch.Tensor:
        return tree_attention(query, PagedCache(cache, "vec"), layout, keys, values, words, order, DIM**-0.5, out)

    query_start = (torch.arange(jobs + 1) * rows).int()
    lengths = torch.full((jobs,), context + rows, dtype=torch.int32)
    key_pages, value_pages = cache.view(cache.shape[0], KV_HEADS, 2 * BLOCK, DIM).chunk(2, dim=2)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=jobs,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        seq_lens=lengths,
        dtype=dtype,
        query_start_loc=query_start,
        causal=True,
        sliding_window_size=-1,
        isa="vec",
        enable_kv_split=True,
    )
    other = torch.empty_like(query)

    def stock() -> None:
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_pages,
            value_cache=value_pages,
            output=other,
            query_start_loc=query_start,
            seq_lens=lengths,
            scale=DIM**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0,
            scheduler_metadata=plan,
            s_aux=None,
        )

    check_first_row(tree(), cache, table, query, keys, values, context)
    return tree, stock


def check_first_row(
    found: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    context: int,
) -> None:
    """Compares one row with the reference before anything is timed."""
    raw = cache[table[0].long()].view(-1, KV_HEADS, 2, BLOCK * DIM)
    past_keys = raw[:, :, 0].unflatten(-1, (DIM, BLOCK)).permute(0, 3, 1, 2).flatten(0, 1)[:context]
    past_values = raw[:, :, 1].unflatten(-1, (BLOCK, DIM)).permute(0, 2, 1, 3).flatten(0, 1)[:context]
    visible, depth = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1)
    expected = tree_attention_reference(
        query[:1], [past_keys], [past_values], [keys[:1]], [values[:1]], [visible], [depth], DIM**-0.5
    )
    torch.testing.assert_close(found[:1].double(), expected, rtol=2e-2, atol=2e-2)


def percentiles(samples: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in microseconds."""
    cuts = statistics.quantiles(samples, n=10)
    return {"p20": cuts[1] * 1e6, "p50": statistics.median(samples) * 1e6, "p80": cuts[7] * 1e6}


def main() -> int:
    """Measures every size and writes the rows.

    Returns:
        0, or 1 where the compiled kernel cannot be had.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=17, help="rows of each tree")
    parser.add_argument("--output", type=Path, default=Path("tree_attention.csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    library = native.library()
    if library is None:
        return 1
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for jobs, context in itertools.product((1, 8, 32), (128, 512, 1024, 4096)):
            tree, stock = sides(jobs, args.rows, context, dtype)
            samples: dict[str, list[float]] = {"tree": [], "pytorch": [], "stock": []}
            for _ in range(args.repeats + 2):
                for name, times in samples.items():
                    with patch.object(native, "library", return_value=library if name == "tree" else None):
                        started = clock()
                        (stock if name == "stock" else tree)()
                        times.append(clock() - started)
            figures = {name: percentiles(times[2:]) for name, times in samples.items()}
            row = {
                "dtype": str(dtype).removeprefix("torch."),
                "batch": jobs,
                "rows": args.rows,
                "context": context,
                "threads": args.threads,
                "torch": torch.__version__,
                **{f"{name}_{p}": round(v, 1) for name, f in figures.items() for p, v in f.items()},
                **{
                    f"{name}_ratio": round(figures[name]["p50"] / figures["stock"]["p50"], 2)
                    for name in ("tree", "pytorch")
                },
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
