"""Answers, part by part, with an engine that is a function of its request."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from jakiro_vllm.draft.registry import EMBEDDED_TARGET
from jakiro_vllm.training import answers
from jakiro_vllm.training.answers import (
    Answerer,
    Part,
    answer_in_subprocess,
    engine_arguments,
    load_answers,
    missing,
    plan,
)
from jakiro_vllm.training.data import Prompts, save_prompts
from jakiro_vllm.training.settings import GenerationSettings, TrainSettings

pytestmark = pytest.mark.vllm


class Engine:
    """Answers with its request: temperature, seed, and the prompt's tokens."""

    def __init__(self) -> None:
        self.asked = 0
        self.resets: list[int] = []

    def reset_prefix_cache(self) -> bool:
        self.resets.append(self.asked)
        return True

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        self.asked += len(prompts)
        found = []
        for prompt, how in zip(prompts, params, strict=True):
            tokens = [round(how.temperature * 10), 99 if how.seed is None else how.seed, *prompt["prompt_token_ids"]]
            found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens[: how.max_tokens])]))
        return found


@pytest.fixture
def settings() -> TrainSettings:
    return TrainSettings.model_validate(
        {
            "target": "t",
            "output": "o",
            "data": {"sources": ["s"]},
            "generation": {"part": 3, "temperatures": [0.0, 0.8, 0.5], "new_tokens": 4, "seed": 10, "top_p": 0.9},
            "evaluation": {"prompts": 2},
        }
    )


@pytest.fixture
def work(tmp_path: Path) -> Path:
    prompts = [np.asarray([100 + i] * 3, dtype=np.uint32) for i in range(11)]
    save_prompts(Prompts(prompts[:8], prompts[8:]), tmp_path / "prompts")
    return tmp_path


def test_every_prompt_has_its_own_temperature_and_seed(work: Path, settings: TrainSettings) -> None:
    train, held_out = plan(work, settings)
    assert [len(part.prompts) for part in train] == [3, 3, 2]
    assert [len(part.prompts) for part in held_out] == [2], "no more than are measured"
    answerer = Answerer("t", settings.generation, 3, Engine())
    for part in (*train, *held_out):
        answerer.answer(part)
    assert not missing([*train, *held_out])
    documents = [shard.document(i).tolist() for shard in load_answers(train) for i in range(len(shard))]
    for i, document in enumerate(documents):
        temperature, seed = [(0, 99), (8, 10 + i), (5, 10 + i)][i % 3]
        assert document == [100 + i] * 3 + [temperature, seed, 100 + i, 100 + i]
    assert [load_answers(held_out)[0].document(i).tolist()[3:5] for i in range(2)] == [[0, 99]] * 2, "greedy"


def test_no_part_depends_on_the_ones_before(work: Path, settings: TrainSettings) -> None:
    train, _ = plan(work, settings)
    engine = Engine()
    answerer = Answerer("t", settings.generation, 3, engine)
    for part in train:
        answerer.answer(part)
    assert engine.resets == [0, 3, 6], "the cache of prefixes is emptied before each part"


def test_only_what_is_missing_is_answered_again(work: Path, settings: TrainSettings) -> None:
    train, _ = plan(work, settings)
    engine = Engine()
    answerer = Answerer("t", settings.generation, 3, engine)
    for part in train:
        answerer.answer(part)
    before = [part.file.read_bytes() for part in train]
    train[1].file.unlink()
    assert missing(train) == [train[1]]
    engine.asked = 0
    for part in missing(train):
        answerer.answer(part)
    assert engine.asked == 3
    assert [part.file.read_bytes() for part in train] == before


def test_the_user_has_the_last_word_about_the_engine() -> None:
    arguments = engine_arguments("t", GenerationSettings(new_tokens=5, engine={"dtype": "bfloat16", "seed": 7}), 11)
    assert (arguments["model"], arguments["max_model_len"]) == ("t", 16)
    assert (arguments["dtype"], arguments["seed"]) == ("bfloat16", 7)


def test_a_failed_engine_is_told(work: Path, settings: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers.sys, "executable", "/bin/false")
    with pytest.raises(answers.GenerationFailed, match=r"generation failed with exit code 1.*run again to go on"):
        answer_in_subprocess(work, settings)


def test_the_reason_of_a_failure_is_passed_on(
    work: Path, settings: TrainSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And modules are not taken from the folder where the user happens to be."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tqdm.py").write_text("raise SystemExit(9)")
    (work / "prompts" / "train.npz").rename(work / "aside.npz")
    parts = [Part(work / "answers" / "train" / "part-00000.npz", 0, [], [0.0])]
    monkeypatch.setattr(answers, "plan", lambda work, settings: (parts, []))  # here only; the process finds no prompts
    monkeypatch.chdir(elsewhere)
    for _ in range(2):
        with pytest.raises(
            answers.GenerationFailed, match=r"exit code 1 \(TrainingDataError: .*train.npz cannot be read .*run again"
        ) as error:
            answer_in_subprocess(work, settings)
    assert "\n" not in str(error.value)


RUN = """
import sys
from pathlib import Path
from jakiro_vllm.training.answers import answer_in_subprocess
from jakiro_vllm.training.settings import TrainSettings
answer_in_subprocess(Path(sys.argv[1]), TrainSettings.model_validate_json(sys.argv[2]))
"""


def alive(word: str) -> list[int]:
    """Processes with an argument."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_answers(tmp_path: Path, settings: TrainSettings) -> None:
    """Only the run itself is killed, as the kernel does when memory ends: its engine must not go on alone."""
    settings = settings.model_copy(
        update={
            "target": str(EMBEDDED_TARGET),
            "generation": GenerationSettings(part=4, new_tokens=48, temperatures=[0.0, 0.8]),
        }
    )
    rng = np.random.default_rng(0)
    shared = rng.integers(5, 900, size=150)  # as a system prompt is
    prompts = [np.concatenate([shared, rng.integers(5, 900, size=6)]).astype(np.uint32) for _ in range(26)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = {}
    for work in (whole, killed):
        save_prompts(Prompts(prompts[:24], prompts[24:]), work / "prompts")
        words[work] = [sys.executable, "-P", "-c", RUN, str(work), settings.model_dump_json()]
    subprocess.run(words[whole], check=True, timeout=200)

    run = subprocess.Popen(words[killed])
    first, last = (killed / "answers" / "train" / f"part-0000{i}.npz" for i in (0, 5))
    deadline = time.monotonic() + 200
    while not first.is_file():
        assert run.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline, "no part came"
        time.sleep(0.01)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 10
    while alive(str(killed)):
        assert time.monotonic() < deadline, "the engine outlives its run"
        time.sleep(0.1)
    assert not last.is_file(), "killed too late to show anything"
    kept = first.stat().st_mtime_ns
    subprocess.run(words[killed], check=True, timeout=200)
    assert first.stat().st_mtime_ns == kept, "answered again"
    parts = [[part.file for group in plan(work, settings) for part in group] for work in (whole, killed)]
    assert len(parts[0]) == 7
    assert [file.read_bytes() for file in parts[1]] == [file.read_bytes() for file in parts[0]]
