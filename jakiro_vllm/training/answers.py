"""The target answers the prompts: what a draft head learns from, and what it is measured on.

A head is judged on text that the target writes, not on text that people wrote. Answers are generated in vLLM's offline
engine and written part by part; every prompt has its own seed, so an interrupted run gives what an uninterrupted one
would have given.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from jakiro_vllm.errors import JakiroError
from jakiro_vllm.training.data import load_saved_prompts
from jakiro_vllm.training.documents import Shard, load_shard, pack_documents, save_shard
from jakiro_vllm.training.resume import write_atomically
from jakiro_vllm.training.settings import GenerationSettings, TrainSettings

logger = logging.getLogger(__name__)

#: File beside the settings in which a failed process leaves its reason.
_FAILURE = "failure.txt"
#: Between looks at whether the run that started this process is still there.
_WATCH_SECONDS = 0.5


class GenerationFailed(JakiroError):
    """The engine ended before all prompts were answered."""


@dataclass(frozen=True)
class Part:
    """Prompts that are answered and written together.

    Attributes:
        file: of the answers.
        first: index of the first prompt in its set.
        prompts: ``[tokens] uint32`` each.
        temperatures: of the answers; prompt i takes the ``i mod len``-th.
    """

    file: Path
    first: int
    prompts: Sequence[np.ndarray]
    temperatures: Sequence[float]


def plan(work: Path, settings: TrainSettings) -> tuple[list[Part], list[Part]]:
    """The parts of training and of held-out answers, from the prompts in ``work``.

    Held-out answers are greedy, and no more than are measured.
    """
    prompts = load_saved_prompts(work / "prompts")
    generation = settings.generation
    held_out = prompts.held_out[: settings.evaluation.prompts]
    return (
        _parts(work / "answers" / "train", prompts.train, generation.part, generation.temperatures),
        _parts(work / "answers" / "held_out", held_out, generation.part, [0.0]),
    )


def _parts(folder: Path, prompts: Sequence[np.ndarray], size: int, temperatures: Sequence[float]) -> list[Part]:
    return [
        Part(folder / f"part-{first // size:05d}.npz", first, prompts[first : first + size], temperatures)
        for first in range(0, len(prompts), size)
    ]


def missing(parts: Sequence[Part]) -> list[Part]:
    """Those that are not there yet."""
    return [part for part in parts if not part.file.is_file()]


def load_answers(parts: Sequence[Part]) -> list[Shard]:
    """Reads finished parts.

    Raises:
        TrainingDataError: if a file is damaged.
    """
    return [load_shard(part.file) for part in parts]


class Answerer:
    """An engine with the target."""

    def __init__(self, target: str, settings: GenerationSettings, longest_prompt: int, engine: Any = None) -> None:
        """Starts the engine.

        Args:
            target: folder or hub name.
            settings: of generation.
            longest_prompt: tokens.
            engine: instead of a new one, for tests.
        """
        self.settings = settings
        if engine is None:
            configure_environment()
            from vllm import LLM

            engine = LLM(**engine_arguments(target, settings, longest_prompt))
        self.engine = engine

    def answer(self, part: Part) -> Shard:
        """Answers a part and writes it."""
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": prompt.tolist()} for prompt in part.prompts]
        params = []
        for number in range(part.first, part.first + len(asked)):
            temperature = part.temperatures[number % len(part.temperatures)]
            params.append(
                SamplingParams(
                    temperature=temperature,
                    top_p=self.settings.top_p if temperature else 1.0,
                    seed=self.settings.seed + number if temperature else None,
                    max_tokens=self.settings.new_tokens,
                    detokenize=False,
                )
            )
        # What earlier parts left in the cache would change how prompts are computed, and with it ties between tokens:
        # a part must not depend on whether it is the first after an interruption.
        self.engine.reset_prefix_cache()
        outputs = self.engine.generate(asked, params, use_tqdm=False)
        shard = pack_documents(part.prompts, [list(output.outputs[0].token_ids) for output in outputs])
        save_shard(shard, part.file)
        return shard


def configure_environment() -> None:
    """Sets what vLLM reads from the environment, where the user has not; before vLLM is imported."""
    # Nothing else runs in this process, so the engine needs no second one.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not _has_gpu():
        cores = sorted(os.sched_getaffinity(0))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def engine_arguments(target: str, settings: GenerationSettings, longest_prompt: int) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``; ``settings.engine`` has the last word."""
    arguments: dict[str, Any] = {
        "model": target,
        "max_model_len": longest_prompt + settings.new_tokens,
        "seed": settings.seed,
        "disable_log_stats": True,
    }
    if not _has_gpu():
        arguments |= {
            "dtype": "float32",
            "enforce_eager": True,  # compiling takes longer than it saves
            # vLLM rewinds the generator of a seeded request whose prompt it cuts, which CPU generators cannot do.
            "enable_chunked_prefill": False,
            "max_num_seqs": 128,
        }
    return arguments | settings.engine


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def answer_in_subprocess(work: Path, settings: TrainSettings) -> None:
    """Answers what is missing, in a process of its own: vLLM pins the threads of the one it runs in.

    Raises:
        GenerationFailed: if the process failed, with its last error; its whole output is shown.
    """
    train, held_out = plan(work, settings)
    if not missing([*train, *held_out]):
        logger.info("answers: complete")
        return
    file = work / "answers" / "settings.json"
    write_atomically(file, settings.model_dump_json(indent=2) + "\n")
    failure = file.parent / _FAILURE
    failure.unlink(missing_ok=True)
    # -P: modules are not looked for in the user's folder, as they are not by the command jakiro-vllm.
    command = [sys.executable, "-P", "-m", "jakiro_vllm.training.answers", str(work), str(file)]
    code = subprocess.run([*command, "--parent", str(os.getpid())], check=False).returncode
    if code:
        why = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
        reason = f" ({failure.read_text(encoding='utf-8').strip()})" if failure.is_file() else ""
        raise GenerationFailed(
            f"generation {why}{reason}, see its output above; finished parts are kept in {file.parent}, run again "
            "to go on"
        )


def end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone.

    Otherwise an engine would outlive a killed run, and write the same files as the one that a new run starts.

    Args:
        parent: id of the process that started this one.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)  # at once: the engine's threads would not hear of an exception in this one

    threading.Thread(target=watch, name="end_with", daemon=True).start()


def main() -> None:
    """Answers what is missing: ``python -m jakiro_vllm.training.answers WORK SETTINGS``."""
    parser = argparse.ArgumentParser(description="Let a target answer prompts; a step of jakiro-vllm train.")
    parser.add_argument("work", type=Path)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this process, which started it, is gone")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.parent is not None:
        end_with(args.parent)
    try:
        answer_missing(args.work, TrainSettings.model_validate_json(args.settings.read_text(encoding="utf-8")))
    except Exception as error:
        words = f"{type(error).__name__}: {error}".split()  # vLLM's messages have several lines
        write_atomically(args.settings.parent / _FAILURE, textwrap.shorten(" ".join(words), 400) + "\n")
        raise


def answer_missing(work: Path, settings: TrainSettings) -> None:
    """Answers what is missing with one engine, which pins the threads of this process."""
    train, held_out = plan(work, settings)
    parts = [*train, *held_out]
    wanted = missing(parts)
    longest = max(len(prompt) for part in parts for prompt in part.prompts)
    answerer = Answerer(settings.target, settings.generation, longest)
    started, tokens = time.monotonic(), 0
    total = sum(len(part.prompts) for part in parts)
    done = total - sum(len(part.prompts) for part in wanted)
    with tqdm(total=total, initial=done, desc="answers", unit="prompt") as bar:
        for part in wanted:
            tokens += answerer.answer(part).num_generated
            bar.set_postfix_str(f"{tokens / (time.monotonic() - started):,.0f} tok/s", refresh=False)
            bar.update(len(part.prompts))
    logger.info("%d prompts, %d generated tokens, %.0f s", total - done, tokens, time.monotonic() - started)


if __name__ == "__main__":
    main()
