"""What ``jakiro-vllm serve`` hands to ``vllm serve``, and in which environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jakiro_vllm import cli
from jakiro_vllm.draft.registry import EMBEDDED_TARGET
from jakiro_vllm.environment import server_environment

PUBLISHED = ["--speculative-model", "jakiro"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], [str(EMBEDDED_TARGET), *PUBLISHED]),
        (["--port", "8123"], [str(EMBEDDED_TARGET), "--port", "8123", *PUBLISHED]),
        (["T"], ["T", *PUBLISHED]),
        (["T", "--speculative-model", "H"], ["T", "--speculative-model", "H"]),
        (["T", "--speculative_config={}"], ["T", "--speculative_config={}"]),
        (["T", "--spec-method", "eagle"], ["T", "--spec-method", "eagle"]),
        (["--config", "x.yaml"], ["--config", "x.yaml", *PUBLISHED]),
        (["--model=T"], ["--model=T", *PUBLISHED]),
    ],
    ids=lambda arguments: " ".join(arguments[:2]).replace(str(EMBEDDED_TARGET), "TARGET") or "nothing",
)
def test_serve(monkeypatch: pytest.MonkeyPatch, given: list[str], expected: list[str]) -> None:
    calls = []
    monkeypatch.setattr(os, "execve", lambda path, command, env: calls.append((path, command)))
    cli.main(["serve", *given])
    ((path, command),) = calls
    assert Path(path).name == "vllm"
    assert command[1:] == ["serve", *expected]


def test_openmp_is_preloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    first = server_environment({"LD_PRELOAD": "libother.so"})
    assert first["LD_PRELOAD"] == f"{library}:libother.so"
    assert server_environment(first) == first
    assert server_environment({"LD_PRELOAD": "libgomp.so.1"})["LD_PRELOAD"] == "libgomp.so.1"
    library.unlink()
    assert "LD_PRELOAD" not in server_environment({})
