"""The loss of a head against naive loops in float64, and that it does not depend on how rows are divided."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_training import random_shard, tiny_config, tiny_target

from jakiro_vllm.draft.head import DraftHead, HeadOutput, Variant
from jakiro_vllm.training import objective as objective_module
from jakiro_vllm.training.features import StreamedFeatures, place_features
from jakiro_vllm.training.frozen import head_spec
from jakiro_vllm.training.objective import StepOutput, draft_outputs, objective, row_scales, valid_rows
from jakiro_vllm.training.packing import pack_rows
from jakiro_vllm.training.rollout import rollout
from jakiro_vllm.training.settings import HeadSettings, LossSettings

#: Two orders of the same fp32 sums.
FP32 = {"rtol": 1e-4, "atol": 1e-6}
SEGMENTS = torch.tensor([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
C, V, K = 5, 11, 2
LM_HEAD = torch.randn(V, C, generator=torch.Generator().manual_seed(9))
ALL = LossSettings(feature=0.7, token=0.3, right=0.4, right_order=0.5, experts=0.6)


def logits(features: torch.Tensor) -> torch.Tensor:
    """With a soft cap, so that whoever goes around it is found out."""
    return 2 * torch.tanh(features @ LM_HEAD.T.to(features.dtype) / 2)


def random_outputs(steps: int, right: bool = True) -> tuple[list[StepOutput], torch.Tensor]:
    generator = torch.Generator().manual_seed(2)

    def rows(*shape: int) -> torch.Tensor:
        return (torch.randn(2, 7, *shape, generator=generator) * 1.5).requires_grad_()

    outputs = []
    for _ in range(steps):
        weights = torch.randn(2, 7, K, generator=generator).softmax(-1).requires_grad_()
        contrast = (rows(C), rows()) if right else (None, None)
        outputs.append(StepOutput(rows(C), contrast[0], rows(K, C), weights, contrast[1]))
    return outputs, rows(C).detach()


def naive(outputs: list[StepOutput], features: torch.Tensor, weights: LossSettings, decay: float) -> torch.Tensor:
    """One position after the other, in float64."""

    def divergence(goal: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        p = logits(goal).softmax(-1)
        return -sum(p[v] * mixed[v].log() for v in range(V))

    total, shares = torch.zeros((), dtype=torch.float64), 0.0
    for step, output in enumerate(outputs):
        terms: dict[str, list[torch.Tensor]] = {"left": [], "right": [], "experts": [], "order": []}
        for b in range(2):
            for t in range(7):
                for name, ahead in (("left", 1), ("right", 2)):
                    rows = getattr(output, name)
                    begin, end = t - step, t + ahead
                    if rows is None or begin < 0 or end >= 7 or SEGMENTS[b, begin] == 0:
                        continue
                    if SEGMENTS[b, begin] != SEGMENTS[b, end]:
                        continue
                    own, goal = rows[b, t].double(), features[b, end].double()
                    smooth = sum(0.5 * d**2 if abs(d) < 1 else abs(d) - 0.5 for d in own - goal) / C
                    entropy = divergence(goal, logits(own).softmax(-1))
                    terms[name].append(weights.feature * smooth + weights.token * entropy)
                    if name == "right":
                        terms["order"].append(max(1 - output.order[b, t].double(), torch.zeros(())) ** 2)
                    if name == "left":
                        each = [logits(output.own[b, t, k].double()).softmax(-1) for k in range(K)]
                        mixed = sum(output.weights[b, t, k].double() * each[k] for k in range(K))
                        terms["experts"].append(divergence(goal, mixed))
        mean = {name: sum(found) / len(found) if found else 0.0 for name, found in terms.items()}
        share = decay**step
        total = total + share * (mean["left"] + weights.right * mean["right"])
        total = total + share * (weights.experts * mean["experts"] + weights.right_order * mean["order"])
        shares += share
    return total / shares


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("right", [True, False], ids=["contrast", "mixture only"])
@pytest.mark.parametrize(
    "weights",
    [ALL, LossSettings(), LossSettings(feature=0, token=0, experts=1.0), LossSettings(feature=1.0, token=0.0)],
    ids=["all", "reference", "experts", "features"],
)
def test_objective_equals_plain_loops(
    weights: LossSettings, right: bool, steps: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective_module, "_LOGIT_ELEMENTS", chunk * V)
    outputs, features = random_outputs(steps, right)
    leaves = [x for o in outputs for x in (o.left, o.right, o.own, o.weights, o.order) if x is not None]
    expected = naive(outputs, features, weights, 0.8)
    wanted = torch.autograd.grad(expected, leaves, allow_unused=True)
    scales = row_scales(SEGMENTS, steps, 0.8)
    found = objective(outputs, features, SEGMENTS, scales, logits, weights)
    gradients = torch.autograd.grad(2 * found, leaves, allow_unused=True)
    torch.testing.assert_close(found.double(), expected.detach(), **FP32)
    for leaf, want, got in zip(leaves, wanted, gradients, strict=True):
        want, got = (torch.zeros_like(leaf) if gradient is None else gradient for gradient in (want, got))
        torch.testing.assert_close(got, 2 * want, **FP32)


@pytest.mark.parametrize("num_experts", [2, 4])
def test_the_order_of_the_contrastive_gates(num_experts: int) -> None:
    """It is the difference of their logits, whichever expert is the more probable one."""
    head, output, step = one_forward(num_experts, LossSettings())
    found = step.order
    normed = head.norm(output.residual).detach()
    logit = (normed @ head.experts.gate.weight.T)[..., num_experts:]
    torch.testing.assert_close(found, (logit[..., 0] - logit[..., 1]).detach(), **FP32)
    assert 0 < int((found > 0).sum()) < found.numel()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_contrast_pulls_at_the_trunk_with_a_share_of_its_gradient(share: float) -> None:
    head, _, full = one_forward(2, LossSettings(feature=0, token=0))
    _, _, part = one_forward(2, LossSettings(feature=0, token=0, right_trunk=share), head)
    full.right.square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
    head.zero_grad(set_to_none=True)
    torch.testing.assert_close(part.right, full.right)
    part.right.square().sum().backward()
    for name, parameter in head.named_parameters():
        scale = 1.0 if name in ("experts.down.weight", "experts.gate.weight", "norm.weight") else share
        if name == "norm.weight" and share < 1:
            continue  # it is read by the gate, which keeps all, and by the experts' first matrices, which do not
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, scale * wanted[name], rtol=1e-3, atol=1e-5)


def one_forward(
    num_experts: int, weights: LossSettings, head: DraftHead | None = None
) -> tuple[DraftHead, HeadOutput, StepOutput]:
    """A head, its output for two rows of packed documents, and what the loss takes of it."""
    if head is None:
        torch.manual_seed(3)
        head = DraftHead(head_spec(tiny_config("llama"), HeadSettings(num_experts=num_experts)))
        head.prepare_positions(16)
    generator = torch.Generator().manual_seed(4)
    width = head.spec.hidden_size
    embeds, features = torch.randn(2, *SEGMENTS.shape, width, generator=generator)
    positions = torch.arange(7).expand_as(SEGMENTS)
    (output,) = rollout(head, embeds, features, SEGMENTS, positions, 1)
    (found,) = draft_outputs(head, embeds, features, SEGMENTS, positions, 1, weights)
    return head, output, found


def test_the_experts_term_is_not_that_of_the_gated_sum() -> None:
    """Negative control: mixing distributions is not mixing features."""
    outputs, features = random_outputs(1)
    (output,) = outputs
    gated = (output.own * output.weights.unsqueeze(-1)).sum(2)
    summed = StepOutput(gated, None, None, None)
    scales = row_scales(SEGMENTS, 1, 1.0)
    experts = objective(outputs, features, SEGMENTS, scales, logits, LossSettings(feature=0, token=0, experts=1.0))
    mixture = objective([summed], features, SEGMENTS, scales, logits, LossSettings(feature=0, token=1.0))
    assert abs(experts.item() - mixture.item()) > 0.05


def test_an_expert_without_weight_leaves_gradients_finite() -> None:
    outputs, features = random_outputs(1)
    weights = torch.tensor([1.0, 0.0]).expand(2, 7, K).clone().requires_grad_()
    output = StepOutput(outputs[0].left, None, outputs[0].own, weights)
    loss = objective([output], features, SEGMENTS, row_scales(SEGMENTS, 1, 1.0), logits, ALL)
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.isfinite(weights.grad).all()
    assert torch.isfinite(output.own.grad).all()


def test_no_matrix_of_logits_exceeds_its_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def watched(features: torch.Tensor) -> torch.Tensor:
        sizes.append(len(features))
        return logits(features)

    monkeypatch.setattr(objective_module, "_LOGIT_ELEMENTS", 4 * V + 1)
    outputs, features = random_outputs(2)
    objective(outputs, features, SEGMENTS, row_scales(SEGMENTS, 2, 1.0), watched, ALL).backward()
    assert max(sizes) == 4
    # Per chunk the target once, and left, right and two experts in two steps; and one row to learn V.
    assert len(sizes) == 4 * (1 + 2 * 4) + 1


@pytest.mark.parametrize("behind", [0, 1, 2])
@pytest.mark.parametrize("ahead", [1, 2])
def test_valid_rows_stay_in_their_document(ahead: int, behind: int) -> None:
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
    valid = valid_rows(segments, ahead, behind)
    for b in range(2):
        for i in range(9):
            inside = i - behind >= 0 and i + ahead < 9
            expected = inside and segments[b, i - behind] == segments[b, i + ahead] and segments[b, i] > 0
            assert bool(valid[b, i]) is bool(expected)


def test_scales_of_a_step_without_rows_are_zero() -> None:
    scales = row_scales(torch.tensor([[1, 1, 2, 2, 0]]), 3, 0.5)
    torch.testing.assert_close(scales, torch.tensor([[1 / 1.75 / 2, 0.0], [0.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("variant", list(Variant), ids=lambda v: v.value)
def test_loss_does_not_depend_on_how_rows_are_divided(variant: Variant) -> None:
    target, shard = tiny_target(), random_shard(8)
    torch.manual_seed(1)
    head = DraftHead(head_spec(tiny_config("llama"), HeadSettings(variant=variant)))
    head.prepare_positions(64)
    rows = pack_rows(shard, 48)
    scales = row_scales(rows.segments(range(len(rows))), 2, 0.9)
    source = StreamedFeatures(target, shard)

    def loss(chosen: list[int]) -> torch.Tensor:
        batch = rows.batch(chosen)
        features = place_features(batch, source, torch.device("cpu"))
        outputs = draft_outputs(head, target.embed(batch.tokens), features, batch.segments, batch.positions, 2, ALL)
        return objective(outputs, features, batch.segments, scales, target.logits, ALL)

    together = loss(list(range(len(rows))))
    apart = sum(loss([row]) for row in reversed(range(len(rows))))
    torch.testing.assert_close(together, apart, **FP32)
    for a, b in zip(
        torch.autograd.grad(together, list(head.parameters())),
        torch.autograd.grad(apart, list(head.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
