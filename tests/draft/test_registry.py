"""Which head belongs to which target, and where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jakiro_vllm.draft.registry import (
    EMBEDDED_HEAD,
    EMBEDDED_TARGET,
    PUBLISHED_HEADS,
    locate_head,
    published_head,
)
from jakiro_vllm.errors import HeadCheckpointError


@pytest.mark.parametrize(
    ("target", "head"),
    [
        ("lmsys/vicuna-7b-v1.3", "Hhaiduo/Jakiro-Vicuna-7B-v1.3"),
        ("lmsys/vicuna-13b-v1.3", "Hhaiduo/Jakiro-Vicuna-13B-v1.3"),
        ("meta-llama/Llama-2-7b-chat-hf", "Hhaiduo/Jakiro-LLaMA2-Chat-7B"),
        ("meta-llama/Llama-2-13b-chat-hf", "Hhaiduo/Jakiro-LLaMA2-Chat-13B"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "Hhaiduo/Jakiro-Llama3-instruct-8b"),
        ("/models/vicuna-7b-v1.3/", "Hhaiduo/Jakiro-Vicuna-7B-v1.3"),
    ],
)
def test_published_heads_by_target(target: str, head: str) -> None:
    assert published_head(target) == head
    assert head in PUBLISHED_HEADS.values()


def test_the_embedded_target_has_the_embedded_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert published_head(str(EMBEDDED_TARGET)) == str(EMBEDDED_HEAD)
    link = tmp_path / "link"
    link.symlink_to(EMBEDDED_TARGET)
    assert locate_head("jakiro", str(link)) == EMBEDDED_HEAD


@pytest.mark.parametrize("target", ["gpt2", "lmsys/vicuna-33b-v1.3", "somewhere/target", ""])
def test_unknown_targets_are_told_the_known_ones(target: str) -> None:
    with pytest.raises(HeadCheckpointError) as error:
        locate_head("jakiro", target)
    assert repr(target) in str(error.value)
    for known in PUBLISHED_HEADS:
        assert known in str(error.value)


def test_a_folder_is_its_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate_head(str(tmp_path), "any") == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate_head("owner/name", "any") == Path("owner/name")


@pytest.mark.parametrize("name", ["head", "a/b/c", "/missing/folder", "./missing", "../missing"])
def test_names_that_are_neither_folder_nor_hub_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(HeadCheckpointError, match="neither a folder nor a hub name") as error:
        locate_head(name, "any")
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(("name", "asked"), [("owner/name", "owner/name"), ("jakiro", "Hhaiduo/Jakiro-LLaMA2-Chat-7B")])
def test_hub_names_are_downloaded(name: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(repo: str, **options: Any) -> str:
        calls.append((repo, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate_head(name, "meta-llama/Llama-2-7b-chat-hf", "/kept") == tmp_path
    assert [repo for repo, _ in calls] == [asked]
    assert calls[0][1]["cache_dir"] == "/kept"
    # Nothing but configuration and weights, above all no code.
    assert set(calls[0][1]["allow_patterns"]) == {"config.json", "*.safetensors", "*.bin"}


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        pytest.param(ConnectionError("no route to host\nmany\nlines"), "no route to host", id="network"),
        pytest.param(RuntimeError(), "RuntimeError", id="silent"),
    ],
)
def test_failed_downloads(failure: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, **options: Any) -> str:
        raise failure

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(HeadCheckpointError) as error:
        locate_head("owner/name", "any")
    message = str(error.value)
    assert words in message
    assert "'owner/name'" in message
    assert "\n" not in message
