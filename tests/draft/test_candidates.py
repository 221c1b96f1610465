"""Candidate policies against loops over the distributions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from jakiro_vllm.draft.candidates import Candidates, propose, resolve_policy, top_tokens
from jakiro_vllm.draft.head import DraftHead, HeadOutput, HeadSpec, Variant

VOCAB = 13
NODES = 9
#: fp32 log-softmax against the same in float64.
FP32 = {"rtol": 1e-5, "atol": 1e-5}

HEADS = [
    pytest.param("jakiro", 2, id="jakiro"),
    pytest.param("jakiro", 4, id="jakiro-4-experts"),
    pytest.param("jakiro_star", 2, id="jakiro_star"),
    pytest.param("jakiro_star", 3, id="jakiro_star-3-experts"),
    pytest.param("dense", 1, id="dense"),
]


def make_output(spec: HeadSpec, seed: int = 0) -> tuple[HeadOutput, Tensor]:
    """A head's output for a few nodes, and an LM head ``[V, C]``."""
    torch.manual_seed(seed)
    head = DraftHead(spec).requires_grad_(False)
    for parameter in head.parameters():
        parameter.mul_(3)  # sharper than torch's initialisation, so that the experts disagree
    head.prepare_positions(4)
    output = head.finish(torch.randn(NODES, spec.hidden_size), torch.zeros(NODES, dtype=torch.int64), lambda q: q)
    return output, torch.randn(VOCAB, spec.hidden_size)


def log_probs_of(feature: Tensor, lm_head: Tensor) -> list[float]:
    return (lm_head.double() @ feature.double()).log_softmax(dim=0).tolist()


def best(scores: dict[int, tuple], width: int) -> list[tuple]:
    """``(token, score, ...)`` of the best tokens, the best first."""
    return sorted(((token, *rest) for token, rest in scores.items()), key=lambda entry: -entry[1])[:width]


def check(found: Candidates, node: int, expected: list[tuple]) -> None:
    """``expected``: ``(token, score, feature)``."""
    assert found.tokens[node].tolist() == [entry[0] for entry in expected]
    wanted = torch.tensor([entry[1] for entry in expected])
    torch.testing.assert_close(found.log_probs[node], wanted, **FP32)
    choices = torch.arange(len(expected)).unsqueeze(0)
    continued = found.continue_from(torch.full_like(choices, node), choices)
    torch.testing.assert_close(continued, torch.stack([entry[2] for entry in expected]), rtol=0, atol=0)


@pytest.mark.parametrize("width", [1, 4, VOCAB])
@pytest.mark.parametrize(("variant", "experts"), HEADS)
def test_mixture(variant: str, experts: int, width: int, tiny_spec: Callable[..., HeadSpec]) -> None:
    output, lm_head = make_output(tiny_spec(variant, num_experts=experts))
    found = propose(output, lambda f: f @ lm_head.T, width, "mixture")
    for node, feature in enumerate(output.feature()):
        scores = {token: (score, feature) for token, score in enumerate(log_probs_of(feature, lm_head))}
        check(found, node, best(scores, width))


@pytest.mark.parametrize("width", [1, 4, 8])
@pytest.mark.parametrize(("variant", "experts"), HEADS)
def test_decoupled(variant: str, experts: int, width: int, tiny_spec: Callable[..., HeadSpec]) -> None:
    output, lm_head = make_output(tiny_spec(variant, num_experts=experts))
    found = propose(output, lambda f: f @ lm_head.T, width, "decoupled")
    mixtures = output.feature()
    own, log_weights = output.expert_features()
    for node in range(NODES):
        union: dict[int, tuple] = {}
        for feature, log_weight in zip(own[node], log_weights[node].tolist(), strict=True):
            everything = {token: (score + log_weight,) for token, score in enumerate(log_probs_of(feature, lm_head))}
            for token, score in best(everything, width):
                if token not in union or score > union[token][0]:
                    # Jakiro* goes on from the expert that proposed the token, the others from the mixture.
                    union[token] = (score, feature if variant == "jakiro_star" else mixtures[node])
        check(found, node, best(union, width))


def test_experts_disagree_and_overlap(tiny_spec: Callable[..., HeadSpec]) -> None:
    """Otherwise the test of the decoupled policy would show nothing."""
    output, lm_head = make_output(tiny_spec("jakiro_star"))
    own, _ = output.expert_features()
    tokens, _ = top_tokens(own.flatten(0, 1), lambda f: f @ lm_head.T, 4)
    sets = [tuple(set(t.tolist()) for t in pair) for pair in tokens.unflatten(0, (NODES, 2))]
    assert any(a != b for a, b in sets)
    assert any(a & b for a, b in sets)
    found = propose(output, lambda f: f @ lm_head.T, 4, "decoupled")
    assert set(found.sources.flatten().tolist()) == {0, 1}
    mixture = propose(output, lambda f: f @ lm_head.T, 4, "mixture")
    assert not torch.equal(found.tokens, mixture.tokens)


@pytest.mark.parametrize("variant", ["jakiro", "jakiro_star"])
@pytest.mark.parametrize("policy", ["mixture", "decoupled"])
def test_no_token_twice(policy: str, variant: str, tiny_spec: Callable[..., HeadSpec]) -> None:
    for seed in range(20):
        output, lm_head = make_output(tiny_spec(variant), seed)
        found = propose(output, lambda f, w=lm_head: f @ w.T, 6, policy)
        assert all(len(set(row)) == 6 for row in found.tokens.tolist())
        assert found.log_probs.isfinite().all()


@pytest.mark.parametrize("variant", ["jakiro", "jakiro_star"])
def test_equal_experts_propose_every_token_once(variant: str, tiny_spec: Callable[..., HeadSpec]) -> None:
    """All scores tie exactly: every token keeps one entry, that of the first expert."""
    output, lm_head = make_output(tiny_spec(variant))
    output.routing = replace(output.routing, weights=torch.full_like(output.routing.weights, 0.5))
    output.activations = output.activations[:, :1].expand_as(output.activations)
    half = output.head.experts.down.weight[:, : output.head.spec.intermediate_size]
    output.head.experts.down.weight.copy_(half.repeat(1, 2))
    found = propose(output, lambda f: f @ lm_head.T, 5, "decoupled")
    for node, (feature,) in enumerate(output.expert_features()[0][:, :1]):
        expected = best(
            {t: (s + torch.tensor(0.5).log().item(),) for t, s in enumerate(log_probs_of(feature, lm_head))}, 5
        )
        assert found.tokens[node].tolist() == [token for token, _ in expected]
        torch.testing.assert_close(found.log_probs[node], torch.tensor([s for _, s in expected]), **FP32)
    assert found.sources is None or (found.sources == 0).all()


def test_a_gate_that_rules_an_expert_out(tiny_spec: Callable[..., HeadSpec]) -> None:
    """Its weight underflows to zero: its candidates are worth nothing, and nothing becomes NaN."""
    output, lm_head = make_output(tiny_spec("jakiro_star"))
    experts, weights = torch.tensor([[0, 1]]).expand(NODES, 2), torch.tensor([[1.0, 0.0]]).expand(NODES, 2)
    output.routing = replace(output.routing, experts=experts, weights=weights)
    found = propose(output, lambda f: f @ lm_head.T, 5, "decoupled")
    assert found.log_probs.isfinite().all()
    assert (found.sources == 0).all()


@pytest.mark.parametrize("policy", ["mixture", "decoupled"])
def test_forbidden_tokens_are_no_candidates(policy: str, tiny_spec: Callable[..., HeadSpec]) -> None:
    """An LM head may rule tokens out (padding of the vocabulary); fewer than W candidates remain."""
    output, lm_head = make_output(tiny_spec("jakiro"))

    def masked(features: Tensor) -> Tensor:
        return (features @ lm_head.T).index_fill(1, torch.arange(3, VOCAB), float("-inf"))

    found = propose(output, masked, 5, policy)
    possible = found.log_probs.isfinite()
    assert (possible.sum(dim=1) == 3).all()
    assert not found.log_probs.isnan().any()
    assert (found.tokens[possible] < 3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_probabilities_never_exceed_zero(dtype: torch.dtype, generator: torch.Generator) -> None:
    """A child must not score above its parent, else the re-ranked tree could lose the parent."""
    for scale in (1.0, 30.0, 300.0):
        logits = (torch.randn(4000, 37, generator=generator) * scale).to(dtype)
        logits[::3, 5] += 100 * scale  # nearly certain
        _, log_probs = top_tokens(logits, lambda f: f, 4)
        assert log_probs.dtype == torch.float32
        assert (log_probs <= 0).all()
    assert (log_probs == 0).any()


@pytest.mark.parametrize(
    ("variant", "policy", "expected"),
    [
        ("jakiro", "auto", "mixture"),
        ("jakiro", "mixture", "mixture"),
        ("jakiro", "decoupled", "decoupled"),
        ("jakiro_star", "auto", "decoupled"),
        ("jakiro_star", "mixture", "mixture"),
        ("jakiro_star", "decoupled", "decoupled"),
        ("dense", "auto", "mixture"),
        ("dense", "mixture", "mixture"),
        ("dense", "decoupled", "mixture"),  # one expert: nothing to decouple
    ],
)
def test_policies(variant: str, policy: str, expected: str, tiny_spec: Callable[..., HeadSpec]) -> None:
    assert resolve_policy(policy, tiny_spec(Variant(variant))) == expected
