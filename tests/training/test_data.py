"""Prompts from the user's files: every form of record, and every way to get it wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from jakiro_vllm.draft.registry import EMBEDDED_TARGET
from jakiro_vllm.errors import JakiroConfigError, TrainingDataError
from jakiro_vllm.training import extra
from jakiro_vllm.training.data import (
    are_saved,
    check_length,
    load_prompts,
    load_saved_prompts,
    save_prompts,
)
from jakiro_vllm.training.settings import DataSettings

pytest.importorskip("datasets", reason="needs the extra train")

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_TARGET)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def texts(source: str | list[str], tokenizer: Any, **settings: Any) -> set[str]:
    sources = [source] if isinstance(source, str) else source
    found = load_prompts(DataSettings(sources=sources, **settings), tokenizer)
    return {tokenizer.decode(ids) for ids in (*found.train, *found.held_out)}


DIALOGUE = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
FORMS: dict[str, tuple[list[Any], set[str]]] = {
    "messages": (
        [
            {"messages": [{"role": r, "content": c} for r, c in DIALOGUE]},
            {"messages": [{"role": "user", "content": "x"}]},
        ],
        {"<system>s<user>a<assistant>b<user>c<assistant>", "<user>x<assistant>"},
    ),
    "sharegpt": (
        [{"conversations": [{"from": "human", "value": f"a{i}"}, {"from": "gpt", "value": "b"}]} for i in range(2)],
        {"<user>a0<assistant>", "<user>a1<assistant>"},
    ),
    "prompt": ([{"prompt": "p"}, {"prompt": "q", "answer": "r"}], {"<user>p<assistant>", "<user>q<assistant>"}),
    "prompt of messages": (
        [{"prompt": [{"role": "user", "content": c}]} for c in "ab"],
        {"<user>a<assistant>", "<user>b<assistant>"},
    ),
    "instruction": (
        [{"instruction": "i", "input": "j"}, {"instruction": "k", "input": ""}],
        {"<user>i\n\nj<assistant>", "<user>k<assistant>"},
    ),
    "question": ([{"question": "a"}, {"question": "b"}], {"<user>a<assistant>", "<user>b<assistant>"}),
    "text": ([{"text": "import os"}, {"text": "def f():"}], {"import os", "def f():"}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_forms_of_records(tmp_path: Path, tokenizer: Any, form: str, suffix: str) -> None:
    records, expected = FORMS[form]
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        write(path, records)
    elif suffix == "json":
        path.write_text(json.dumps(records))
    else:
        import datasets

        datasets.Dataset.from_list(records).to_parquet(path)
    assert texts(str(path), tokenizer) == expected


def test_text_files_and_folders_of_the_hub(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "lines.txt").write_text("one line\nanother\n")
    assert texts(str(tmp_path / "lines.txt"), tokenizer) == {"one line", "another"}
    hub = tmp_path / "hub"  # what a hub name leads to is a folder of this form
    hub.mkdir()
    write(hub / "train.jsonl", [{"text": f"t{i}"} for i in range(40)])
    write(hub / "test.jsonl", [{"text": f"u{i}"} for i in range(2)])
    assert texts(f"{hub}:test", tokenizer) == {"u0", "u1"}
    assert len(texts(str(hub), tokenizer, prompts=5)) == 5


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_record_far_down_changes_no_other(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    """Libraries that infer types by blocks rewrite, or refuse, what comes before or after such a record."""
    many = [{"text": f"t{i}", "more": " " * 12000} for i in range(1000)]  # 12 MB; a block has 10
    path = tmp_path / f"d.{suffix}"

    def found(last: dict[str, Any]) -> set[str]:
        records = [*many, last]
        path.write_text(json.dumps(records) if suffix == "json" else "\n".join(map(json.dumps, records)))
        return texts(str(path), tokenizer, longest_prompt=8)

    with pytest.raises(TrainingDataError, match=r"(:|record )1001: 'text' must be a string, got int"):
        found({"text": 7})
    for last in ({"prompt": "late"}, {"text": "late", "meta": {"x": [1]}}):
        begun = found(last)
        assert not any(text.startswith('"') for text in begun)
        assert any(text.startswith("t") for text in begun)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.txt"])
def test_marks_and_line_ends_of_other_systems(tmp_path: Path, tokenizer: Any, name: str) -> None:
    lines = ["aa", "bb"] if name == "d.txt" else [json.dumps({"text": text}) for text in ("aa", "bb")]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode())
    assert texts(str(tmp_path / name), tokenizer) == {"aa", "bb"}


def test_names_of_files_are_no_patterns(tmp_path: Path, tokenizer: Any) -> None:
    import datasets

    path = tmp_path / "part [1]*.parquet"
    datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).to_parquet(path)
    assert texts(str(path), tokenizer) == {"a", "b"}


def test_a_tokenizer_without_a_template_continues_text(tmp_path: Path) -> None:
    plain = AutoTokenizer.from_pretrained(EMBEDDED_TARGET)
    plain.chat_template = None
    assert texts(write(tmp_path / "d.jsonl", [{"prompt": "p"}, {"prompt": "q"}]), plain) == {"p", "q"}


def test_limits_and_duplicates(tmp_path: Path, tokenizer: Any) -> None:
    records = [{"text": "x = 1\n" * 50}, {"text": "y"}, {"text": "y"}, {"text": "zz = 2"}, {"prompt": "a b c d e f g"}]
    path = write(tmp_path / "d.jsonl", [{"text": None, "prompt": None} | record for record in records])
    found = load_prompts(DataSettings(sources=[path], longest_prompt=6, shortest_prompt=2), tokenizer)
    shown = sorted(tokenizer.decode(ids) for ids in (*found.train, *found.held_out))
    assert all(2 <= len(ids) <= 6 for ids in (*found.train, *found.held_out))
    assert len(shown) == 3, "one is too short, and one there twice"
    assert any(text.startswith("x = 1") for text in shown), "a text keeps its beginning"
    assert any(text.endswith("<assistant>"[-4:]) for text in shown), "a question keeps its end"


def test_the_split_is_seeded_and_disjoint(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "d.jsonl", [{"text": f"value_{i} = {i}"} for i in range(50)])

    def split(**settings: Any) -> list[list[bytes]]:
        found = load_prompts(DataSettings(sources=[path], held_out=0.2, **settings), tokenizer)
        return [[ids.tobytes() for ids in part] for part in (found.train, found.held_out)]

    train, held_out = split()
    assert (len(train), len(held_out)) == (40, 10)
    assert not set(train) & set(held_out)
    assert split() == [train, held_out]
    assert split(seed=1) != [train, held_out]
    assert [len(part) for part in split(prompts=2)] == [1, 1]


WRONG: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("a.jsonl", None, r"a.jsonl is not a file; give an existing file or the name of a hub dataset"),
    "suffix": ("a.csv", b"a,b", r"suffix '.csv'; files of these suffixes can be read: .jsonl"),
    "empty": ("a.jsonl", b"", r"a.jsonl (is empty|holds no records)"),
    "line": ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a.jsonl:2: not JSON"),
    "no object": ("a.jsonl", b'{"text": "a"}\n\n[1]\n', r"a.jsonl:3: a record must be a JSON object, got list"),
    "encoding": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a.jsonl:2: not UTF-8"),
    "json": ("a.json", b"{", r"a.json:1: not JSON"),
    "array": ("a.json", b'[{"text": "a"}', r"a.json cannot be read as .json"),
    "no object in an array": ("a.json", b'[{"text": "a"}, 1]', r"a.json, record 2: a record must be a JSON object"),
    "text encoding": ("a.txt", b"a\n\xff\n", r"a.txt:2: not UTF-8"),
    "half a character": ("a.jsonl", b'{"text": "\\ud800"}\n', r"a.jsonl:1: 'text' is not Unicode"),
    "line of a type": ("a.jsonl", b'{"text": "a"}\n\n{"text": 3}\n', r"a.jsonl:3: 'text' must be a string, got int"),
    "parquet": ("a.parquet", b"PAR1nothing", r"a.parquet cannot be read as .parquet"),
    "columns": ("a.jsonl", b'{"q": "a"}\n{"q": "b"}\n', r"a.jsonl:1: columns 'q'; one of these is needed: messages"),
    "type": ("a.jsonl", b'{"text": 3}\n{"text": 4}\n', r"a.jsonl:1: 'text' must be a string, got int"),
    "messages": ("a.jsonl", b'{"messages": "hi"}\n', r"a.jsonl:1: 'messages' must be a list of messages, got 'hi'"),
    "content": ("a.jsonl", b'{"messages": [{"role": "user", "content": 3}]}\n', r"a.jsonl:1: a message needs a string"),
    "no question": (
        "a.jsonl",
        b'{"messages": [{"role": "system", "content": "s"}]}\n',
        r"a.jsonl:1: no message of a user",
    ),
    "template": (
        "a.jsonl",
        b'{"messages": [{"role": "tool", "content": "s"}, {"role": "user", "content": "s"}]}\n',
        r"a.jsonl:1: the target's chat template refuses it \(no role tool\)",
    ),
    "too few": ("a.jsonl", b'{"text": "a"}\n{"text": "a"}\n', r"1 usable prompt\(s\) .* two are needed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_data_is_refused_in_one_sentence(tmp_path: Path, tokenizer: Any, name: str) -> None:
    file, content, message = WRONG[name]
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(TrainingDataError, match=message) as error:
        load_prompts(DataSettings(sources=[str(tmp_path / file)]), tokenizer)
    assert "\n" not in str(error.value)


def test_an_unknown_dataset_is_refused(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    # The variable HF_HUB_OFFLINE is read when these are imported.
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TrainingDataError, match=r"dataset 'no/such-data' cannot be loaded \(.*owner/name:SPLIT"):
        load_prompts(DataSettings(sources=["no/such-data"]), tokenizer)


def test_saved_prompts_come_back(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "d.jsonl", [{"text": f"value_{i} = {i}"} for i in range(9)])
    prompts = load_prompts(DataSettings(sources=[path]), tokenizer)
    assert not are_saved(tmp_path / "prompts")
    save_prompts(prompts, tmp_path / "prompts")
    assert are_saved(tmp_path / "prompts")
    found = load_saved_prompts(tmp_path / "prompts")
    for mine, theirs in ((found.train, prompts.train), (found.held_out, prompts.held_out)):
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_prompts_must_leave_room_for_answers() -> None:
    prompts = [np.zeros(n, dtype=np.uint32) for n in (3, 60)]
    check_length(prompts, 40, 100, "t")
    check_length(prompts, 10**6, None, "t")
    with pytest.raises(
        TrainingDataError, match="up to 60 tokens and answers of 41 exceed the 100 positions of target 't'"
    ):
        check_length(prompts, 41, 100, "t")


def test_a_library_that_is_missing_is_named() -> None:
    with pytest.raises(JakiroConfigError, match=r"'no_such_library'.*pip install 'jakiro-vllm\[train\]'"):
        extra.require("no_such_library")
