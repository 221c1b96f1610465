"""The user's data as prompts: which records there are, what of them the target is asked, and what is held out."""

from __future__ import annotations

import codecs
import glob
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from jakiro_vllm.errors import TrainingDataError
from jakiro_vllm.training.documents import Shard, load_shard, pack_documents, save_shard
from jakiro_vllm.training.extra import require
from jakiro_vllm.training.settings import DataSettings

logger = logging.getLogger(__name__)

#: Columns, the first that is there counts.
DIALOGUES, QUESTIONS, TEXTS = ("messages", "conversations"), ("prompt", "instruction", "question"), ("text",)
#: ShareGPT's names of who speaks.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
#: Of a hub dataset of unknown size, so many records are read for each prompt that is wanted.
_RECORDS_PER_PROMPT = 4
_SETS = ("train", "held_out")

Message = dict[str, str]


@dataclass(frozen=True)
class Prompts:
    """Token ids, ``[tokens] uint32`` each.

    Attributes:
        train: what the target answers for training.
        held_out: what it answers for measuring; none of them is in ``train``.
    """

    train: list[np.ndarray]
    held_out: list[np.ndarray]


def load_prompts(settings: DataSettings, tokenizer: Any) -> Prompts:
    """Reads, encodes, shuffles and splits the prompts.

    Args:
        settings: sources and limits.
        tokenizer: the target's; its chat template is used for dialogues and questions if it has one.

    Raises:
        TrainingDataError: naming file and record of what cannot be read, or that there are too few prompts.
    """
    prompts: dict[bytes, np.ndarray] = {}
    read = short = 0
    for source in settings.sources:
        for where, record in _records(source, settings):
            ids = _encode(record, where, settings, tokenizer)
            read += 1
            if len(ids) < settings.shortest_prompt:
                short += 1
            else:
                prompts.setdefault(ids.tobytes(), ids)
    kept = list(prompts.values())
    logger.info(
        "%d records: %d prompts, %d the same as another, %d too short", read, len(kept), read - short - len(kept), short
    )
    order = np.random.default_rng(settings.seed).permutation(len(kept)).tolist()
    chosen = [kept[i] for i in order[: settings.prompts]]
    if len(chosen) < 2:
        raise TrainingDataError(
            f"{', '.join(settings.sources)}: {len(chosen)} usable prompt(s) of at least {settings.shortest_prompt} "
            "tokens, and two are needed, one of them to measure on; give more data"
        )
    held_out = max(1, round(settings.held_out * len(chosen)))
    held_out = min(held_out, len(chosen) - 1)
    return Prompts(chosen[held_out:], chosen[:held_out])


def save_prompts(prompts: Prompts, folder: Path) -> None:
    """Writes both sets; the last file is written last."""
    for name in _SETS:
        save_shard(pack_documents(getattr(prompts, name)), folder / f"{name}.npz")


def are_saved(folder: Path) -> bool:
    """Whether both sets are there."""
    return all((folder / f"{name}.npz").is_file() for name in _SETS)


def load_saved_prompts(folder: Path) -> Prompts:
    """Reads what ``save_prompts`` wrote.

    Raises:
        TrainingDataError: if a file is damaged.
    """
    return Prompts(*(_documents(load_shard(folder / f"{name}.npz")) for name in _SETS))


def _documents(shard: Shard) -> list[np.ndarray]:
    return [shard.document(i) for i in range(len(shard))]


def _records(source: str, settings: DataSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file or of a hub dataset, one by one, each with its place for messages.

    Raises:
        TrainingDataError: if it cannot be read.
    """
    path = Path(source)
    found = _file_records(path) if path.is_file() else _hub_records(source, settings)
    first = next(found, None)
    if first is None:
        raise TrainingDataError(f"{source} holds no records; give a file with at least one")
    yield first
    yield from found


def _file_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise TrainingDataError(
            f"{path} has the suffix {path.suffix!r}; files of these suffixes can be read: {', '.join(_READERS)}"
        )
    if not path.stat().st_size:
        raise TrainingDataError(f"{path} is empty; give a file with at least one record")
    return read(path)


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    datasets = require("datasets")

    def refuse(reason: str) -> TrainingDataError:
        return TrainingDataError(f"{path} cannot be read as .parquet ({reason}); mend or leave out the file")

    # A name is taken for a pattern: brackets and stars in it are meant literally.
    file = glob.escape(str(path))
    return _numbered(
        str(path), lambda: datasets.load_dataset("parquet", data_files=file, split="train", streaming=True), refuse
    )


def _hub_records(source: str, settings: DataSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    datasets = require("datasets")
    name, _, split = source.partition(":")
    path = Path(source)
    is_path = path.suffix.lower() in _READERS or path.is_absolute() or source.startswith(".")
    if is_path and not Path(name).is_dir():
        raise TrainingDataError(f"{source} is not a file; give an existing file or the name of a hub dataset")

    def load() -> Any:
        found = datasets.load_dataset(name, split=split or "train", streaming=True)
        if settings.prompts is None:
            return found
        found = found.shuffle(seed=settings.seed, buffer_size=10_000)
        return islice(found, _RECORDS_PER_PROMPT * settings.prompts)

    def refuse(reason: str) -> TrainingDataError:
        return TrainingDataError(
            f"dataset {source!r} cannot be loaded ({reason}); give a file, or a hub name as owner/name or "
            "owner/name:SPLIT"
        )

    return _numbered(source, load, refuse)


def _numbered(
    source: str, load: Callable[[], Any], refuse: Callable[[str], TrainingDataError]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What ``load`` gives, numbered; what goes wrong meanwhile becomes a refusal."""
    try:
        records = iter(load())
    except Exception as error:  # of many libraries
        raise refuse(_reason(error)) from error
    for number in count(1):
        try:
            record = next(records)
        except StopIteration:
            return
        except Exception as error:  # of many libraries
            raise refuse(_reason(error)) from error
        yield f"{source}, record {number}", record


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines with their places, without a byte-order mark and line ends.

    Raises:
        TrainingDataError: naming the first line that is not UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise TrainingDataError(
                    f"{path}:{number}: not UTF-8 ({error.reason}); mend or remove that line"
                ) from error
            yield f"{path}:{number}", text.rstrip("\r\n")


def _text_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((where, {"text": line}) for where, line in _lines(path))


def _json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of a JSON array, or one a line.

    Not with ``datasets``: it infers types by blocks of 10 MB, so that one record of another type in a column puts
    quotes around all texts of its block, and a key that first comes in a later block makes it fail.
    """
    with path.open("rb") as file:
        is_array = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    if is_array and path.suffix.lower() == ".json":
        yield from _array_records(path)
        return
    for where, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else _reason(error)
            raise TrainingDataError(f"{where}: not JSON ({reason}); mend or remove that line") from error
        yield where, _object(value, where, "mend or remove that line")


def _array_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrainingDataError(
            f"{path} cannot be read as .json ({_reason(error)}); mend or leave out the file"
        ) from error
    for number, value in enumerate(values, start=1):
        where = f"{path}, record {number}"
        yield where, _object(value, where, "mend or remove that record")


def _object(value: Any, where: str, remedy: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TrainingDataError(f"{where}: a record must be a JSON object, got {type(value).__name__}; {remedy}")
    return value


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


#: Readers of files by suffix.
_READERS: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]] = {
    ".jsonl": _json_records,
    ".json": _json_records,
    ".parquet": _parquet_records,
    ".txt": _text_records,
}


def _encode(record: dict[str, Any], where: str, settings: DataSettings, tokenizer: Any) -> np.ndarray:
    """What the target is asked, ``[tokens] uint32``."""
    column = next((c for c in (*DIALOGUES, *QUESTIONS, *TEXTS) if record.get(c) is not None), None)
    if column is None:
        raise TrainingDataError(
            f"{where}: columns {', '.join(map(repr, record)) or 'none'}; one of these is needed: "
            f"{', '.join((*DIALOGUES, *QUESTIONS, *TEXTS))}"
        )
    value = record[column]
    if column in TEXTS:
        ids = _plain(_text(value, where, column), tokenizer)[: settings.longest_prompt]
    else:
        if column in QUESTIONS and not isinstance(value, list):
            question = _text(value, where, column)
            more = record.get("input") if column == "instruction" else None
            if more:
                question += f"\n\n{_text(more, where, 'input')}"
            messages = [{"role": "user", "content": question}]
        else:
            messages = _up_to_last_question(_messages(value, where, column), where)
        ids = _ask(messages, where, tokenizer)[-settings.longest_prompt :]
    return np.asarray(ids, dtype=np.uint32)


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise TrainingDataError(f"{where}: {column!r} must be a string, got {type(value).__name__}; mend the record")
    return _valid(value, where, column)


def _valid(text: str, where: str, name: str) -> str:
    """Refuses half a surrogate pair, which JSON can hold and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TrainingDataError(f"{where}: {name!r} is not Unicode ({error.reason}); mend the record") from error
    return text


def _messages(value: Any, where: str, column: str) -> list[Message]:
    """``role``/``content`` or ShareGPT's ``from``/``value``."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise TrainingDataError(f"{where}: {column!r} must be a list of messages, got {_short(value)}; mend the record")
    found = []
    for message in value:
        role = message.get("role") or message.get("from")
        content = message.get("content") if "content" in message else message.get("value")
        if not isinstance(role, str) or not isinstance(content, str):
            raise TrainingDataError(
                f"{where}: a message needs a string 'role' and a string 'content' (or 'from' and 'value'), got "
                f"{_short(message)}; mend the record"
            )
        found.append({"role": _ROLES.get(role, role), "content": _valid(content, where, "content")})
    return found


def _up_to_last_question(messages: list[Message], where: str) -> list[Message]:
    """Earlier answers stay as context; the last one is the target's to write."""
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        raise TrainingDataError(f"{where}: no message of a user, so there is nothing to answer; mend the record")
    return messages[: asked[-1] + 1]


def _ask(messages: list[Message], where: str, tokenizer: Any) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        return _plain("\n".join(message["content"] for message in messages), tokenizer)
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:  # whatever a template raises
        reason = f"{error}".strip().partition("\n")[0]
        raise TrainingDataError(
            f"{where}: the target's chat template refuses it ({reason}); mend the record"
        ) from error


def _plain(text: str, tokenizer: Any) -> list[int]:
    """As vLLM encodes a prompt of the completions endpoint."""
    return tokenizer(text, verbose=False)["input_ids"]


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def check_length(prompts: Sequence[np.ndarray], new_tokens: int, limit: int | None, target: str) -> None:
    """Refuses prompts that leave no room for an answer.

    Args:
        prompts: all that will be asked.
        new_tokens: of an answer.
        limit: positions of the target; None if it does not say.
        target: for the message.

    Raises:
        TrainingDataError: if the longest prompt and its answer exceed ``limit``.
    """
    longest = max(map(len, prompts))
    if limit is not None and longest + new_tokens > limit:
        raise TrainingDataError(
            f"prompts of up to {longest} tokens and answers of {new_tokens} exceed the {limit} positions of target "
            f"{target!r}; lower data.longest_prompt or generation.new_tokens"
        )
