"""What a training keeps while it runs: its checkpoint and its curves."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.training.quality import Quality

logger = logging.getLogger(__name__)

CHECKPOINT, METRICS, LOGS = "checkpoint.pt", "metrics.jsonl", "logs"


class Checkpoint:
    """The state of a run in one file."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self._fingerprint = fingerprint

    def save(self, state: dict[str, Any]) -> None:
        """Replaces the file; an interruption leaves the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("wb") as file:
            torch.save(state | {"fingerprint": self._fingerprint}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)

    def load(self) -> dict[str, Any] | None:
        """The state, or None if there is no file.

        Raises:
            JakiroConfigError: if it is damaged, or belongs to another run; names what differs.
        """
        if not self.path.is_file():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            theirs, mine = json.loads(state["fingerprint"]), json.loads(self._fingerprint)
        except Exception as error:  # damaged bytes surface as almost anything
            raise JakiroConfigError(
                f"{self.path} cannot be read, it may be damaged ({type(error).__name__}); delete it to start again"
            ) from error
        for name in mine:
            if theirs.get(name) != mine[name]:
                raise JakiroConfigError(
                    f"{self.path} belongs to a run with {name} {theirs.get(name)!r}, not {mine[name]!r}; use the same "
                    "again, delete the file, or choose another output"
                )
        return state


class Record:
    """The curves of a run: ``metrics.jsonl``, and TensorBoard where it is installed."""

    def __init__(self, work: Path, first_step: int) -> None:
        work.mkdir(parents=True, exist_ok=True)
        path = work / METRICS
        kept = _lines_before(path, first_step)
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)
        self._lines = path.open("a", encoding="utf-8", buffering=1)
        self._board: Any = None
        if importlib.util.find_spec("tensorboard") is None:
            logger.info("tensorboard is not installed; the curves are in %s only", path)
        else:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(work / LOGS), purge_step=first_step)

    def step(self, step: int, values: dict[str, float], tokens_per_second: float) -> None:
        """Notes an optimizer step, counted from 0."""
        self._lines.write(json.dumps({"step": step} | values) + "\n")
        if self._board is not None:
            for name, value in (values | {"tokens_per_second": tokens_per_second}).items():
                self._board.add_scalar(f"training/{name}", value, step)

    def quality(self, done: int, quality: Quality) -> None:
        """Notes an evaluation behind so many steps."""
        if self._board is None:
            return
        values = {
            "acceptance_length": quality.acceptance_length,
            "acceptance_length_top_k": quality.acceptance_length_top_k,
        }
        for name, shares in (("top1", quality.top1), ("top_k", quality.top_k)):
            values |= {f"{name}/depth_{depth}": share for depth, share in enumerate(shares, start=1)}
        if quality.experts is not None:
            figures = asdict(quality.experts)
            values |= {f"experts/{name}": figures[name] for name in ("entropy", "same_top1", "overlap_top_k")}
        for name, value in values.items():
            self._board.add_scalar(f"held_out/{name}", value, done)
        self._board.flush()

    def close(self) -> None:
        """Writes what is still to be written."""
        self._lines.close()
        if self._board is not None:
            self._board.close()


def _lines_before(path: Path, step: int) -> list[str]:
    """The lines of earlier steps; those behind the checkpoint are computed again, and the last may be half."""
    kept: list[str] = []
    if not path.is_file():
        return kept
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            break
    return kept
