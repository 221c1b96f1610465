"""``jakiro-vllm train`` as a user runs it: from a file of prompts to a head that both engines load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jakiro_vllm.draft.checkpoint import read_spec
from jakiro_vllm.draft.head import Variant
from jakiro_vllm.draft.registry import EMBEDDED_TARGET
from jakiro_vllm.training.corpus import python_sources, top_level_blocks

pytest.importorskip("datasets", reason="needs the extra train")

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SETTINGS = """
data: {longest_prompt: 40, held_out: 0.1}
generation: {new_tokens: 64, part: 24, temperatures: [0, 0, 0.8]}
head: {variant: dense, intermediate_size: 512}
optimizer:
  {epochs: 12, rows: 4, row_length: 256, lr: 3.0e-3, warmup_steps: 5, feature_noise: 0.1, clip_value: 100,
   compile: false, checkpoint_steps: 5, loss: {token: 1.0}, precision: float32}
evaluation: {prompts: 8, depth: 3}
"""
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and settings."""
    folder = tmp_path_factory.mktemp("train")
    sources = [document.text for document in python_sources() if document.held_out]
    blocks = [block[:160] for text in sources for block in top_level_blocks(text)]
    lines = [json.dumps({"text": block}) for block in blocks[:80]]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "settings.yaml").write_text(SETTINGS)
    return folder


def command(folder: Path, output: str, *more: str) -> list[str]:
    program = [sys.executable, "-m", "jakiro_vllm.cli", "train", str(EMBEDDED_TARGET)]
    data = ["--settings", str(folder / "settings.yaml"), "--data", str(folder / "prompts.jsonl")]
    return [*program, *data, "--output", str(folder / output), *more]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=400, check=False)


def kill_when(words: list[str], is_time: Callable[[], bool]) -> None:
    """Starts the command and kills it, and all that it started, at a moment of its work."""
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 200
        while not is_time():
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline, "the moment never came"
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A dense head, from an uninterrupted run."""
    done = run(command(folder, "head"))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "head"


def test_what_a_training_leaves(trained: Path) -> None:
    found = {path.name for path in trained.iterdir()}
    assert found == {"config.json", WEIGHTS, "README.md", "accuracy.png", "training.json", "work"}
    assert read_spec(trained).variant is Variant.DENSE
    record = json.loads((trained / "training.json").read_text())
    assert record["documents"] == 72
    assert record["held_out_documents"] == 8
    assert record["held_out"]["top1"][0] > 0.15, "it learned nothing"
    card = (trained / "README.md").read_text()
    assert f"{record['held_out']['acceptance_length']:.3f}" in card
    assert str(trained.parent) not in card, "a folder of this machine"
    assert (trained / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert list((trained / "work" / "logs").iterdir()), "no TensorBoard logs"


def test_a_killed_run_goes_on_to_the_same_head(folder: Path, trained: Path) -> None:
    words, work = command(folder, "killed"), folder / "killed" / "work"
    answers = work / "answers" / "train"
    kill_when(words, lambda: (answers / "part-00000.npz").is_file())
    assert not (answers / "part-00002.npz").is_file(), "killed too late to show anything"
    kept = (answers / "part-00000.npz").stat().st_mtime_ns
    kill_when(words, lambda: (work / "checkpoint.pt").is_file())
    assert not (folder / "killed" / WEIGHTS).exists()
    done = run(words)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (answers / "part-00000.npz").stat().st_mtime_ns == kept, "answered again"
    assert (folder / "killed" / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    curve, whole = ((path / "work" / "metrics.jsonl").read_text() for path in (folder / "killed", trained))
    assert curve == whole


def test_a_finished_run_does_nothing(folder: Path, trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    done = run(command(folder, "head"))
    assert done.returncode == 0
    assert "holds a finished head" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.seed", "1"], "was begun with data.seed 0, now it is 1"),
        (["--generation.new_tokens", "32"], "was begun with generation.new_tokens 64, now it is 32"),
    ],
)
def test_other_settings_do_not_go_on_with_old_results(
    folder: Path, trained: Path, more: list[str], message: str
) -> None:
    record = trained / "training.json"
    aside = record.rename(record.with_suffix(".aside"))
    try:
        done = run(command(folder, "head", *more))
    finally:
        aside.rename(record)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("jakiro-vllm: ")
    assert message in last
    assert "Traceback" not in done.stderr


def test_wrong_input_costs_seconds_and_one_sentence(folder: Path) -> None:
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    words = command(folder, "bad")
    words[words.index("--data") + 1] = str(folder / "bad.jsonl")
    done = run(words)
    assert done.returncode == 1
    assert "bad.jsonl:2: not JSON" in done.stderr.strip().splitlines()[-1]
    done = run([*command(folder, "bad2"), "--data.longest_prompt", "4000", "--generation.new_tokens", "2048"])
    assert done.returncode == 1
    assert "exceed the 2048 positions" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_two_ray_workers_give_the_curve_of_one(folder: Path, trained: Path) -> None:
    """The same global batch, dealt to two; answers come from a Ray actor."""
    pytest.importorskip("ray", reason="needs the extra train")
    done = run(command(folder, "ray", "--ray", "--workers", "2", "--scale.engines", "1"))
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (
        [json.loads(line) for line in (path / "work" / "metrics.jsonl").read_text().splitlines()]
        for path in (trained, folder / "ray")
    )
    assert len(one) == len(two) > 20
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-3)
    assert [row["loss"] for row in two[:5]] == pytest.approx([row["loss"] for row in one[:5]], rel=1e-5)
    assert two[-1]["loss"] < 0.8 * two[0]["loss"]


def test_a_dense_head_loads_in_vllms_own_eagle(
    trained: Path,
    run_engines: Callable[..., Any],
    plain_engine: dict[str, Any],
    source_tokens: list[int],
) -> None:
    """Both engines draft chains with it, and accept as much."""
    sampling = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
    phase = {"requests": [{"prompt": source_tokens[s : s + 30], "sampling": sampling} for s in (300, 900, 1500, 2100)]}
    eagle = {"method": "eagle", "model": str(trained), "num_speculative_tokens": 3}
    ours = {**eagle, "method": "jakiro", "tree": {"depth": 3, "top_k": 1, "adaptive": False}}
    jobs = [
        (plain_engine, [phase]),
        (plain_engine | {"speculative_config": eagle, "disable_log_stats": False}, [phase]),
        (plain_engine | {"speculative_config": ours, "disable_log_stats": False}, [phase]),
    ]
    plain, stock, trees = (answers[0] for answers in run_engines(jobs))
    tokens = [[request["tokens"] for request in side["requests"]] for side in (plain, stock, trees)]
    assert tokens[1] == tokens[0]
    assert tokens[2] == tokens[0]
    counted = [side["spec_decode"] for side in (stock, trees)]
    assert counted[0]["accepted"] > 10, "a head that is never right shows nothing"
    # vLLM's chain and ours part at a tie of two logits at most.
    assert counted[1]["accepted"] == pytest.approx(counted[0]["accepted"], rel=0.1)
