"""The user's data as prompts: which records there are, what of them the target is asked, and what is held out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from jakiro_vllm.errors import TrainingDataError
from jakiro_vllm.training.documents import Shard, load_shard, pack_documents, save_shard
from jakiro_vllm.training.extra import require
from jakiro_vllm.training.settings import DataSettings

logger = logging.getLogger(__name__)

#: Loader of ``datasets`` by suffix.
_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
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
        records = _records(source, settings)
        for number, record in enumerate(records, start=1):
            ids = _encode(record, f"{source}, record {number}", settings, tokenizer)
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


def _records(source: str, settings: DataSettings) -> Iterator[dict[str, Any]]:
    """The records of a file or of a hub dataset, one by one.

    Raises:
        TrainingDataError: if it cannot be read.
    """
    datasets = require("datasets")
    path = Path(source)
    if path.is_file():
        loader = _LOADERS.get(path.suffix.lower())
        if loader is None:
            raise TrainingDataError(
                f"{source} has the suffix {path.suffix!r}; files of these suffixes can be read: {', '.join(_LOADERS)}"
            )
        found = _read(source, lambda: datasets.load_dataset(loader, data_files=source, split="train", streaming=True))
        yield from _with_reason(source, found)
        return
    name, _, split = source.partition(":")
    split = split or "train"
    is_path = path.suffix.lower() in _LOADERS or path.is_absolute() or source.startswith(".")
    if is_path and not Path(name).is_dir():
        raise TrainingDataError(f"{source} is not a file; give an existing file or the name of a hub dataset")
    found = _read(source, lambda: datasets.load_dataset(name, split=split, streaming=True))
    if settings.prompts is not None:
        found = found.shuffle(seed=settings.seed, buffer_size=10_000)
        found = islice(found, _RECORDS_PER_PROMPT * settings.prompts)
    yield from _with_reason(source, found)


def _read(source: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # of many libraries
        raise _unreadable(source, error) from error


def _with_reason(source: str, records: Any) -> Iterator[dict[str, Any]]:
    """Passes records on, and says where reading failed."""
    count = 0
    records = iter(records)
    while True:
        try:
            record = next(records)
        except StopIteration:
            break
        except Exception as error:  # of many libraries
            raise _unreadable(source, error) from error
        count += 1
        yield record
    if not count:
        raise TrainingDataError(f"{source} holds no records; give a file with at least one")


def _unreadable(source: str, error: Exception) -> TrainingDataError:
    path = Path(source)
    if path.is_file():
        if not path.stat().st_size:
            return TrainingDataError(f"{source} is empty; give a file with at least one record")
        if path.suffix.lower() == ".jsonl" and (bad := _bad_line(path)) is not None:
            return bad
        reason = f"{error}".strip().partition("\n")[0] or type(error).__name__
        return TrainingDataError(f"{source} cannot be read as {path.suffix} ({reason}); mend or leave out the file")
    reason = f"{error}".strip().partition("\n")[0] or type(error).__name__
    return TrainingDataError(
        f"dataset {source!r} cannot be loaded ({reason}); give a file, or a hub name as owner/name or owner/name:SPLIT"
    )


def _bad_line(path: Path) -> TrainingDataError | None:
    """The first line that is not a JSON object."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            value = json.loads(line.decode("utf-8-sig")) if line.strip() else {}
        except UnicodeDecodeError as error:
            return TrainingDataError(f"{path}:{number}: not UTF-8 ({error.reason}); mend or remove that line")
        except json.JSONDecodeError as error:
            return TrainingDataError(f"{path}:{number}: not JSON ({error.msg}); mend or remove that line")
        if not isinstance(value, dict):
            return TrainingDataError(
                f"{path}:{number}: a record must be a JSON object, got {type(value).__name__}; mend or remove that line"
            )
    return None


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
    return value


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
        found.append({"role": _ROLES.get(role, role), "content": content})
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
