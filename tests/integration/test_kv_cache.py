"""Compaction leaves the cache as if the text had been prefilled, in every layer, the head's included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm import _custom_ops as ops

from jakiro_vllm.integration.cpu_attention import TreeCPUAttentionImpl, TreeRows, make_tree_jobs

#: Prefilled in one forward and decoded in many, fp32 rounds differently; measured at 2e-5.
KV_TOLERANCE = 5e-4


@pytest.mark.vllm
@pytest.mark.slow
def test_cache_equals_a_recomputed_one(
    run_engine: Callable[..., Any], jakiro_engine: dict[str, Any], source_tokens: list[int]
) -> None:
    phase = {"kind": "kv", "prompt": source_tokens[100:150], "tokens": 150}
    good, bad, _ = run_engine(jakiro_engine, [phase, {**phase, "sabotage": "compaction"}])
    assert good["acceptance"]["moved"] > 10
    layers = good["difference"]
    assert any("jakiro_head" in name for name in layers)
    assert len(layers) > 2
    assert max(layers.values()) < KV_TOLERANCE
    assert max(bad["difference"].values()) > 100 * KV_TOLERANCE


@pytest.mark.vllm
@pytest.mark.slow
def test_what_the_head_reads_late_it_reads_right(
    run_engine: Callable[..., Any], jakiro_engine: dict[str, Any], source_tokens: list[int]
) -> None:
    """Between drafts, rows wait for the head: for a few steps, for many, and until there are too many of them.

    They are one for each step without a draft, and several where a text goes on as it did before.
    """
    adaptive = {**jakiro_engine["speculative_config"], "tree": {"depth": 6, "top_k": 8}}
    phase = {"kind": "kv", "prompt": source_tokens[100:150], "tokens": 150}
    patterns = ("HH-----", "H" + 59 * "-", "-", "TTHT--T", "T")
    phases = [{**phase, "sources": sources} for sources in patterns]
    engine = {**jakiro_engine, "speculative_config": adaptive}
    *good, bad, _ = run_engine(engine, [*phases, {**phases[0], "sabotage": "catching up"}])
    for answer in good:
        assert max(answer["difference"].values()) < KV_TOLERANCE
    often, seldom, never, mixed, text = (answer["acceptance"]["drafts"] for answer in good)
    assert often > 10
    assert 0 < seldom < often
    assert never == 0
    assert min(mixed, text) > 10
    assert all(answer["acceptance"]["accepted"] > 10 for answer in good[3:])
    differences = bad["difference"]
    assert {name for name, far in differences.items() if far > KV_TOLERANCE} == {
        name for name in differences if "jakiro_head" in name
    }


@pytest.mark.parametrize("isa", ["vec", "vec16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moved_rows_have_the_bytes_of_rows_written_in_place(isa: str, dtype: torch.dtype) -> None:
    """Writing a path straight into its slots, and moving it there, give the same bytes everywhere."""
    torch.manual_seed(0)
    kv_heads, dim, block, rows = 2, 64, 32, 7
    impl = object.__new__(TreeCPUAttentionImpl)
    impl.attn_type, impl.kv_cache_dtype = "decoder", "auto"
    layer = torch.nn.Module()
    layer.layer_name, layer.isa, layer._k_scale_float, layer._v_scale_float = "layer", isa, 1.0, 1.0
    keys, values = (torch.randn(rows, kv_heads, dim).to(dtype) for _ in range(2))
    slots = torch.arange(29, 29 + rows)  # crosses a page
    path = torch.tensor([0, 2, 5, 6])
    garbage = torch.randn(3, kv_heads, block, 2 * dim).to(dtype)

    layer.kv_cache = garbage.clone()
    impl.write_rows(layer, keys, values, slots)
    index = torch.arange(rows)
    jobs = make_tree_jobs(torch.zeros(1, 3, dtype=torch.int32), index[:1], index[:1], index[:1], index[:1])
    trees = TreeRows(jobs, index, index, index, True, {"layer": (keys, values)})
    impl.move_rows(layer, trees, path[1:], slots[1:4])
    moved = layer.kv_cache

    direct = garbage.clone()
    halves = direct.view(3, kv_heads, 2 * block, dim).chunk(2, dim=2)
    order = torch.cat([path, torch.arange(4, rows)])
    ops.cpu_attn_reshape_and_cache(
        keys[order], values[order], *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    assert torch.equal(moved.view(torch.uint8), direct.view(torch.uint8))
    assert not torch.equal(moved.view(torch.uint8), garbage.view(torch.uint8))
