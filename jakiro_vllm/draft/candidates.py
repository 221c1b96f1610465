"""From the head's output to candidate tokens: the two policies.

Any choice of candidates is lossless under the verification rule, so a policy is only about acceptance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jakiro_vllm.draft.head import HeadOutput, HeadSpec, Mixture, Variant
from jakiro_vllm.kernels import top_tokens as kernels

#: ``lm_head(features [T, C]) -> logits [T, V]``: the target's own.
LmHead = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidates:
    """The most probable next tokens of T nodes.

    Attributes:
        tokens: ``[T, W] int64``.
        log_probs: ``[T, W] float32``; -inf where a node has fewer than W distinct candidates.
        features: ``[T, F, C]`` features that children continue from.
        sources: ``[T, W] int64`` which of the F features each candidate continues from; None where F is 1.
    """

    tokens: Tensor
    log_probs: Tensor
    features: Tensor
    sources: Tensor | None

    def continue_from(self, nodes: Tensor, choices: Tensor) -> Tensor:
        """The features that chosen candidates continue from.

        B sequences, P nodes of each, so that T is B * P; K chosen of each.

        Args:
            nodes: ``[B, K] int64`` in [0, P): whose candidates they are.
            choices: ``[B, K] int64`` which of them.

        Returns:
            ``[B * K, C]``.
        """
        batch = nodes.shape[0]
        if batch > 1:
            first = torch.arange(0, self.tokens.shape[0], self.tokens.shape[0] // batch, device=nodes.device)
            nodes = nodes + first.unsqueeze(1)
        if self.sources is None:
            return self.features.squeeze(1).index_select(0, nodes.flatten())
        return self.features[nodes, self.sources[nodes, choices]].flatten(0, 1)


def resolve_policy(policy: str, spec: HeadSpec) -> str:
    """Turns ``auto`` into what the head was made for; see ``TreeConfig.policy``."""
    if policy != "auto":
        return policy if spec.num_gates else "mixture"
    return "decoupled" if spec.variant is Variant.JAKIRO_STAR else "mixture"


def top_tokens(features: Tensor, lm_head: LmHead, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` most probable tokens after each feature.

    Args:
        features: ``[T, C]``.
        lm_head: the target's.
        width: W.

    Returns:
        ``(tokens [T, W] int64, log_probs [T, W] float32)``, the most probable first.
    """
    return kernels.top_tokens(lm_head(features), width)


def propose(output: HeadOutput | Mixture, lm_head: LmHead, width: int, policy: str) -> Candidates:
    """Picks candidates for the next level.

    Args:
        output: the head's, for T nodes.
        lm_head: the target's.
        width: W, candidates per node.
        policy: ``mixture`` or ``decoupled``.
    """
    if policy == "mixture" or isinstance(output, Mixture):
        feature = output.feature()
        tokens, log_probs = top_tokens(feature, lm_head, width)
        return Candidates(tokens, log_probs, feature.unsqueeze(1), None)
    return _propose_decoupled(output, lm_head, width)


def _propose_decoupled(output: HeadOutput, lm_head: LmHead, width: int) -> Candidates:
    """The union of the experts' own candidates, each scored by its expert times the gate."""
    own, log_weights = output.expert_features()  # [T, K, C], [T, K]
    rows, experts = log_weights.shape
    tokens, log_probs = top_tokens(own.flatten(0, 1), lm_head, width)
    scores = log_probs.unflatten(0, (rows, experts)) + log_weights.unsqueeze(-1)
    tokens, scores = tokens.unflatten(0, (rows, experts)).flatten(1), scores.flatten(1)  # [T, K * W]

    # A token that several experts propose keeps its best score; ties keep the more probable expert.
    same = tokens.unsqueeze(2) == tokens.unsqueeze(1)  # [T, K * W, K * W]
    better = scores.unsqueeze(1) > scores.unsqueeze(2)
    earlier = torch.ones_like(same[0]).tril(-1)
    tied = (scores.unsqueeze(1) == scores.unsqueeze(2)) & earlier
    scores = scores.masked_fill((same & (better | tied)).any(dim=2), float("-inf"))

    scores, index = scores.topk(width, dim=1)
    spec = output.head.spec
    if spec.variant is Variant.JAKIRO_STAR:
        return Candidates(tokens.gather(1, index), scores, own, index // width)
    # Trained on its mixture: only the candidates are decoupled.
    return Candidates(tokens.gather(1, index), scores, output.feature().unsqueeze(1), None)
