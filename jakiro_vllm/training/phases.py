"""From prompts to a head: prompts, answers, features, training, export. A phase that is complete is skipped."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.training.answers import answer_in_subprocess, load_answers, plan
from jakiro_vllm.training.data import Prompts, are_saved, check_length, load_prompts, save_prompts
from jakiro_vllm.training.documents import join_shards
from jakiro_vllm.training.export import export, is_exported
from jakiro_vllm.training.extra import require
from jakiro_vllm.training.features import choose_features
from jakiro_vllm.training.frozen import Target, head_spec
from jakiro_vllm.training.resume import begin, check
from jakiro_vllm.training.settings import TrainSettings
from jakiro_vllm.training.trainer import train_head
from jakiro_vllm.training.workers import Workers, join_workers

logger = logging.getLogger(__name__)

#: Answers the prompts in a folder; see ``answers.answer_in_subprocess``.
Answer = Callable[[Path, TrainSettings], None]


def train(settings: TrainSettings) -> None:
    """Trains a head, or goes on where an earlier call was interrupted.

    Raises:
        JakiroError: on what the user can mend.
    """
    for library in ("datasets", "matplotlib", "tensorboard", *(["ray"] if settings.scale.ray else [])):
        require(library)  # before hours of work
    if is_exported(settings.output):
        logger.info("%s holds a finished head; choose another output to train another", settings.output)
        return
    if settings.scale.ray:
        from jakiro_vllm.training.scale import answer_with_ray, cluster, fit_with_ray

        with cluster(settings.scale):
            prepare(settings, material_of(settings), answer_with_ray)
            fit_with_ray(settings)
        return
    with join_workers() as workers:  # more than one under torchrun
        if workers.is_first:
            prepare(settings, material_of(settings))
        workers.barrier()
        fit(settings, material_of(settings))


def material_of(settings: TrainSettings) -> Path:
    """Where prompts, answers and features of a run lie."""
    return settings.output / "work"


def prepare(settings: TrainSettings, material: Path, answer: Answer = answer_in_subprocess) -> None:
    """Prompts and answers: all that training needs of vLLM.

    Args:
        settings: of the run.
        material: folder for the results.
        answer: how the target is asked.

    Raises:
        JakiroError: on what the user can mend, before the engine starts if possible.
    """
    asked = {
        "target": settings.target,
        "data": settings.data.model_dump(mode="json"),
        # The engine's arguments may change, for instance after it ran out of memory.
        "generation": settings.generation.model_dump(mode="json", exclude={"engine"}),
    }
    check(material, asked)
    if not are_saved(material / "prompts"):
        prompts = read_prompts(settings)
        begin(material, asked)  # not before: who mends a setting that was refused has begun nothing yet
        save_prompts(prompts, material / "prompts")
    answer(material, settings)


def read_prompts(settings: TrainSettings) -> Prompts:
    """The user's prompts, encoded for the target, if they leave room for an answer."""
    try:
        config = AutoConfig.from_pretrained(settings.target)
        tokenizer = AutoTokenizer.from_pretrained(settings.target)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise JakiroConfigError(
            f"target {settings.target!r} cannot be read ({reason}); give a folder or a hub name"
        ) from error
    head_spec(config, settings.head)  # refuses what can have no head
    prompts = load_prompts(settings.data, tokenizer)
    positions = getattr(config, "max_position_embeddings", None)
    check_length([*prompts.train, *prompts.held_out], settings.generation.new_tokens, positions, settings.target)
    logger.info("prompts: %d to train on, %d held out", len(prompts.train), len(prompts.held_out))
    return prompts


def fit(settings: TrainSettings, material: Path) -> None:
    """Features, training and export; called by every worker.

    Args:
        settings: of the run.
        material: what ``prepare`` made; features are kept there, too.
    """
    workers = Workers.current()
    device = workers.device
    # A CPU computes in float32 whatever the target was saved in; the features are kept in bf16 anyway.
    target = Target.load(settings.target, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    train_parts, held_out_parts = plan(material, settings)
    answers, held_out = load_answers(train_parts), join_shards(load_answers(held_out_parts))
    longest = settings.optimizer.row_length
    features = choose_features(target, answers, material / "features", settings.features, longest)
    documents = join_shards(answers)
    spec = head_spec(target.config, settings.head)
    result = train_head(target, spec, documents, features, held_out, settings.output / "work", settings)
    if workers.is_first:
        facts = {
            "documents": len(documents),
            "generated_tokens": documents.num_generated,
            "held_out_documents": len(held_out),
            "steps": result.steps,
            "tokens": result.tokens,
            "vocab_size": target.vocab_size,
        }
        export(result.head, settings, result.quality, facts, settings.output)
        logger.info("the head is in %s: %s", settings.output, result.quality)
    workers.barrier()
