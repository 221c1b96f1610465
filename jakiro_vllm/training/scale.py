"""The same phases with Ray: engines answer part files side by side, and workers train on one global batch.

All machines must see the output folder under the same path.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.training.answers import Answerer, GenerationFailed, missing, plan
from jakiro_vllm.training.settings import ScaleSettings, TrainSettings
from jakiro_vllm.training.trainer import TrainingStopped

logger = logging.getLogger(__name__)


@contextmanager
def cluster(settings: ScaleSettings) -> Iterator[None]:
    """Joins the Ray cluster, or starts one on this machine.

    Raises:
        JakiroConfigError: if the cluster cannot be reached, or cannot hold the workers.
    """
    import ray

    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=settings.address, log_to_driver=True, include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise JakiroConfigError(
                f"Ray cluster {settings.address!r} cannot be reached ({reason}); start one with 'ray start --head', "
                "or leave scale.address out"
            ) from error
    try:
        resource = "GPU" if uses_gpus(settings) else "CPU"
        there = int(ray.cluster_resources().get(resource, 0))
        if settings.workers > there:
            raise JakiroConfigError(
                f"{settings.workers} workers need one {resource} each, the Ray cluster has {there}; lower "
                "scale.workers or add machines"
            )
        yield
    finally:
        if started:
            ray.shutdown()


def uses_gpus(settings: ScaleSettings) -> bool:
    """Whether a worker takes a GPU."""
    import ray

    return bool(ray.cluster_resources().get("GPU")) if settings.use_gpu is None else settings.use_gpu


class _Actor:
    """An engine in a Ray worker; Ray Data calls it with one part at a time."""

    def __init__(self, work: str, settings: str) -> None:
        self.settings = TrainSettings.model_validate_json(settings)
        train, held_out = plan(Path(work), self.settings)
        self.parts = [*train, *held_out]
        longest = max(len(prompt) for part in self.parts for prompt in part.prompts)
        self.answerer = Answerer(self.settings.target, self.settings.generation, longest)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = self.answerer.answer(self.parts[row["part"]])
        return {"part": row["part"], "generated": shard.num_generated}


def answer_with_ray(work: Path, settings: TrainSettings) -> None:
    """Answers what is missing, with ``scale.engines`` engines.

    Raises:
        GenerationFailed: if an engine failed.
    """
    import ray

    train, held_out = plan(work, settings)
    parts = [*train, *held_out]
    wanted = missing(parts)
    if not wanted:
        logger.info("answers: complete")
        return
    engines = min(len(wanted), settings.scale.engines or settings.scale.workers)
    gpus = settings.generation.engine.get("tensor_parallel_size", 1) if uses_gpus(settings.scale) else 0
    rows = [{"part": number} for number, part in enumerate(parts) if not part.file.is_file()]
    answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Actor,
        fn_constructor_args=(str(work.absolute()), settings.model_dump_json()),
        concurrency=engines,
        num_gpus=gpus or None,
    )
    try:
        tokens = sum(row["generated"] for row in answered.iter_rows())
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise GenerationFailed(
            f"generation with Ray failed ({reason}); finished parts are kept in {work / 'answers'}, run again to go on"
        ) from error
    logger.info("%d parts, %d generated tokens, %d engines", len(rows), tokens, engines)


def fit_with_ray(settings: TrainSettings) -> None:
    """Trains in ``scale.workers`` workers.

    Raises:
        TrainingStopped: if a worker failed.
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    output = settings.output.absolute()
    trainer = TorchTrainer(
        _fit,
        train_loop_config={"settings": settings.model_copy(update={"output": output}).model_dump_json()},
        scaling_config=ScalingConfig(num_workers=settings.scale.workers, use_gpu=uses_gpus(settings.scale)),
        run_config=RunConfig(name="train", storage_path=str(output / "work" / "ray")),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray wraps what a worker raised in errors of its own
        reason = str(error).strip().splitlines()[-1]
        raise TrainingStopped(
            f"training with Ray failed ({reason}); run again to go on from the last checkpoint"
        ) from error


def _fit(config: dict[str, Any]) -> None:
    """What a worker of Ray Train runs; Ray has initialised ``torch.distributed``."""
    from jakiro_vllm.training.phases import fit, material_of

    logging.basicConfig(level=logging.INFO)
    settings = TrainSettings.model_validate_json(config["settings"])
    fit(settings, material_of(settings))
