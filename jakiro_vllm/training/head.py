"""Trains a draft head on text that its target wrote; the target stays frozen.

Shapes: B rows, L positions, C hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from jakiro_vllm.draft.checkpoint import save_head
from jakiro_vllm.draft.head import DraftHead, HeadSpec, Variant
from jakiro_vllm.training.evaluate import evaluate_head
from jakiro_vllm.training.generate import Shard
from jakiro_vllm.training.losses import LossWeights, head_loss
from jakiro_vllm.training.rollout import pack_rows, rollout, target_features

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadRecipe:
    """How a head is trained; the defaults are the reference recipe's.

    Attributes:
        epochs: passes over the documents.
        rows_per_step: B.
        row_length: L; documents are packed into rows and never split.
        lr: peak learning rate of AdamW.
        betas: of AdamW.
        weight_decay: of AdamW.
        warmup_steps: linear warm-up; a cosine to zero follows.
        clip_value: gradients are clipped to this magnitude, element by element.
        feature_noise: width of the uniform noise, centred on zero, that is added to the target's features so
            that the head learns to live with its own inexact ones.
        rollout: ``(fraction of the steps, drafting steps)`` in order: how many drafting steps are trained on
            from every position. 1 is the reference; with more, the head also learns from its own features,
            which is what it reads inside a tree. They cost as much each, so they come last.
        rollout_decay: weight of a step relative to the one before.
        loss: weights of the loss terms.
        checkpoint_steps: steps between checkpoints.
        compile: whether the loss goes through ``torch.compile``.
        seed: of initialisation, order and noise.
    """

    epochs: float = 20.0
    rows_per_step: int = 4
    row_length: int = 2048
    lr: float = 9e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-3
    warmup_steps: int = 2000
    clip_value: float = 0.5
    feature_noise: float = 0.2
    rollout: tuple[tuple[float, int], ...] = ((1.0, 1),)
    rollout_decay: float = 1.0
    loss: LossWeights = LossWeights()
    checkpoint_steps: int = 100
    compile: bool = True
    seed: int = 0


def head_spec(
    target: LlamaConfig, variant: Variant = Variant.JAKIRO, num_experts: int = 2, intermediate_size: int | None = None
) -> HeadSpec:
    """A head whose attention has its target's shape, so that both can share one paged KV cache.

    Args:
        target: the target's configuration.
        variant: which MLP.
        num_experts: E, ignored for ``DENSE``.
        intermediate_size: I of an expert; default C, as published heads have it.
    """
    return HeadSpec(
        variant=variant,
        hidden_size=target.hidden_size,
        num_heads=target.num_attention_heads,
        num_kv_heads=target.num_key_value_heads,
        head_dim=target.head_dim,
        intermediate_size=intermediate_size or target.hidden_size,
        num_experts=1 if variant is Variant.DENSE else num_experts,
        fc_bias=False,
        rms_norm_eps=target.rms_norm_eps,
        rope=LlamaConfig(
            hidden_size=target.hidden_size,
            num_attention_heads=target.num_attention_heads,
            head_dim=target.head_dim,
            max_position_embeddings=target.max_position_embeddings,
            rope_parameters=target.rope_parameters,
        ),
    )


def train_head(
    target: LlamaForCausalLM,
    spec: HeadSpec,
    documents: Shard,
    held_out: Shard,
    output: Path,
    recipe: HeadRecipe = HeadRecipe(),
    stop_after: int | None = None,
) -> DraftHead:
    """Trains a head and saves it in the published layout, in bf16.

    A checkpoint beside ``output`` (``.ckpt``) lets an interrupted run resume; the result is that of an
    uninterrupted one, since order and noise depend on the step alone.

    Args:
        target: frozen here; float32 parameters.
        spec: of the head.
        documents: what the target wrote.
        held_out: what it wrote behind prompts that ``documents`` has not; only measured.
        output: folder of the head.
        recipe: how to train.
        stop_after: leave after this many steps of the whole run, with a checkpoint and without ``output``;
            for runs in several sittings.

    Returns:
        The head in evaluation mode.

    Raises:
        ValueError: if the checkpoint belongs to another recipe, or the documents fill no batch.
    """
    target.requires_grad_(False).eval()
    torch.manual_seed(recipe.seed)
    head = DraftHead(spec)
    head.prepare_positions(max(recipe.row_length, *(len(held_out.document(i)) for i in range(len(held_out)))))
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    rows_per_epoch = len(pack_rows(documents, recipe.row_length))
    total_steps = math.floor(recipe.epochs * rows_per_epoch / recipe.rows_per_step)
    if not total_steps:
        raise ValueError(
            f"{len(documents)} documents fill {rows_per_epoch} rows, fewer than one batch of {recipe.rows_per_step}; "
            "generate more or lower rows_per_step"
        )
    checkpoint = output.with_suffix(".ckpt")
    first_step = _resume(checkpoint, head, optimizer, recipe)
    parameters = sum(p.numel() for p in head.parameters())
    logger.info(
        "draft head: %.2fM parameters, %d steps of %d tokens",
        parameters / 1e6,
        total_steps,
        recipe.rows_per_step * recipe.row_length,
    )
    loss_of: Callable[..., Tensor] = torch.compile(rollout_loss, dynamic=False) if recipe.compile else rollout_loss
    started, running = time.monotonic(), 0.0
    for step, (tokens, segments, positions) in enumerate(_batches(documents, recipe, total_steps)):
        if step < first_step:
            continue
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * _learning_rate_scale(step, total_steps, recipe.warmup_steps)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        noise = torch.rand(*tokens.shape, spec.hidden_size, generator=generator).sub_(0.5).mul_(recipe.feature_noise)
        loss = loss_of(
            target, head, tokens, segments, positions, noise, _rollout_steps(recipe, step, total_steps), recipe
        )
        loss.backward()
        torch.nn.utils.clip_grad_value_(head.parameters(), recipe.clip_value)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == first_step else 0.95 * running + 0.05 * loss.item()
        if step % 20 == 0:
            rate = (step + 1 - first_step) * tokens.numel() / (time.monotonic() - started)
            left = (total_steps - step) * tokens.numel() / rate / 60
            logger.info("step %d/%d loss %.4f, %.0f tokens/s, %.0f min left", step, total_steps, running, rate, left)
        stopping = stop_after is not None and step + 1 == stop_after
        if stopping or step % recipe.checkpoint_steps == recipe.checkpoint_steps - 1:
            _save_checkpoint(checkpoint, head, optimizer, recipe, step + 1)
        if stopping:
            return head.eval().requires_grad_(False)

    head.eval().requires_grad_(False)
    quality = evaluate_head(target, head, held_out)
    logger.info("held out: %s", quality)
    save_head(head, output)
    record = {"steps": total_steps, "parameters": parameters, "recipe": asdict(recipe), "held_out": asdict(quality)}
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    checkpoint.unlink(missing_ok=True)
    return head


def rollout_loss(
    target: LlamaForCausalLM,
    head: DraftHead,
    tokens: Tensor,
    segments: Tensor,
    positions: Tensor,
    noise: Tensor,
    rollout_steps: int,
    recipe: HeadRecipe,
) -> Tensor:
    """Loss of one batch over all rollout steps, in bf16 autocast.

    Args:
        target: frozen.
        head: trained.
        tokens: ``[B, L] int64``.
        segments: ``[B, L] int64``, 0 for padding.
        positions: ``[B, L] int64``.
        noise: ``[B, L, C]`` added to the features that the head reads, not to those it is compared with.
        rollout_steps: drafting steps from every position.
        recipe: weights.

    Returns:
        Scalar, the weighted mean of the steps' losses.
    """
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        lm_head = target.lm_head.weight
        with torch.no_grad():
            features = target_features(target, tokens, segments, positions)
            target_probs = F.linear(features, lm_head).float().softmax(-1)
            embeds = target.get_input_embeddings()(tokens)
        total, weight, weights = torch.zeros(()), 1.0, 0.0
        for step, output in enumerate(rollout(head, embeds, features + noise, segments, positions, rollout_steps)):
            right = output.contrast() if head.spec.has_contrast else None
            loss = head_loss(output.feature(), right, features, target_probs, lm_head, segments, recipe.loss, step)
            total, weights = total + weight * loss, weights + weight
            weight *= recipe.rollout_decay
    return total / weights


def _learning_rate_scale(step: int, total: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _rollout_steps(recipe: HeadRecipe, step: int, total: int) -> int:
    end = 0.0
    for fraction, rollout_steps in recipe.rollout:
        end += fraction
        if step < round(end * total):
            return rollout_steps
    return recipe.rollout[-1][1]


def _batches(documents: Shard, recipe: HeadRecipe, total_steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields ``(tokens, segments, positions)``, ``[B, L] int64`` each; every epoch packs another order."""
    rng = np.random.default_rng(recipe.seed)
    step = 0
    while step < total_steps:
        rows = pack_rows(documents, recipe.row_length, rng.permutation(len(documents)))
        # First-fit leaves short rows at the end of the order; mix them among the others.
        order = rng.permutation(len(rows))
        for first in range(0, len(rows) - recipe.rows_per_step + 1, recipe.rows_per_step):
            chosen = torch.from_numpy(order[first : first + recipe.rows_per_step])
            yield rows.tokens[chosen], rows.segments[chosen], rows.positions[chosen]
            step += 1
            if step == total_steps:
                return


def _fingerprint(recipe: HeadRecipe) -> str:
    return json.dumps(asdict(recipe), sort_keys=True)


def _save_checkpoint(
    path: Path, head: DraftHead, optimizer: torch.optim.Optimizer, recipe: HeadRecipe, step: int
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(
        {
            "head": head.state_dict(),
            "optimizer": optimizer.state_dict(),
            "recipe": _fingerprint(recipe),
            "step": step,
        },
        partial,
    )
    os.replace(partial, path)


def _resume(path: Path, head: DraftHead, optimizer: torch.optim.Optimizer, recipe: HeadRecipe) -> int:
    """Loads a checkpoint if there is one; returns the number of steps it has behind it."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["recipe"] != _fingerprint(recipe):
        raise ValueError(f"{path} belongs to another recipe; delete it or choose another folder")
    head.load_state_dict(state["head"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
