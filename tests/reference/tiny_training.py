"""Tiny random targets, documents and runs for the tests of training, and what their processes run."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)
from transformers.models.auto import AutoModelForCausalLM

from jakiro_vllm.training import run_files
from jakiro_vllm.training.documents import Shard, pack_documents
from jakiro_vllm.training.features import StreamedFeatures, cache_features
from jakiro_vllm.training.frozen import Target, head_spec
from jakiro_vllm.training.settings import TrainSettings
from jakiro_vllm.training.trainer import TrainingResult, train_head

VOCAB = 48
HIDDEN = 32
#: Longer than a few windows.
WINDOW = 4

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # a target with opinions: a flat one leaves nothing to learn
}


def tiny_config(kind: str) -> PretrainedConfig:
    """The configuration of a tiny model of some architecture."""
    if kind == "llama":
        return LlamaConfig(**_SIZES, head_dim=8, tie_word_embeddings=True)
    if kind == "qwen2":
        return Qwen2Config(**_SIZES)
    if kind == "mistral":
        return MistralConfig(**_SIZES, head_dim=8, sliding_window=WINDOW, tie_word_embeddings=False)
    if kind == "gemma2":
        return Gemma2Config(
            **_SIZES,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            final_logit_softcapping=1.5,
            tie_word_embeddings=True,
        )
    if kind == "cohere":
        return CohereConfig(**_SIZES, logit_scale=0.25)
    if kind == "granite":
        return GraniteConfig(**_SIZES, logits_scaling=4.0, embedding_multiplier=3.0)
    if kind == "gpt2":
        return GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
    raise ValueError(kind)


def tiny_target(kind: str = "llama", seed: int = 0) -> Target:
    """A random model, always the same one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32)
    return Target(model, f"tiny-{kind}")


def random_shard(count: int = 24, seed: int = 0) -> Shard:
    """Random documents of 10 to 33 tokens, 4 of each as prompt."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 30, size=count)
    return pack_documents(
        [rng.integers(1, VOCAB, size=4) for _ in lengths], [rng.integers(1, VOCAB, size=n).tolist() for n in lengths]
    )


@torch.no_grad()
def greedy_shard(target: Target, count: int, new_tokens: int, seed: int = 0, prompt_tokens: int = 4) -> Shard:
    """The target's own greedy answers to random prompts."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, VOCAB, size=prompt_tokens) for _ in range(count)]
    texts = torch.from_numpy(np.stack(prompts))
    for _ in range(new_tokens):
        texts = torch.cat([texts, target.model(texts).logits[:, -1:].argmax(-1)], dim=1)
    return pack_documents(prompts, texts[:, prompt_tokens:].tolist())


def tiny_settings(head: dict[str, Any] | None = None, **optimizer: Any) -> TrainSettings:
    """Settings of a run of a few steps."""
    recipe: dict[str, Any] = {
        "epochs": 4,
        "rows": 3,
        "row_length": 48,
        "lr": 5e-3,
        "warmup_steps": 2,
        "feature_noise": 0.1,
        "compile": False,
        "precision": "float32",
        "checkpoint_steps": 3,
    }
    return TrainSettings.model_validate(
        {
            "target": "tiny",
            "output": "unused",
            "data": {"sources": ["unused"]},
            "head": head or {},
            "optimizer": recipe | optimizer,
            "evaluation": {"depth": 3, "width": 4},
        }
    )


def tiny_run(
    work: Path, settings: TrainSettings, target: Target | None = None, documents: Shard | None = None
) -> TrainingResult:
    """Trains on random documents."""
    target = target or tiny_target()
    documents = documents if documents is not None else random_shard()
    spec = head_spec(target.config, settings.head)
    held_out = greedy_shard(target, 3, 8, seed=7)
    return train_head(target, spec, documents, StreamedFeatures(target, documents), held_out, work, settings)


def tiny_parts() -> list[Shard]:
    """Three parts of answers."""
    return [random_shard(5, seed) for seed in (1, 2, 3)]


def run_and_die(folder: str, settings: TrainSettings, step: int) -> None:
    """Trains and is killed, as a power cut would, when a step is noted."""
    torch.set_num_threads(1)
    note = run_files.Record.step

    def die(self: run_files.Record, at: int, values: dict[str, float], rate: float) -> None:
        note(self, at, values, rate)
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)

    run_files.Record.step = die  # type: ignore[method-assign]
    tiny_run(Path(folder), settings)


def run_as_worker(rank: int, size: int, folder: str, settings: Sequence[TrainSettings]) -> None:
    """One of several workers: fills a cache, then trains; each keeps its head of each run in a file of its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    target, computing = tiny_target(), Target.features
    computed: list[int] = []

    def count(self: Target, documents: Sequence[np.ndarray], batch_tokens: int = 8192) -> list[torch.Tensor]:
        computed.extend(len(document) for document in documents)
        return computing(self, documents, batch_tokens)

    Target.features = count  # type: ignore[method-assign]
    cache_features(target, tiny_parts(), Path(folder) / "features")
    (Path(folder) / f"computed{rank}").write_text(str(sum(computed)))
    Target.features = computing  # type: ignore[method-assign]
    for number, own in enumerate(settings):
        result = tiny_run(Path(folder) / f"run{number}", own)
        torch.save(result.head.state_dict(), Path(folder) / f"run{number}" / f"head{rank}.pt")
    torch.distributed.destroy_process_group()
