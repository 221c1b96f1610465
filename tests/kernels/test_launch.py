"""How the kernels are launched on a GPU, as far as that shows without one; see ``launch_session``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jakiro_vllm.decode.graphs import BATCH_SIZES
from jakiro_vllm.integration.gpu_runner import warm_shapes

pytest.importorskip("triton", reason="needs Triton")

SESSION = Path(__file__).with_name("launch_session.py")
#: Jitted functions of all kernels.
KERNELS = {
    "attend",
    "merge",
    "_route",
    "_activate",
    "_multiply",
    "_merge",
    "split_kernel",
    "merge_kernel",
    "expand_kernel",
    "rerank_kernel",
    "walk_kernel",
    "compact_kernel",
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Launches and compilations, by kernel."""
    folder = tmp_path_factory.mktemp("launch")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    warm = [[size for size in BATCH_SIZES if size <= 16], warm_shapes(max_tokens=2048, max_requests=64)]
    done = subprocess.run(
        [sys.executable, str(SESSION), str(folder / "answer.json"), json.dumps(warm)],
        env=environment | {"TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "answer.json").read_text())


@pytest.mark.slow
def test_every_kernel_is_launched(launched: dict[str, Any]) -> None:
    assert set(launched["launches"]) - {"control_kernel"} == KERNELS


def test_sizes_that_change_compile_nothing_anew(launched: dict[str, Any]) -> None:
    """A server would stand still meanwhile, and a graph that is being captured would break.

    What is warm is what the GPU runner runs before it serves.
    """
    late = {name for name, count in launched["compiled"].items() if count > launched["warm"].get(name, 0)}
    assert late == {"control_kernel"}, "the control is compiled anew, and nothing else"


def test_grids_are_what_a_gpu_admits(launched: dict[str, Any]) -> None:
    for name, (_, y, z) in launched["grids"].items():
        assert y <= 65535, name
        assert z <= 65535, name
