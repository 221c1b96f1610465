"""Everything that ``jakiro-vllm train`` can be told: a YAML file, overridden by flags.

Wrong names, types and ranges are refused before anything is computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from jakiro_vllm.draft.head import Variant
from jakiro_vllm.errors import JakiroConfigError


class Section(BaseModel):
    """A group of settings: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(Section):
    """Which prompts the target answers.

    Attributes:
        sources: files (``.jsonl``, ``.json``, ``.parquet``, ``.txt``) or names of hub datasets; a hub name may end
            with ``:SPLIT``.
        prompts: how many to take; None for all.
        held_out: share of the prompts that training never sees, at least one.
        longest_prompt: tokens; longer prompts lose their beginning.
        shortest_prompt: tokens; shorter ones are left out.
        seed: of order and split.
    """

    sources: list[str] = Field(min_length=1)
    prompts: int | None = Field(default=None, ge=2)
    held_out: float = Field(default=0.05, gt=0, lt=1)
    longest_prompt: int = Field(default=1024, ge=1)
    shortest_prompt: int = Field(default=1, ge=1)
    seed: int = 0


class GenerationSettings(Section):
    """How the target answers.

    Attributes:
        new_tokens: longest answer.
        temperatures: prompts take turns among them.
        top_p: of answers with a temperature above 0.
        part: prompts per part file, the unit of resumption.
        engine: further arguments of vLLM's engine, such as ``tensor_parallel_size``.
        seed: of sampling; prompt i has seed + i.
    """

    new_tokens: int = Field(default=512, ge=2)
    temperatures: list[Annotated[float, Field(ge=0)]] = Field(default=[0.0, 0.8], min_length=1)
    top_p: float = Field(default=1.0, gt=0, le=1)
    part: int = Field(default=256, ge=1)
    engine: dict[str, Any] = {}
    seed: int = 0


class FeatureSettings(Section):
    """Where the target's last hidden states come from while the head is trained.

    Attributes:
        source: ``cache`` computes them once and keeps them on disk, ``stream`` computes them in every step, and
            ``auto`` caches what fits ``limit_gib``.
        limit_gib: largest cache, in GiB.
        batch_tokens: of a forward of the target.
    """

    source: Literal["auto", "cache", "stream"] = "auto"
    limit_gib: float = Field(default=64.0, gt=0)
    batch_tokens: int = Field(default=8192, ge=1)


class HeadSettings(Section):
    """What is trained.

    Attributes:
        variant: which MLP.
        num_experts: E; ignored for ``dense``.
        intermediate_size: I of an expert; None for the target's hidden size.
    """

    variant: Variant = Variant.JAKIRO
    num_experts: int = Field(default=2, ge=2)
    intermediate_size: int | None = Field(default=None, ge=1)


class LossSettings(Section):
    """The loss and its terms; the defaults are the reference recipe's.

    Attributes:
        feature: of SmoothL1 between features.
        token: of cross-entropy against the target's distribution.
        right: of the contrastive output, relative to the mixture.
        right_trunk: share of the contrastive output's gradient that reaches what it has in common with the mixture:
            all below the experts' last matrices. The mixture drafts every level but the last, and loses much where
            both pull at the same weights.
        right_order: of a hinge that keeps the first contrastive gate above the second by 1. Their order decides the
            output's sign, which otherwise flips from token to token while the head learns.
        experts: of the mixture of the experts' own distributions against the target's, which trains decoupled
            candidates.
    """

    feature: float = Field(default=1.0, ge=0)
    token: float = Field(default=0.1, ge=0)
    right: float = Field(default=0.5, ge=0)
    right_trunk: float = Field(default=1.0, ge=0, le=1)
    right_order: float = Field(default=0.0, ge=0)
    experts: float = Field(default=0.0, ge=0)


class Phase(Section):
    """A part of the training with a number of rollout steps.

    Attributes:
        share: of all steps.
        steps: drafting steps that are trained on from every position; 1 is the reference.
    """

    share: float = Field(gt=0, le=1)
    steps: int = Field(ge=1, le=8)


class OptimizerSettings(Section):
    """How the head is trained; the defaults are the reference recipe's.

    Attributes:
        epochs: passes over the documents.
        rows: packed rows of an optimizer step, over all workers.
        row_length: tokens of a row; documents are packed and never split.
        micro_rows: rows of a forward; None for all of a worker's at once. Fewer take less memory.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon for the head's matrices, on AdamW's scale; None trains them with AdamW,
            too.
        betas: of AdamW.
        weight_decay: of both.
        schedule: after the warm-up, down to zero.
        warmup_steps: linear warm-up.
        clip_value: gradients are clipped to this magnitude, element by element.
        balance_inputs: whether token embeddings are scaled to the size of the features while the head is trained;
            the factor is folded into ``fc`` at the end. Where they are much smaller, as tied embeddings are, a head
            otherwise hardly learns to read them.
        feature_noise: width of the uniform noise on the target's features.
        rollout: phases in order.
        rollout_decay: weight of a rollout step relative to the one before.
        loss: weights of the loss terms.
        precision: of the forwards.
        compile: whether the loss goes through ``torch.compile``.
        checkpoint_steps: optimizer steps between checkpoints.
        evaluate_steps: optimizer steps between evaluations; None for the end only.
        seed: of initialisation, order and noise.
    """

    epochs: float = Field(default=20.0, gt=0)
    rows: int = Field(default=4, ge=1)
    row_length: int = Field(default=2048, ge=8)
    micro_rows: int | None = Field(default=None, ge=1)
    lr: float = Field(default=9e-5, gt=0)
    muon_lr: float | None = Field(default=None, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=1e-3, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(default=2000, ge=0)
    clip_value: float = Field(default=0.5, gt=0)
    balance_inputs: bool = False
    feature_noise: float = Field(default=0.2, ge=0)
    rollout: list[Phase] = [Phase(share=1.0, steps=1)]
    rollout_decay: float = Field(default=1.0, gt=0)
    loss: LossSettings = LossSettings()
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    compile: bool = True
    checkpoint_steps: int = Field(default=100, ge=1)
    evaluate_steps: int | None = Field(default=None, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _shares_add_up(self) -> Self:
        total = sum(phase.share for phase in self.rollout)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of rollout must add up to 1, got {total:g}")
        return self


class EvaluationSettings(Section):
    """What the head is measured on: the target's greedy answers to held-out prompts.

    Attributes:
        prompts: of the held-out ones, at most.
        depth: levels of a draft.
        width: of the top-k figures.
    """

    prompts: int = Field(default=64, ge=1)
    depth: int = Field(default=6, ge=2, le=16)
    width: int = Field(default=4, ge=1)


class ScaleSettings(Section):
    """How many workers, and whether Ray places them.

    Attributes:
        ray: generate with Ray Data and train with Ray Train; otherwise everything runs here.
        workers: of training.
        engines: of generation; None for as many as workers.
        address: of the Ray cluster; None for one of this machine.
        use_gpu: whether a worker takes a GPU; None where there are some.
    """

    ray: bool = False
    workers: int = Field(default=1, ge=1)
    engines: int | None = Field(default=None, ge=1)
    address: str | None = None
    use_gpu: bool | None = None

    @model_validator(mode="after")
    def _workers_need_ray(self) -> Self:
        if self.workers > 1 and not self.ray:
            raise ValueError(f"{self.workers} workers need Ray: give --ray, or start one process per GPU with torchrun")
        return self


class TrainSettings(Section):
    """All of it.

    Attributes:
        target: folder or hub name of the target.
        output: folder of the head; intermediate results are kept in its subfolder ``work``.
    """

    target: str = Field(min_length=1)
    output: Path
    data: DataSettings
    generation: GenerationSettings = GenerationSettings()
    features: FeatureSettings = FeatureSettings()
    head: HeadSettings = HeadSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    scale: ScaleSettings = ScaleSettings()


def load_settings(file: Path | None, overrides: dict[str, Any]) -> TrainSettings:
    """Reads a YAML file and applies what the command line says.

    Args:
        file: YAML, nested as ``TrainSettings`` is; None for defaults.
        overrides: values by dotted name, such as ``{"optimizer.lr": 1e-4}``.

    Raises:
        JakiroConfigError: naming the first wrong setting, what it got and what it takes.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise JakiroConfigError(f"settings file {file} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise JakiroConfigError(f"settings file {file} is not YAML: {error}") from error
        if not isinstance(values, dict):
            raise JakiroConfigError(f"settings file {file} must hold a mapping, got {type(values).__name__}")
    for name, value in overrides.items():
        *groups, last = name.split(".")
        place = values
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise JakiroConfigError(f"setting {group!r} must be a mapping, got {place!r}")
        place[last] = value
    try:
        return TrainSettings.model_validate(values)
    except ValidationError as error:
        raise JakiroConfigError(_first_problem(error)) from error


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in problem["loc"])
    kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if kind == "missing":
        return f"setting {name!r} is missing; give it as a flag or in the settings file"
    if kind == "extra_forbidden":
        return f"unknown setting {name!r}; see jakiro-vllm train --help"
    if kind == "value_error":  # of this module, which says what it got
        return f"{name}: {message}" if name else message
    return f"setting {name!r}: {message}, got {problem['input']!r}"
