"""What the head takes of its target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.lora.layers import BaseLayerWithLoRA

from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.integration.proposer import _embedding_of, _lm_head_of


class Adapted(BaseLayerWithLoRA):
    """A wrapper that assigns adapters to the rows of a step, and fails for other rows."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *args: Any) -> Any:
        raise AssertionError("called outside of the target's step")


class Logits(nn.Module):
    def forward(self, lm_head: nn.Module, features: Tensor) -> Tensor:
        return features @ lm_head.weight.T


class Target(nn.Module):
    """Laid out as vLLM's Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(7, 4)
        self.lm_head = nn.Embedding(7, 4)
        self.logits_processor = Logits()

    def compute_logits(self, features: Tensor) -> Tensor:
        return self.logits_processor(self.lm_head, features)


def test_layers_are_shared() -> None:
    target = Target()
    assert _embedding_of(target) is target.model.embed_tokens
    assert _lm_head_of(target) == target.compute_logits


@pytest.mark.parametrize("wrapped", [("logits_processor",), ("lm_head", "logits_processor")], ids=len)
def test_adapters_are_left_out(wrapped: tuple[str, ...]) -> None:
    target = Target()
    embedding, features = target.model.embed_tokens, torch.randn(3, 4)
    expected = target.compute_logits(features)
    target.model.embed_tokens = Adapted(embedding)
    for name in wrapped:
        setattr(target, name, Adapted(getattr(target, name)))
    assert _embedding_of(target) is embedding
    lm_head = _lm_head_of(target)
    assert torch.equal(lm_head(features), expected)
    with torch.no_grad():  # new weights, as after an update in place, are the head's too
        (target.lm_head.base_layer if "lm_head" in wrapped else target.lm_head).weight.mul_(2)
    assert torch.equal(lm_head(features), 2 * expected)
    # The target keeps its adapters.
    with pytest.raises(AssertionError, match="outside"):
        target.compute_logits(features)


def test_targets_laid_out_otherwise_are_refused() -> None:
    target = Target()
    target.model.wte = target.model.embed_tokens
    del target.model.embed_tokens
    with pytest.raises(
        JakiroConfigError, match=r"target Target has no token embedding where Llama-like models have it"
    ):
        _embedding_of(target)
    with pytest.raises(JakiroConfigError, match="target Linear computes no logits; serve it without speculation"):
        _lm_head_of(nn.Linear(2, 2))
