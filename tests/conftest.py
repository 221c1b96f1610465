"""Fixtures for every room."""

from __future__ import annotations

import os

# Triton reads this when a kernel is defined, so it comes before every import: the kernels' tests interpret them.
os.environ["TRITON_INTERPRET"] = "1"
# Workers side by side share the cores: more OpenMP threads than cores wait for one another (engines take twice as
# long), and vLLM would bind every worker's engine to the same core.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from published_heads import published_head, write_head
from transformers import LlamaConfig

from jakiro_vllm.draft.head import HeadSpec, Variant

# The same examples in every run, and no folder of past failures beside the sources.
settings.register_profile("reproducible", derandomize=True, database=None, deadline=None)
settings.load_profile("reproducible")


@pytest.fixture
def generator() -> torch.Generator:
    """Seeded; the same numbers whatever ran before."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def rng() -> random.Random:
    """Seeded; the same numbers whatever ran before."""
    return random.Random(0)


@pytest.fixture
def tiny_spec() -> Callable[..., HeadSpec]:
    """``tiny_spec(variant, **sizes)`` makes a ``HeadSpec``; every size has a default."""

    def make(variant: Variant | str = Variant.JAKIRO, **sizes: Any) -> HeadSpec:
        variant = Variant(variant)
        values: dict[str, Any] = {
            "variant": variant,
            "hidden_size": 16,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 4,
            "intermediate_size": 24,
            "num_experts": 1 if variant is Variant.DENSE else 2,
            "fc_bias": True,
            "rms_norm_eps": 1e-5,
        } | sizes
        values.setdefault(
            "rope", LlamaConfig(num_attention_heads=values["num_heads"], head_dim=values["head_dim"], hidden_size=16)
        )
        return HeadSpec(**values)

    return make


@pytest.fixture
def tiny_head_folder(tmp_path: Path) -> Callable[..., Path]:
    """``tiny_head_folder(variant, file_format="safetensors", **options)`` writes a random head.

    The options are those of ``published_heads.published_head``: ``num_experts``, ``hidden_size``,
    ``num_heads``, ``kv_heads``, ``head_dim``, ``intermediate_size``, ``bias``, ``gain``, ``seed``, and entries
    of config.json.
    """

    def make(variant: str = "jakiro", file_format: str = "safetensors", **options: Any) -> Path:
        folder = tmp_path / f"head{len(list(tmp_path.iterdir()))}"
        return write_head(folder, *published_head(variant, **options), file_format)

    return make
