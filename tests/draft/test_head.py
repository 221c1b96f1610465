"""The draft head against its formulas, computed token by token in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_heads import published_head, write_head
from reference_head import ReferenceHead, ReferenceOutput
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from jakiro_vllm.draft.checkpoint import load_head
from jakiro_vllm.draft.head import DraftHead, HeadOutput, HeadSpec, Variant
from jakiro_vllm.kernels.experts import route

#: fp32 sums of a few dozen terms in another order.
FP32 = {"rtol": 1e-4, "atol": 1e-5}
#: Rotary tables are fp32 in every dtype, so at position 60 an angle is off by 4e-6.
FP64 = {"rtol": 1e-5, "atol": 1e-5}

CASES = [
    pytest.param("jakiro", {}, id="jakiro"),
    pytest.param("jakiro", {"num_experts": 4}, id="jakiro-4-experts"),
    pytest.param("jakiro", {"bias": False, "kv_heads": 4}, id="jakiro-no-bias-no-gqa"),
    pytest.param("jakiro", {"head_dim": 8, "kv_heads": 1}, id="jakiro-wide-heads"),
    pytest.param("jakiro_star", {}, id="jakiro_star"),
    pytest.param("jakiro_star", {"num_experts": 3, "bias": False}, id="jakiro_star-3-experts"),
    pytest.param("dense", {"rms_norm_eps": 0.1, "rope_theta": 500.0}, id="dense"),
]
LENGTH = 24
FIRST_POSITION = 37


def build(variant: str, options: dict[str, Any], dtype: torch.dtype, folder: Path) -> tuple[DraftHead, ReferenceHead]:
    config, tensors = published_head(variant, **options)
    head = load_head(write_head(folder, config, tensors, "safetensors"), dtype)
    head.prepare_positions(64)
    return head, ReferenceHead(config, tensors)


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``[S, H, D], [S, G, D], [S, G, D] -> [S, H, D]``."""
    return torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), is_causal=True, enable_gqa=True
    ).transpose(0, 1)


def run(
    variant: str, options: dict[str, Any], dtype: torch.dtype, generator: torch.Generator, folder: Path
) -> tuple[HeadOutput, list[ReferenceOutput]]:
    """The head on a sequence, and the reference on every token of it."""
    head, reference = build(variant, options, dtype, folder)
    hidden = head.spec.hidden_size
    embeds, features = (torch.randn(LENGTH, hidden, generator=generator).to(dtype) for _ in range(2))
    positions = torch.arange(FIRST_POSITION, FIRST_POSITION + LENGTH)
    output = head(embeds, features, positions, causal)
    expected, keys, values = [], [], []
    for t in range(LENGTH):
        x = reference.fuse(embeds[t], features[t])
        key, value = reference.key_value(x, FIRST_POSITION + t)
        keys.append(key)
        values.append(value)
        expected.append(reference.output(x, FIRST_POSITION + t, keys, values))
    return output, expected


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [pytest.param(torch.float32, FP32, id="fp32"), pytest.param(torch.float64, FP64, id="fp64")],
)
@pytest.mark.parametrize(("variant", "options"), CASES)
def test_every_output_follows_the_formulas(
    variant: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    tolerance: dict,
    generator: torch.Generator,
    tmp_path: Path,
) -> None:
    output, expected = run(variant, options, dtype, generator, tmp_path)
    torch.testing.assert_close(output.feature().double(), torch.stack([e.mixture for e in expected]), **tolerance)

    own, log_weights = output.expert_features()
    assert log_weights.dtype == torch.float32
    wanted = torch.stack([torch.stack([feature for feature, _ in e.experts]) for e in expected])
    torch.testing.assert_close(own.double(), wanted, **tolerance)
    weights = torch.tensor([[weight for _, weight in e.experts] for e in expected])
    torch.testing.assert_close(log_weights, weights, rtol=1e-4, atol=1e-5)
    assert (log_weights[:, :-1] >= log_weights[:, 1:]).all()

    if output.head.spec.has_contrast:
        contrast = torch.stack([e.contrast for e in expected])
        torch.testing.assert_close(output.contrast().double(), contrast, **tolerance)


def test_cases_cover_every_order_of_the_gates(generator: torch.Generator, tmp_path: Path) -> None:
    """Otherwise an error in the order of the experts could hide."""
    output, _ = run("jakiro", {}, torch.float64, generator, tmp_path)
    routing = output.routing
    assert routing.contrast is not None
    first = routing.experts.argmin(dim=1, keepdim=True)  # where expert 0 stands
    preferred, positive = first[:, 0] == 0, routing.contrast.gather(1, first)[:, 0] > 0
    assert {(bool(a), bool(b)) for a, b in zip(preferred, positive, strict=True)} == {
        (a, b) for a in (False, True) for b in (False, True)
    }
    output, _ = run("jakiro", {"num_experts": 4}, torch.float64, generator, tmp_path)
    assert output.routing.experts.unique().numel() == 4


@pytest.mark.parametrize("order", ["first", "second"])
def test_contrastive_gates_belong_to_the_experts_in_order(
    order: str, generator: torch.Generator, tmp_path: Path
) -> None:
    """With two experts: ``c_max * E_max - c_min * E_min``, whichever expert the routing prefers."""
    output, _ = run("jakiro", {}, torch.float64, generator, tmp_path)
    head, residual, activations = output.head, output.residual[:1], output.activations[:1]
    gates = torch.tensor([0.0, 3.0, 2.0, 0.5] if order == "first" else [3.0, 0.0, -1.0, 1.5]).double()
    normed = head.norm(residual)[0]
    gate = torch.outer(gates, normed) / normed.dot(normed)  # what gives this row these logits
    routing = route(residual, head.norm.weight, head.spec.rms_norm_eps, gate, 2, contrast=True)
    down = head.experts.down.weight.unflatten(1, activations.shape[1:])
    experts = torch.einsum("tei,cei->tec", activations, down)
    c = gates[2:].softmax(dim=0)
    expected = c[0] * experts[:, 0] - c[1] * experts[:, 1]
    expected = residual + (expected if order == "first" else -expected)
    found = HeadOutput(head, residual, activations, routing, contrastive=True)
    torch.testing.assert_close(found.contrast(), expected, **FP64)


def test_finish_of_chosen_rows_equals_the_whole_forward(generator: torch.Generator, tmp_path: Path) -> None:
    """Earlier tokens matter through their keys and values only."""
    head, _ = build("jakiro", {}, torch.float32, tmp_path)
    embeds, features = (torch.randn(LENGTH, 16, generator=generator) for _ in range(2))
    positions = torch.arange(LENGTH)
    whole = head(embeds, features, positions, causal)
    x = head.fuse(embeds, features)
    keys, values = head.keys_values(x, positions)

    def attend(query: Tensor) -> Tensor:
        padded = torch.zeros(LENGTH, *query.shape[1:])
        padded[-1:] = query
        return causal(padded, keys, values)[-1:]

    last = head.finish(x[-1:], positions[-1:], attend, contrastive=True)
    torch.testing.assert_close(last.feature(), whole.feature()[-1:], **FP32)
    torch.testing.assert_close(last.contrast(), whole.contrast()[-1:], **FP32)


@pytest.mark.parametrize(
    "rope",
    [
        pytest.param({"rope_theta": 10000.0}, id="plain"),
        pytest.param({"rope_theta": 500000.0}, id="other-base"),
        pytest.param({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 10000.0}, id="linear-legacy"),
        pytest.param(
            {
                "rope_theta": 500000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            id="llama3",
        ),
        pytest.param(
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
            id="yarn-scales-attention",
        ),
    ],
)
def test_rotary_embedding_is_transformers_own(rope: dict[str, Any], generator: torch.Generator, tmp_path: Path) -> None:
    head, _ = build("jakiro", {"head_dim": 8, **rope}, torch.float32, tmp_path)
    config = LlamaConfig(num_attention_heads=4, head_dim=8, hidden_size=16, max_position_embeddings=2048, **rope)
    positions = torch.randint(0, 64, (10,), generator=generator)
    x = torch.randn(10, 16, generator=generator)
    cos, sin = LlamaRotaryEmbedding(config)(x, positions.unsqueeze(0))

    raw_k, raw_v = head.kv_proj(x).chunk(2, dim=-1)
    raw_q = head.q_proj(x).unflatten(-1, (4, 8))
    # transformers wants [batch, heads, tokens, D].
    expected_q, expected_k = apply_rotary_pos_emb(
        raw_q.transpose(0, 1).unsqueeze(0), raw_k.unflatten(-1, (2, 8)).transpose(0, 1).unsqueeze(0), cos, sin
    )
    keys, values = head.keys_values(x, positions)
    torch.testing.assert_close(keys, expected_k[0].transpose(0, 1), **FP32)
    torch.testing.assert_close(values, raw_v.unflatten(-1, (2, 8)), rtol=0, atol=0)
    seen: list[Tensor] = []
    head.finish(x, positions, lambda q: seen.append(q) or q)
    torch.testing.assert_close(seen[0], expected_q[0].transpose(0, 1), **FP32)


def test_rotary_embedding_cares_about_the_position(generator: torch.Generator, tmp_path: Path) -> None:
    head, _ = build("jakiro", {}, torch.float32, tmp_path)
    x = torch.randn(1, 16, generator=generator)
    keys = [head.keys_values(x, torch.tensor([p]))[0] for p in (0, 1, 63)]
    assert not torch.allclose(keys[0], keys[1])
    assert not torch.allclose(keys[1], keys[2])


def test_bfloat16_head_stays_near_fp32(tmp_path: Path) -> None:
    outputs = {
        dtype: run("jakiro", {}, dtype, torch.Generator().manual_seed(3), tmp_path)[0].feature().double()
        for dtype in (torch.float32, torch.bfloat16)
    }
    error = (outputs[torch.bfloat16] - outputs[torch.float32]).norm() / outputs[torch.float32].norm()
    # Eight significant bits per rounding, about ten roundings in a row.
    assert 0 < error < 10 * 2**-8


@pytest.mark.parametrize(
    ("variant", "experts", "gates", "contrast"),
    [("jakiro", 2, 4, True), ("jakiro", 5, 7, True), ("jakiro_star", 2, 2, False), ("dense", 1, 0, False)],
)
def test_gates(variant: str, experts: int, gates: int, contrast: bool, tiny_spec: Callable[..., HeadSpec]) -> None:
    spec = tiny_spec(variant, num_experts=experts)
    assert spec.num_gates == gates
    assert spec.has_contrast is contrast


def test_equal_gates_do_not_lose_weight(tiny_spec: Callable[..., HeadSpec]) -> None:
    """Exact ties are routed to two experts with half the weight each, and nothing is counted twice."""
    torch.manual_seed(0)
    head = DraftHead(tiny_spec(Variant.JAKIRO, num_experts=4))
    assert head.experts.gate is not None
    torch.nn.init.zeros_(head.experts.gate.weight)
    head.prepare_positions(4)
    output = head.finish(torch.randn(3, 16), torch.arange(3), lambda q: q)
    own, log_weights = output.expert_features()
    torch.testing.assert_close(log_weights, torch.full((3, 2), math.log(0.5)))
    torch.testing.assert_close(output.feature(), own.mean(dim=1), **FP32)
