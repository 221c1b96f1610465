"""Documents: prompts with what the target answered, packed for disk.

Shapes: N documents, T tokens of all of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jakiro_vllm.errors import TrainingDataError

_KEYS = ("tokens", "offsets", "prompt_lengths")


@dataclass(frozen=True)
class Shard:
    """Documents, each a prompt and its answer, which may be empty.

    Attributes:
        tokens: ``[T] uint32`` all documents, one after the other.
        offsets: ``[N + 1] int64`` where each document starts; the last is T.
        prompt_lengths: ``[N] int64`` tokens of each document that were given, not generated.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray

    def __len__(self) -> int:
        """N."""
        return len(self.prompt_lengths)

    def document(self, index: int) -> np.ndarray:
        """``[tokens of the document] uint32``."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def num_generated(self) -> int:
        """Tokens that the target wrote."""
        return len(self.tokens) - int(self.prompt_lengths.sum())


def pack_documents(prompts: Sequence[np.ndarray], answers: Sequence[Sequence[int]] | None = None) -> Shard:
    """Joins prompts and their answers, in the same order; without answers the prompts alone."""
    if answers is None:
        answers = [()] * len(prompts)
    pieces, lengths = [np.zeros(0, dtype=np.uint32)], [0]
    for prompt, answer in zip(prompts, answers, strict=True):
        pieces += [np.asarray(prompt, dtype=np.uint32), np.asarray(answer, dtype=np.uint32)]
        lengths.append(len(prompt) + len(answer))
    return Shard(
        np.concatenate(pieces),
        np.cumsum(lengths, dtype=np.int64),
        np.asarray([len(prompt) for prompt in prompts], dtype=np.int64),
    )


def join_shards(shards: Sequence[Shard]) -> Shard:
    """Concatenates shards."""
    ends = np.cumsum([0, *(len(shard.tokens) for shard in shards)])
    offsets = [shard.offsets[:-1] + end for shard, end in zip(shards, ends[:-1], strict=True)]
    return Shard(
        np.concatenate([np.zeros(0, dtype=np.uint32), *(shard.tokens for shard in shards)]),
        np.concatenate([*offsets, ends[-1:]]).astype(np.int64),
        np.concatenate([np.zeros(0, dtype=np.int64), *(shard.prompt_lengths for shard in shards)]),
    )


def save_shard(shard: Shard, path: Path) -> None:
    """Writes a shard; ``path`` either does not change or holds all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, tokens=shard.tokens, offsets=shard.offsets, prompt_lengths=shard.prompt_lengths)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_shard(path: Path) -> Shard:
    """Reads a shard.

    Raises:
        TrainingDataError: if there is none, or it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = sorted(set(_KEYS) - set(file.files))
            if missing:
                raise TrainingDataError(f"{path} lacks {', '.join(missing)}; delete it and run again")
            shard = Shard(*(file[key] for key in _KEYS))
    except TrainingDataError:
        raise
    except Exception as error:  # whatever NumPy and zipfile meet in damaged bytes
        raise TrainingDataError(f"{path} cannot be read ({error}); delete it and run again") from error
    kinds = [(array.ndim, array.dtype.kind) for array in (shard.tokens, shard.offsets, shard.prompt_lengths)]
    if kinds != [(1, "u"), (1, "i"), (1, "i")]:
        raise TrainingDataError(f"{path} does not hold rows of integers; delete it and run again")
    fits = (
        len(shard.offsets) == len(shard) + 1
        and shard.offsets[0] == 0
        and shard.offsets[-1] == len(shard.tokens)
        and (shard.prompt_lengths >= 0).all()
        and (np.diff(shard.offsets) >= shard.prompt_lengths).all()
    )
    if not fits:
        raise TrainingDataError(
            f"{path}: {len(shard.tokens)} tokens and {len(shard)} documents do not fit its offsets; "
            "delete it and run again"
        )
    return shard
