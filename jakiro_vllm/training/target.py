"""Trains the embedded pair's target: a Llama-architecture code model of about 5M parameters."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetRecipe:
    """How the embedded target is trained.

    Attributes:
        tokens_per_step: packed tokens of one optimizer step.
        phases: ``(fraction of the steps, sequence length)``; long sequences come last, where they are
            worth their cost.
        epochs: passes over the training tokens.
        muon_lr: learning rate of the hidden matrices, in AdamW's scale.
        adamw_lr: learning rate of embedding and norms.
        warmup_steps: linear warm-up; the rest decays linearly to a twentieth.
        weight_decay: for matrices.
        seed: of initialisation and order.
    """

    tokens_per_step: int = 4096
    phases: tuple[tuple[float, int], ...] = ((0.8, 512), (0.2, 2048))
    epochs: float = 1.0
    muon_lr: float = 4e-3
    adamw_lr: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    seed: int = 0


def target_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The embedded target's architecture; 64 is a head size that every CPU kernel of vLLM has."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def _learning_rate_scale(step: int, total: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 - 0.95 * (step - warmup) / max(1, total - warmup)


def _batches(tokens: np.ndarray, recipe: TargetRecipe, total_steps: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields ``[B, L + 1] int64`` windows; each epoch starts at another offset."""
    rng = np.random.default_rng(recipe.seed)
    step = 0
    for fraction, length in recipe.phases:
        batch = recipe.tokens_per_step // length
        phase_steps = round(fraction * total_steps)
        order: list[int] = []
        for _ in range(phase_steps):
            if len(order) < batch:
                offset = int(rng.integers(length))
                count = (len(tokens) - 1 - offset) // length
                order = (rng.permutation(count) * length + offset).tolist()
            starts, order = order[:batch], order[batch:]
            windows = np.stack([tokens[s : s + length + 1] for s in starts])
            yield step, torch.from_numpy(windows.astype(np.int64))
            step += 1


@torch.compile(dynamic=False)
def next_token_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of ``windows [B, L + 1] int64``, computed in bf16 autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, tokens: np.ndarray, length: int = 1024) -> float:
    """Mean cross-entropy in nats per token over non-overlapping windows of at most 200k tokens."""
    count = min((len(tokens) - 1) // length, 200_000 // length)
    total = 0.0
    for i in range(count):
        window = torch.from_numpy(tokens[i * length : (i + 1) * length + 1].astype(np.int64))[None]
        total += next_token_loss(model, window).item()
    return total / count


def train_target(
    tokenizer: PreTrainedTokenizerFast,
    train_tokens: np.ndarray,
    held_out_tokens: np.ndarray,
    output: Path,
    recipe: TargetRecipe = TargetRecipe(),
) -> None:
    """Trains and saves the target as bf16 safetensors with its tokenizer.

    Args:
        tokenizer: of the corpus.
        train_tokens: ``[T] uint16``.
        held_out_tokens: ``[T] uint16``, only measured.
        output: folder of the model; a checkpoint beside it (``.ckpt``) lets an interrupted run resume.
        recipe: how to train.
    """
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(target_config(tokenizer))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_lr = [group["lr"] for opt in optimizers for group in opt.param_groups]
    total_steps = math.ceil(recipe.epochs * len(train_tokens) / recipe.tokens_per_step)
    checkpoint = output.with_suffix(".ckpt")
    first_step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, opt_state in zip(optimizers, state["optimizers"], strict=True):
            opt.load_state_dict(opt_state)
        first_step = state["step"]
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        "target: %.2fM parameters, %d steps of %d tokens", parameters / 1e6, total_steps, recipe.tokens_per_step
    )

    started, running = time.monotonic(), 0.0
    for step, windows in _batches(train_tokens, recipe, total_steps):
        if step < first_step:
            continue
        scale = _learning_rate_scale(step, total_steps, recipe.warmup_steps)
        groups = [group for opt in optimizers for group in opt.param_groups]
        for group, lr in zip(groups, base_lr, strict=True):
            group["lr"] = lr * scale
        loss = next_token_loss(model, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        running = loss.item() if step == first_step else 0.95 * running + 0.05 * loss.item()
        if step % 20 == 0:
            rate = (step + 1 - first_step) * recipe.tokens_per_step / (time.monotonic() - started)
            left = (total_steps - step) * recipe.tokens_per_step / rate / 60
            logger.info("step %d/%d loss %.3f, %.0f tokens/s, %.0f min left", step, total_steps, running, rate, left)
        if step % 100 == 99:
            partial = checkpoint.with_suffix(".partial")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizers": [opt.state_dict() for opt in optimizers],
                    "step": step + 1,
                },
                partial,
            )
            os.replace(partial, checkpoint)

    held_out_loss = validation_loss(model, held_out_tokens)
    logger.info("held-out loss %.3f nats per token", held_out_loss)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "training.json").write_text(
        json.dumps({"steps": total_steps, "held_out_loss": held_out_loss, "parameters": parameters}, indent=2) + "\n"
    )
    checkpoint.unlink(missing_ok=True)
