"""The benchmark of the GPU kernels runs where there is no GPU, at toy sizes, and says that its times mean nothing."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = {
    "copy",
    "tree attention",
    "experts",
    "walk",
    "compaction",
    "beam",
    "re-rank",
    "top tokens",
    "verify step",
    "draft",
}


@pytest.mark.slow
def test_the_kernels_benchmark_measures_every_kernel(tmp_path: Path) -> None:
    output = tmp_path / "kernels.csv"
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--interpret", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with output.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["operation"] for row in rows} == OPERATIONS
    assert {row["gpu"] for row in rows} == {"none (interpreted)"}


@pytest.mark.parametrize("script", ["kernels.py", "gpu_smoke.py"])
def test_without_a_gpu_a_benchmark_says_so(script: str, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--output", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "no GPU answers" in done.stderr
