"""The loss of a draft head.

Source: the training recipe of "Jakiro: Boosting Speculative Decoding with Decoupled Multi-Head via MoE",
arXiv 2502.06282, in the form of its authors' code; rollout steps and the experts' term are this project's.

Shapes: B rows, L positions, N = B * L, C hidden size, K experts per token, V vocabulary, S rollout steps.

Alignment. ``f_t`` is the target's last hidden state at position t, and ``p_t = softmax(LM_head(f_t))`` its
distribution of token t+1. Row t of the head reads ``fc([emb(token_{t+1}) ; f_t])``, so it knows the tokens up
to t+1 and stands in for a target that has read one token more than ``f_t``:

* ``left_t`` approximates ``f_{t+1}``; its logits predict token t+2, the one after the head's newest input.
* ``right_t`` approximates ``f_{t+2}``; its logits predict token t+3 without having seen token t+2.

Each row's loss, where ``z_o = softmax(LM_head(o))``:

    left    = feature * SmoothL1(left_t, f_{t+1}) - token * sum_v p_{t+1}(v) log z_left(v)
    right   = the same with right_t, f_{t+2} and p_{t+2}, times the weight ``right``
    experts = - experts * sum_v p_{t+1}(v) log sum_e g_e z_{E_e}(v)
    order   = right_order * max(0, 1 - log(c_0 / c_1))^2

``SmoothL1`` is the mean over C of ``d^2 / 2`` if ``|d| < 1`` else ``|d| - 1/2``. ``E_e`` is the feature of expert e
alone and ``g_e`` its gate weight: the mixture of the experts' *distributions* is what the policy ``decoupled``
drafts from, while ``left`` is the mixture of their *features*.

``c`` are the contrastive gate's weights: the output is ``h + c_0 E_0 - c_1 E_1`` where ``c_0`` is the larger, else
``h + c_1 E_1 - c_0 E_0``. A sign that flips from token to token while the gate is undecided teaches the experts
nothing, so the hinge ``order`` decides it early. Of the right loss only the share ``right_trunk`` reaches the weights
below the experts' last matrices: the left loss, which matters at every level but the last, needs them too.

Every term is a sum over rows times a scale that is known before the first forward: the number of valid rows
follows from the segments. So a step's loss does not depend on how its rows are divided among forwards and workers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from jakiro_vllm.draft.head import DraftHead
from jakiro_vllm.kernels.experts import EXPERTS_PER_TOKEN, Routing
from jakiro_vllm.training.rollout import rollout
from jakiro_vllm.training.settings import LossSettings

logger = logging.getLogger(__name__)

#: ``features [n, C] -> logits [n, V] float32``: the target's.
Logits = Callable[[Tensor], Tensor]

#: Elements of one matrix of logits: 256 MiB in float32.
_LOGIT_ELEMENTS = 2**26
#: Below it a gate weight counts as this; its logarithm would have an infinite slope at 0.
_LEAST_WEIGHT = 1e-12


@dataclass(frozen=True)
class StepOutput:
    """What the head gives for N rows in one rollout step.

    Attributes:
        left: ``[B, L, C]`` the mixture's features.
        right: ``[B, L, C]`` the contrastive ones; None for a head without them.
        own: ``[B, L, K, C]`` each selected expert's; None where they are not wanted.
        weights: ``[B, L, K] float32`` of the gate; None with ``own``.
        order: ``[B, L] float32``, ``log(c_0 / c_1)`` of the contrastive gate; None with ``right``.
    """

    left: Tensor
    right: Tensor | None
    own: Tensor | None
    weights: Tensor | None
    order: Tensor | None = None


def draft_outputs(
    head: DraftHead,
    embeds: Tensor,
    features: Tensor,
    segments: Tensor,
    positions: Tensor,
    steps: int,
    weights: LossSettings,
) -> list[StepOutput]:
    """Runs the head from every position, as `rollout` does.

    Args:
        head: trained.
        embeds: ``[B, L, C]`` of the row's own token.
        features: ``[B, L, C]`` what the head reads: the target's, with noise.
        segments: ``[B, L] int64``.
        positions: ``[B, L] int64``.
        steps: S.
        weights: of the loss, which decide what is wanted and how gradients flow.
    """
    found = []
    for output in rollout(head, embeds, features, segments, positions, steps):
        right = order = own = gates = None
        if head.spec.has_contrast and weights.right:
            source = output if weights.right_trunk == 1 else output.attenuated(weights.right_trunk)
            right, order = source.contrast(), _contrastive_order(source.routing, head.spec.num_experts)
            order = order.view(right.shape[:-1])
        if weights.experts:
            own = output.expert_features()[0]
            gates = output.routing.weights.view(own.shape[:-1])
        found.append(StepOutput(output.feature(), right, own, gates, order))
    return found


def _contrastive_order(routing: Routing, num_experts: int) -> Tensor:
    """``[T] float32``: ``log(c_0 / c_1)``."""
    assert routing.contrast is not None
    first, second = routing.contrast.abs().clamp_min(_LEAST_WEIGHT).log().unbind(-1)
    # With two experts the weights stand in the order of the experts' probabilities, c_0 where expert 0 does.
    swapped = (routing.experts[:, 0] == 1) & (num_experts == EXPERTS_PER_TOKEN)
    return torch.where(swapped, second - first, first - second)


def valid_rows(segments: Tensor, ahead: int, behind: int = 0) -> Tensor:
    """Which rows have their goal in the document they started from.

    Args:
        segments: ``[B, L] int64`` document of each position, 0 for padding.
        ahead: distance from a row to the feature it predicts: 1 for the left output, 2 for the right one.
        behind: distance from a row back to the last feature of the target that it follows from: the number
            of earlier rollout steps.

    Returns:
        ``[B, L] bool``.
    """
    length = segments.shape[1]
    valid = torch.zeros_like(segments, dtype=torch.bool)
    if behind + ahead < length:
        # Documents are contiguous: if both ends lie in one document, everything between does too.
        first, last = segments[:, : length - behind - ahead], segments[:, behind + ahead :]
        valid[:, behind : length - ahead] = (first == last) & (first > 0)
    return valid


def row_scales(segments: Tensor, steps: int, decay: float) -> Tensor:
    """What one row's loss counts in the loss of a step.

    A term is the mean over its valid rows, and the loss is the mean over the rollout steps, weighted by powers
    of ``decay``.

    Args:
        segments: ``[R, L] int64`` of all rows of the step, whichever worker has them.
        steps: S.
        decay: weight of a rollout step relative to the one before.

    Returns:
        ``[S, 2] float32`` of left and right rows; 0 where there are none.
    """
    counts = torch.tensor(
        [[int(valid_rows(segments, ahead, step).sum()) for ahead in (1, 2)] for step in range(steps)],
        dtype=torch.float64,
    )
    shares = decay ** torch.arange(steps, dtype=torch.float64)
    scales = (shares / shares.sum()).unsqueeze(1) / counts
    return scales.where(counts > 0, 0.0).float()


def objective(
    outputs: list[StepOutput],
    features: Tensor,
    segments: Tensor,
    scales: Tensor,
    logits: Logits,
    weights: LossSettings,
    functions: Functions | None = None,
) -> Tensor:
    """The share of some rows in the loss of their step.

    All rows of a document count, prompts included: the goal is the target's own distribution, which is as
    right in a prompt as behind it, so prompts are free extra supervision. The text itself never is a goal.

    Args:
        outputs: of every rollout step.
        features: ``[B, L, C]`` the target's, without noise.
        segments: ``[B, L] int64`` document of each position, 0 for padding.
        scales: ``[S, 2] float32``, see `row_scales`.
        logits: the target's.
        weights: of the terms.
        functions: compiled ones; default the plain ones.

    Returns:
        Scalar, float32.
    """
    goals = features.flatten(0, 1)
    total = features.new_zeros((), dtype=torch.float32)
    mixtures: list[_Mixture] = []
    for step, output in enumerate(outputs):
        for ahead, feature, weight in ((1, output.left, 1.0), (2, output.right, weights.right)):
            if feature is None or not weight:
                continue
            row_weights = _at_goal(valid_rows(segments, ahead, step) * (weight * scales[step, ahead - 1]), ahead)
            feature = _at_goal(feature, ahead)
            if weights.feature:
                distance = F.smooth_l1_loss(feature.float(), goals.float(), reduction="none").mean(-1)
                total = total + weights.feature * (distance * row_weights).sum()
            if weights.token:
                mixtures.append(_Mixture(feature.unsqueeze(1), None, weights.token * row_weights))
        if weights.right_order and output.order is not None:
            row_weights = valid_rows(segments, 2, step) * (weights.right_order * scales[step, 1])
            total = total + (F.relu(1 - output.order).square() * row_weights).sum()
        if weights.experts:
            assert output.own is not None and output.weights is not None
            row_weights = _at_goal(valid_rows(segments, 1, step) * (weights.experts * scales[step, 0]), 1)
            log_weights = output.weights.clamp_min(_LEAST_WEIGHT).log()
            mixtures.append(_Mixture(_at_goal(output.own, 1), _at_goal(log_weights, 1), row_weights))
    return total + _cross_entropy(goals, mixtures, logits, functions or PLAIN)


@dataclass(frozen=True)
class _Mixture:
    """Distributions to be compared with the target's at the same index.

    Attributes:
        features: ``[N, K, C]``.
        log_weights: ``[N, K] float32``; None where K is 1.
        row_weights: ``[N] float32`` of each row in the sum.
    """

    features: Tensor
    log_weights: Tensor | None
    row_weights: Tensor


def _at_goal(rows: Tensor, ahead: int) -> Tensor:
    """``[B, L, ...] -> [N, ...]``: each row where its goal is. What wraps around has no weight."""
    return rows.roll(ahead, dims=1).flatten(0, 1)


def _cross_entropy(goals: Tensor, mixtures: list[_Mixture], logits: Logits, functions: Functions) -> Tensor:
    """``- sum_n w_n sum_v p_n(v) log sum_k g_nk softmax(logits(o_nk))(v)``, over all mixtures."""
    if not mixtures:
        return goals.new_zeros((), dtype=torch.float32)
    inputs = [tensor for m in mixtures for tensor in (m.features, m.log_weights, m.row_weights)]
    return _ChunkedCrossEntropy.apply(logits, functions, goals, *inputs)


def _target_probs(goals: Tensor, logits: Logits) -> Tensor:
    """``[n, C] -> [n, V] float32``."""
    return logits(goals).softmax(-1)


def _mixture_loss(
    probs: Tensor, features: Tensor, log_weights: Tensor | None, row_weights: Tensor, logits: Logits
) -> Tensor:
    """``[n, V], [n, K, C], [n, K], [n] -> scalar``: cross-entropies of mixtures, one expert after the other."""
    mixed = None
    for k in range(features.shape[1]):
        own = logits(features[:, k]).log_softmax(-1)
        if log_weights is not None:
            own = own + log_weights[:, k : k + 1]
        mixed = own if mixed is None else torch.logaddexp(mixed, own)
    assert mixed is not None
    return -((probs * mixed).sum(-1) * row_weights).sum()


@dataclass(frozen=True)
class Functions:
    """What may be compiled: `draft_outputs`, and what is done to chunks of rows."""

    draft: Callable[..., list[StepOutput]]
    target_probs: Callable[..., Tensor]
    mixture_loss: Callable[..., Tensor]


PLAIN = Functions(draft_outputs, _target_probs, _mixture_loss)


def compiled_functions() -> Functions:
    """The same through ``torch.compile``; plain where a compiler is missing or fails, with a warning."""
    return Functions(*(_Compiled(f) for f in (draft_outputs, _target_probs, _mixture_loss)))


class _Compiled:
    """A function that runs compiled for as long as that works."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self._plain = plain
        self._function = torch.compile(plain, dynamic=False)

    def __call__(self, *args: Any) -> Any:
        try:
            return self._function(*args)
        except TorchDynamoException as error:
            reason = f"{error}".strip().partition("\n")[0]
            logger.warning("training runs uncompiled, torch.compile failed: %s", reason)
            self._function = self._plain
            return self._plain(*args)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """A few goals at a time, and their gradients at once: no ``[N, V]`` tensor outlives its chunk.

    A row's distributions are needed only for its own sum, so nothing of size V must be kept for the backward
    pass, and the target's distribution is computed once for all outputs that aim at it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Logits, functions: Functions, goals: Tensor, *inputs: Tensor | None) -> Tensor:
        needed = ctx.needs_input_grad[3:]
        gradients = {i: torch.empty_like(x) for i, x in enumerate(inputs) if x is not None and needed[i]}
        total = goals.new_zeros((), dtype=torch.float32)
        most = max(1, _LOGIT_ELEMENTS // logits(goals[:1]).shape[-1])
        size = -(-len(goals) // -(-len(goals) // most))  # all chunks alike, but for the last
        for first in range(0, len(goals), size):
            span = slice(first, first + size)
            probs = functions.target_probs(goals[span], logits)
            for base in range(0, len(inputs), 3):
                own = {base + i: x[span].detach() for i, x in enumerate(inputs[base : base + 3]) if x is not None}
                leaves = {i: x.requires_grad_() for i, x in own.items() if needed[i]}
                with torch.enable_grad():
                    loss = functions.mixture_loss(probs, own[base], own.get(base + 1), own[base + 2], logits)
                total += loss.detach()
                if leaves:
                    for i, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
                        gradients[i][span] = gradient
        ctx.count = len(inputs)
        ctx.wanted = list(gradients)
        ctx.save_for_backward(*gradients.values())
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * ctx.count
        for i, gradient in zip(ctx.wanted, ctx.saved_tensors, strict=True):
            found[i] = gradient * outer[0].to(gradient.dtype)
        return None, None, None, *found
