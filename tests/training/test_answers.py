"""Answers, part by part, with an engine that is a function of its request."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from jakiro_vllm.training import answers
from jakiro_vllm.training.answers import Answerer, answer_in_subprocess, engine_arguments, load_answers, missing, plan
from jakiro_vllm.training.data import Prompts, save_prompts
from jakiro_vllm.training.settings import GenerationSettings, TrainSettings

pytestmark = pytest.mark.vllm


class Engine:
    """Answers with its request: temperature, seed, and the prompt's tokens."""

    def __init__(self) -> None:
        self.asked = 0

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
