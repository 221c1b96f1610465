"""The loss of a draft head.

Source: the training recipe of "Jakiro: Boosting Speculative Decoding with Decoupled Multi-Head via MoE",
arXiv 2502.06282, in the form of its authors' code.

Shapes: B sequences, L positions, C hidden size, V vocabulary.

Alignment. ``f_t`` is the target's last hidden state at position t, and ``p_t = softmax(LM_head(f_t))`` its
distribution of token t+1. Row t of the head reads ``fc([emb(token_{t+1}) ; f_t])``, so it knows the tokens up
to t+1 and stands in for a target that has read one token more than ``f_t``:

* ``left_t`` approximates ``f_{t+1}``; its logits predict token t+2, the one after the head's newest input.
* ``right_t`` approximates ``f_{t+2}``; its logits predict token t+3 without having seen token t+2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms; the defaults are the reference recipe's.

    Attributes:
        feature: of SmoothL1 between features.
        token: of cross-entropy against the target's distribution.
        right: of the contrastive output, relative to the mixture.
    """

    feature: float = 1.0
    token: float = 0.1
    right: float = 0.5


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


def output_loss(
    output: Tensor,
    features: Tensor,
    target_probs: Tensor,
    lm_head: Tensor,
    ahead: int,
    valid: Tensor,
    weights: LossWeights,
) -> Tensor:
    """Loss of one output of the head, ``feature * SmoothL1 + token * CE``, averaged over the valid rows.

    ``SmoothL1`` is the mean over C of ``d^2 / 2`` if ``|d| < 1`` else ``|d| - 1/2`` with
    ``d = output_t - f_{t+ahead}``; ``CE = -sum_v p_{t+ahead}(v) * log softmax(LM_head(output_t))(v)``.

    Args:
        output: ``[B, L, C]`` left or right.
        features: ``[B, L, C]`` the target's.
        target_probs: ``[B, L, V]`` the target's distributions at those features.
        lm_head: ``[V, C]``.
        ahead: 1 for left, 2 for right.
        valid: ``[B, L] bool``, see `valid_rows`; never true in the last ``ahead`` rows.
        weights: of the terms.

    Returns:
        Scalar, float32. Zero if no row is valid.
    """
    mask = valid[:, :-ahead]
    count = mask.sum().clamp(min=1)
    output = output[:, :-ahead]
    distance = F.smooth_l1_loss(output.float(), features[:, ahead:].float(), reduction="none").mean(-1)
    log_probs = F.linear(output, lm_head).float().log_softmax(-1)
    entropy = -(target_probs[:, ahead:].float() * log_probs).sum(-1)
    return ((weights.feature * distance + weights.token * entropy) * mask).sum() / count


def head_loss(
    left: Tensor,
    right: Tensor | None,
    features: Tensor,
    target_probs: Tensor,
    lm_head: Tensor,
    segments: Tensor,
    weights: LossWeights,
    behind: int = 0,
) -> Tensor:
    """``L(left) + right_weight * L(right)``, each as in `output_loss`.

    All rows of a document count, prompts included: the goal is the target's own distribution, which is as
    right in a prompt as behind it, so prompts are free extra supervision. The text itself never is a goal.

    Args:
        left: ``[B, L, C]`` the mixture's features.
        right: ``[B, L, C]`` the contrastive features, ``None`` for a head without them.
        features: ``[B, L, C]`` the target's.
        target_probs: ``[B, L, V]`` the target's distributions at those features.
        lm_head: ``[V, C]`` the target's, frozen.
        segments: ``[B, L] int64`` document of each position, 0 for padding.
        weights: of the terms.
        behind: earlier rollout steps, see `valid_rows`.

    Returns:
        Scalar, float32.
    """
    valid = valid_rows(segments, 1, behind)
    loss = output_loss(left, features, target_probs, lm_head, 1, valid, weights)
    if right is not None:
        valid = valid_rows(segments, 2, behind)
        loss = loss + weights.right * output_loss(right, features, target_probs, lm_head, 2, valid, weights)
    return loss
