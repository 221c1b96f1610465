"""Trains a draft head on the features of its frozen target; in one process, or in several on one global batch.

Shapes: R rows of a step over all workers, B rows of a forward, L positions, C hidden size, S rollout steps.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm
from transformers import get_scheduler

from jakiro_vllm.draft.head import DraftHead, HeadSpec
from jakiro_vllm.errors import JakiroConfigError, JakiroError
from jakiro_vllm.training.documents import Shard
from jakiro_vllm.training.features import FeatureSource, StreamedFeatures, fingerprint_documents, place_features
from jakiro_vllm.training.frozen import Target
from jakiro_vllm.training.objective import PLAIN, compiled_functions, objective, row_scales
from jakiro_vllm.training.packing import Batch, Plan
from jakiro_vllm.training.quality import Quality, evaluate_head
from jakiro_vllm.training.run_files import CHECKPOINT, Checkpoint, Record
from jakiro_vllm.training.settings import OptimizerSettings, TrainSettings
from jakiro_vllm.training.workers import Workers

logger = logging.getLogger(__name__)

#: Settings that change how a result is computed, and not which: a run may go on with others.
_OPERATIONAL = {"micro_rows", "compile", "checkpoint_steps", "evaluate_steps"}
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class TrainingStopped(JakiroError):
    """The loss or its gradient stopped being a number; the last checkpoint is as it was."""


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves behind; the same in every worker.

    Attributes:
        head: trained, in evaluation mode.
        quality: on held-out answers.
        steps: optimizer steps of the whole run.
        tokens: that the head was trained on, over all epochs.
        parameters: of the head.
        seconds: of this sitting.
    """

    head: DraftHead
    quality: Quality
    steps: int
    tokens: int
    parameters: int
    seconds: float


def train_head(
    target: Target,
    spec: HeadSpec,
    documents: Shard,
    features: FeatureSource,
    held_out: Shard,
    work: Path,
    settings: TrainSettings,
) -> TrainingResult:
    """Trains a head, or goes on from the checkpoint in ``work``.

    The result of an interrupted run is that of an uninterrupted one: order and noise depend on seed and step
    alone. Several workers compute what one would, to the rounding of sums.

    Args:
        target: frozen, on the device to train on.
        spec: of the head.
        documents: what the target wrote.
        features: of ``documents``.
        held_out: greedy answers to other prompts, to be measured on.
        work: folder of checkpoint, ``metrics.jsonl`` and TensorBoard logs.
        settings: of the run.

    Raises:
        JakiroConfigError: if the checkpoint belongs to another run, or there is too little to train on.
        TrainingStopped: if the loss is not a number any more.
    """
    with _Session(target, spec, documents, features, held_out, work, settings) as session:
        return session.run()


class _Session:
    """One sitting of a training."""

    def __init__(
        self,
        target: Target,
        spec: HeadSpec,
        documents: Shard,
        features: FeatureSource,
        held_out: Shard,
        work: Path,
        settings: TrainSettings,
    ) -> None:
        self.workers = Workers.current()
        self.target, self.documents, self.features = target, documents, features
        self.held_out, self.settings, self.recipe = held_out, settings, settings.optimizer
        self.device = target.device
        recipe = self.recipe
        if self.workers.size > recipe.rows:
            raise JakiroConfigError(
                f"optimizer.rows must be at least the number of workers, {self.workers.size}, got {recipe.rows}"
            )
        self.plan = Plan(documents, recipe.row_length, recipe.rows, recipe.seed)
        self.total_steps = _total_steps(self.plan, recipe)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.head = DraftHead(spec).to(self.device)
        longest = max((len(held_out.document(i)) for i in range(len(held_out))), default=0)
        self.head.prepare_positions(max(recipe.row_length, longest))
        self.parameters = list(self.head.parameters())
        self.embed_scale = self._input_balance() if recipe.balance_inputs else 1.0
        if recipe.warmup_steps > self.total_steps // 2:
            logger.warning(
                "optimizer.warmup_steps is cut from %d to %d, half of the run",
                recipe.warmup_steps,
                self.total_steps // 2,
            )
        self.optimizers = _optimizers(self.head, recipe)
        self.schedules = [_schedule(optimizer, recipe, self.total_steps) for optimizer in self.optimizers]
        self.stateful: list[Any] = [*self.optimizers, *self.schedules]
        self.functions = compiled_functions() if recipe.compile else PLAIN
        self.checkpoint = Checkpoint(work / CHECKPOINT, _fingerprint(target, spec, documents, recipe))
        state = self.checkpoint.load()
        self.first_step, self.saved_step, self.tokens = 0, 0, 0
        if state is not None:
            self.head.load_state_dict(state["head"])
            for mine, kept in zip(self.stateful, state["optimizers"], strict=True):
                mine.load_state_dict(kept)
            self.first_step = self.saved_step = state["step"]
            self.tokens = state["tokens"]
        self.workers.barrier()  # nobody writes before all have read
        self.record = Record(work, self.first_step) if self.workers.is_first else None

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self.record is not None:
            self.record.close()

    def run(self) -> TrainingResult:
        started = time.monotonic()
        count = sum(p.numel() for p in self.parameters)
        logger.info(
            "draft head: %.2fM parameters; steps %d to %d of %d tokens, %d worker(s)",
            count / 1e6,
            self.first_step + 1,
            self.total_steps,
            self.recipe.rows * self.recipe.row_length,
            self.workers.size,
        )
        self._train()
        head = self._folded()
        quality = self._evaluate(head, self.total_steps)
        logger.info("held out: %s", quality)
        return TrainingResult(head, quality, self.total_steps, self.tokens, count, time.monotonic() - started)

    def _train(self) -> None:
        started, first_tokens = time.monotonic(), self.tokens
        bar = tqdm(
            total=self.total_steps,
            initial=self.first_step,
            desc="training",
            unit="step",
            disable=not self.workers.is_first,
        )
        with bar, _read_ahead(self._host_step, range(self.first_step, self.total_steps), self.features) as steps:
            for step, work in zip(range(self.first_step, self.total_steps), steps, strict=True):
                lr = float(self.schedules[0].get_last_lr()[0])
                loss = self._step(step, work)
                self.tokens += work.tokens
                rate = (self.tokens - first_tokens) / (time.monotonic() - started)
                bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tok/s", refresh=False)
                bar.update()
                if self.record is not None:
                    self.record.step(step, {"loss": loss, "lr": lr}, rate)
                done = step + 1
                if done % self.recipe.checkpoint_steps == 0 or done == self.total_steps:
                    self._save(done)
                every = self.recipe.evaluate_steps
                if every is not None and done % every == 0 and done < self.total_steps:
                    logger.info("step %d, held out: %s", done, self._evaluate(self._folded(), done))

    def _host_step(self, step: int) -> _StepWork:
        """What a step needs, as far as it can be had ahead of time: segments, tokens, and features from disk."""
        recipe = self.recipe
        rows, chosen = self.plan.step(step)
        segments = rows.segments(chosen)
        steps = _rollout_steps(recipe, step, self.total_steps)
        mine = list(range(len(chosen)))[self.workers.rank :: self.workers.size]
        size = recipe.micro_rows or len(mine)
        forwards = []
        for first in range(0, len(mine), size):
            numbers = mine[first : first + size]
            batch = rows.batch([chosen[number] for number in numbers])
            read = None
            if self.features.reads_disk:
                read = place_features(batch, self.features, torch.device("cpu"))
            forwards.append(_Forward(batch, numbers, read))
        scales = row_scales(segments, steps, recipe.rollout_decay)
        return _StepWork(forwards, scales.to(self.device), steps, int((segments > 0).sum()))

    def _step(self, step: int, work: _StepWork) -> float:
        """One optimizer step; returns the loss over all workers' rows."""
        loss = torch.zeros((), device=self.device)
        for forward in work.forwards:
            part = self._loss(step, forward, work)
            part.backward()
            loss += part.detach()
        for parameter in self.parameters:
            if parameter.grad is None:  # nothing reads it under these settings
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.workers.sum_([*gradients, loss])
        value, norm = torch.stack([loss, torch.nn.utils.get_total_norm(gradients)]).tolist()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise self._stopped(step, value, norm)
        torch.nn.utils.clip_grad_value_(self.parameters, self.recipe.clip_value)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        return value

    def _loss(self, step: int, forward: _Forward, work: _StepWork) -> Tensor:
        """This forward's share of the step's loss."""
        recipe = self.recipe
        batch = forward.batch.to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            with torch.no_grad():
                if forward.features is None:
                    features = place_features(forward.batch, self.features, self.device)
                else:
                    features = forward.features.to(self.device)
                features = features.float()
                embeds = self.target.embed(batch.tokens).float() * self.embed_scale
                seen = features + self._noise(step, forward.numbers, features)
            outputs = self.functions.draft(
                self.head,
                embeds,
                seen,
                batch.segments,
                batch.positions,
                work.rollout_steps,
                recipe.loss,
            )
            return objective(
                outputs, features, batch.segments, work.scales, self.target.logits, recipe.loss, self.functions
            )

    def _noise(self, step: int, numbers: Sequence[int], like: Tensor) -> Tensor:
        """``[B, L, C]`` uniform around 0; a row's depends on its place among all rows of the step."""
        noise = torch.zeros_like(like)
        if self.recipe.feature_noise:
            for row, number in zip(noise, numbers, strict=True):
                words = np.random.SeedSequence((self.recipe.seed, step, number)).generate_state(1, np.uint64)
                generator = torch.Generator(device=row.device).manual_seed(int(words[0] >> np.uint64(1)))
                torch.rand(row.shape, generator=generator, out=row)
            noise.sub_(0.5).mul_(self.recipe.feature_noise)
        return noise

    @torch.no_grad()
    def _input_balance(self) -> float:
        """How much larger features are than embeddings, as root mean squares over the first row of the run."""
        rows, chosen = self.plan.step(0)
        batch = rows.batch(chosen[:1]).to(self.device)
        features = place_features(rows.batch(chosen[:1]), self.features, self.device).float()
        inside = batch.segments > 0
        sizes = [x[inside].square().mean().sqrt() for x in (features, self.target.embed(batch.tokens).float())]
        return float(sizes[0] / sizes[1])

    @torch.no_grad()
    def _folded(self) -> DraftHead:
        """The head as it reads embeddings when it is served: their scale goes into the matrix that reads them."""
        head = copy.deepcopy(self.head).eval().requires_grad_(False)
        head.fc.weight[:, : self.target.hidden_size] *= self.embed_scale
        return head

    def _evaluate(self, head: DraftHead, done: int) -> Quality:
        source = StreamedFeatures(self.target, self.held_out, self.settings.features.batch_tokens)
        quality = evaluate_head(self.target, head, self.held_out, source, self.settings.evaluation)
        if self.record is not None:
            self.record.quality(done, quality)
        return quality

    def _save(self, done: int) -> None:
        if self.workers.is_first:
            self.checkpoint.save(
                {
                    "head": self.head.state_dict(),
                    "optimizers": [mine.state_dict() for mine in self.stateful],
                    "step": done,
                    "tokens": self.tokens,
                }
            )
        self.saved_step = done

    def _stopped(self, step: int, loss: float, norm: float) -> TrainingStopped:
        kept = (
            f"{self.checkpoint.path} keeps step {self.saved_step}" if self.saved_step else "there is no checkpoint yet"
        )
        return TrainingStopped(
            f"training stopped at step {step + 1}: the loss is {loss:g} and the gradient's norm {norm:g}; {kept}; "
            "lower optimizer.lr or set optimizer.precision to float32, with another output or without the checkpoint"
        )


@dataclass(frozen=True)
class _Forward:
    """Rows of one forward.

    Attributes:
        batch: the rows.
        numbers: of each row among all rows of the step.
        features: ``[B, L, C]`` read from disk; None where they are computed.
    """

    batch: Batch
    numbers: list[int]
    features: Tensor | None


@dataclass(frozen=True)
class _StepWork:
    """A worker's part of a step.

    Attributes:
        forwards: its rows.
        scales: ``[S, 2] float32``, see `row_scales`.
        rollout_steps: S.
        tokens: of all workers' rows, padding aside.
    """

    forwards: list[_Forward]
    scales: Tensor
    rollout_steps: int
    tokens: int


@contextmanager
def _read_ahead(make: Any, steps: Sequence[int], features: FeatureSource) -> Iterator[Iterator[_StepWork]]:
    """Makes each step's work, while the step before is computed if that means to wait for a disk."""
    if not features.reads_disk:
        yield map(make, steps)
        return
    with ThreadPoolExecutor(max_workers=1) as thread:

        def ahead() -> Iterator[_StepWork]:
            coming = thread.submit(make, steps[0]) if steps else None
            for step in steps[1:]:
                assert coming is not None
                ready, coming = coming.result(), None
                coming = thread.submit(make, step)
                yield ready
            if coming is not None:
                yield coming.result()

        yield ahead()


def _total_steps(plan: Plan, recipe: OptimizerSettings) -> int:
    total = math.floor(recipe.epochs * plan.num_rows / recipe.rows)
    if not total:
        raise JakiroConfigError(
            f"{len(plan.shard)} answers fill {plan.num_rows} rows of optimizer.row_length {plan.length}, and "
            f"{recipe.epochs:g} epochs of them no step of optimizer.rows {recipe.rows}; give more prompts or lower "
            "optimizer.rows"
        )
    return total


def _optimizers(head: DraftHead, recipe: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """AdamW; with ``muon_lr``, Muon for the matrices and AdamW for the gate and the norm."""
    matrices = {
        name: parameter
        for name, parameter in head.named_parameters()
        if recipe.muon_lr is not None and parameter.ndim == 2 and not name.endswith("gate.weight")
    }
    rest = [parameter for name, parameter in head.named_parameters() if name not in matrices]
    fused = rest[0].device.type in ("cuda", "cpu")
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=fused)
    ]
    if recipe.muon_lr is not None:
        found.append(
            torch.optim.Muon(
                list(matrices.values()),
                lr=recipe.muon_lr,
                weight_decay=recipe.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return found


def _schedule(optimizer: torch.optim.Optimizer, recipe: OptimizerSettings, total: int) -> LRScheduler:
    """The learning rate by step; a warm-up longer than half of a short run is cut to that."""
    warmup = min(recipe.warmup_steps, total // 2)
    return get_scheduler(_SCHEDULES[recipe.schedule], optimizer, warmup, total)


def _rollout_steps(recipe: OptimizerSettings, step: int, total: int) -> int:
    end = 0.0
    for phase in recipe.rollout:
        end += phase.share
        if step < round(end * total):
            return phase.steps
    return recipe.rollout[-1].steps


def _fingerprint(target: Target, spec: HeadSpec, documents: Shard, recipe: OptimizerSettings) -> str:
    """What must not change within a run, as JSON by name."""
    sizes = {name: value for name, value in vars(spec).items() if name != "rope"}
    rope = json.dumps(spec.rope.to_diff_dict(), sort_keys=True, default=str)
    found = {
        "target": f"{target.fingerprint} (hash)",
        "head": json.dumps(sizes, sort_keys=True, default=str),
        "rotary embedding": hashlib.sha256(rope.encode()).hexdigest()[:16],
        "documents": f"{fingerprint_documents(documents)} (hash)",
    }
    for name, value in recipe.model_dump(mode="json", exclude=_OPERATIONAL).items():
        found[f"optimizer.{name}"] = json.dumps(value, sort_keys=True)
    return json.dumps(found)
