"""Settings: from YAML and flags, refused early and in one sentence."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from jakiro_vllm.draft.head import Variant
from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.training.command import SHORT, _sections, add_arguments, settings_of
from jakiro_vllm.training.settings import Section, TrainSettings, load_settings

NEEDED = {"target": "t", "output": "o", "data": {"sources": ["a.jsonl"]}}


def parse(*words: str) -> TrainSettings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return settings_of(parser.parse_args(words))


def test_a_file_and_flags_that_override_it(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "target: some/target\noutput: from-file\ndata: {sources: [a.jsonl]}\n"
        "optimizer: {lr: 0.5, epochs: 3, loss: {token: 1}}\nhead: {variant: dense}\n"
    )
    found = parse("--settings", str(file), "--lr", "1e-3", "--output", "here", "--optimizer.betas", "[0.8, 0.9]")
    assert found.target == "some/target"
    assert found.output == Path("here")
    assert (found.optimizer.lr, found.optimizer.epochs, found.optimizer.betas) == (1e-3, 3, (0.8, 0.9))
    assert found.optimizer.loss.token == 1
    assert found.head.variant is Variant.DENSE


def test_flags_alone() -> None:
    found = parse("meta/llama", "--data", "a.jsonl", "owner/name:test", "--output", "x", "--ray", "--workers", "2")
    assert found.data.sources == ["a.jsonl", "owner/name:test"]
    assert (found.scale.ray, found.scale.workers) == (True, 2)


def test_every_setting_has_a_flag_and_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    documented = {name for _, entries in _sections() for name in entries}
    expected = {
        f"{section}.{name}"
        for section, field in TrainSettings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        for name in field.annotation.model_fields
    }
    assert documented == expected
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in expected - set(SHORT.values()))
    assert all(f"--{name}" in shown for name in SHORT)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"data": {}}, r"setting 'data.sources' is missing"),
    "unknown": ({"optimizer": {"learning_rate": 1}}, r"unknown setting 'optimizer.learning_rate'"),
    "unknown group": ({"optimiser": {}}, r"unknown setting 'optimiser'"),
    "type": ({"optimizer": {"lr": "fast"}}, r"'optimizer.lr': .*number.* got 'fast'"),
    "range": ({"optimizer": {"lr": 0}}, r"'optimizer.lr': .*greater than 0, got 0"),
    "temperature": (
        {"generation": {"temperatures": [0, -1]}},
        r"temperatures.1': .*greater than or equal to 0, got -1",
    ),
    "choice": ({"head": {"variant": "eagle"}}, r"'head.variant': .*'jakiro'.*got 'eagle'"),
    "shares": ({"optimizer": {"rollout": [{"share": 0.5, "steps": 1}]}}, r"optimizer: .*add up to 1, got 0.5$"),
    "workers": ({"scale": {"workers": 2}}, r"scale: 2 workers need Ray"),
    "not a group": ({"data": 3}, r"'data': .*got 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(name: str) -> None:
    changes, message = WRONG[name]
    overrides = {**NEEDED, **changes}
    with pytest.raises(JakiroConfigError, match=message) as error:
        load_settings(None, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "not YAML"),
        (b"- 1", "must hold a mapping, got list"),
        (b"\xff\xfe", "not YAML"),
        (None, "cannot be read"),
    ],
)
def test_wrong_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "s.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(JakiroConfigError, match=message):
        load_settings(file, {})


def test_a_flag_inside_of_something_that_is_no_group(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("optimizer: 3\n")
    with pytest.raises(JakiroConfigError, match="'optimizer' must be a mapping, got 3"):
        parse("--settings", str(file), "--lr", "1")


def test_a_flag_that_is_no_yaml() -> None:
    with pytest.raises(JakiroConfigError, match=r"--optimizer.betas takes a YAML value, got '\['"):
        parse("t", "--output", "o", "--data", "a", "--optimizer.betas", "[")
