"""How well a head drafts what its target writes: an estimate in plain PyTorch, without trees or an engine.

A chain is drafted from every position and compared with the target's own greedy text. Feeding the head the
tokens of that text is exact for a chain: a round only reaches a depth if everything above it was right.

Shapes: B rows, L positions, C hidden size, K experts per token, E experts, W width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jakiro_vllm.draft.head import DraftHead, HeadOutput
from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.training.documents import Shard
from jakiro_vllm.training.features import FeatureSource, place_features
from jakiro_vllm.training.frozen import Target
from jakiro_vllm.training.packing import Batch, Place, pack_rows
from jakiro_vllm.training.rollout import rollout
from jakiro_vllm.training.settings import EvaluationSettings

#: Elements of one matrix of logits: 256 MiB in float32.
_LOGIT_ELEMENTS = 2**26
#: Positions of a forward.
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class ExpertQuality:
    """How the experts divide the work, at depth 1.

    Attributes:
        mean_weight: gate weight of each expert, averaged over positions; they add up to 1.
        first_share: share of the positions at which an expert is the most probable one.
        entropy: of the gate's weights, averaged over positions, in nats; ``log 2`` where the two selected experts
            weigh the same, 0 where one decides alone.
        same_top1: share of the positions at which the two selected experts' own most probable tokens are one.
        overlap_top_k: tokens that are among the ``width`` best of both, relative to those among the best of
            either (Jaccard), averaged over positions. Independent candidates have little of it.
    """

    mean_weight: tuple[float, ...]
    first_share: tuple[float, ...]
    entropy: float
    same_top1: float
    overlap_top_k: float


@dataclass(frozen=True)
class Quality:
    """Agreement of drafts with the target's greedy text, on generated positions only.

    Attributes:
        top1: per depth from 1, the share of positions whose most probable draft is the target's token. The
            last depth is the contrastive output's if the head has one, as in a tree.
        top_k: the same for the ``width`` most probable drafts.
        right_top1, right_top_k: of the contrastive output of a round's first forward (depth 2); None without.
        acceptance_length: tokens per target forward of greedy decoding with this chain, bonus included. The
            true mean over the rounds that decoding would run, not over positions.
        acceptance_length_top_k: the same if a level's draft counts when it is among the ``width`` best, which
            no tree of that width exceeds.
        width: of the ``top_k`` figures.
        positions: that ``top1`` of depth 1 was measured on.
        experts: None for a head without experts.
    """

    top1: tuple[float, ...]
    top_k: tuple[float, ...]
    right_top1: float | None
    right_top_k: float | None
    acceptance_length: float
    acceptance_length_top_k: float
    width: int
    positions: int
    experts: ExpertQuality | None

    def __str__(self) -> str:
        def percent(values: Sequence[float]) -> str:
            return " ".join(f"{100 * value:.1f}" for value in values)

        text = (
            f"acceptance length {self.acceptance_length:.3f} as a chain, at most "
            f"{self.acceptance_length_top_k:.3f} {self.width} wide; by depth top-1 {percent(self.top1)} %, "
            f"top-{self.width} {percent(self.top_k)} %"
        )
        if self.right_top1 is not None and self.right_top_k is not None:
            text += f"; contrastive at depth 2 {percent([self.right_top1, self.right_top_k])} %"
        if self.experts is not None:
            text += (
                f"; experts first at {percent(self.experts.first_share)} %, of one mind at "
                f"{100 * self.experts.same_top1:.1f} %"
            )
        return text


@torch.no_grad()
def evaluate_head(
    target: Target, head: DraftHead, held_out: Shard, features: FeatureSource, settings: EvaluationSettings
) -> Quality:
    """Measures a head on text that its target wrote.

    A head with a contrastive output drafts the last level with it, so a chain takes ``depth - 1`` forwards;
    another head takes ``depth``.

    Args:
        target: the frozen model, on the head's device.
        head: its draft head, with positions prepared for the longest document.
        held_out: greedy answers.
        features: of ``held_out``.
        settings: how many documents, and how deep and wide.

    Raises:
        JakiroConfigError: if no document has two generated tokens to judge by.
    """
    width = min(settings.width, target.vocab_size)
    figures = _Figures(settings.depth, width, head.spec.num_experts)
    for batch in _batches(held_out, settings.prompts):
        moved = batch.to(head.fc.weight.device)
        own = place_features(batch, features, moved.tokens.device)
        ranks, right = _draft_ranks(target, head, moved, own, figures)
        for b, places in enumerate(batch.places):
            for place in places:
                figures.add(place, ranks[:, b], None if right is None else right[b])
    if not figures.walked[1][0]:
        raise JakiroConfigError("no held-out answer has two tokens to judge by; raise generation.new_tokens")
    return figures.result()


def _batches(shard: Shard, documents: int) -> list[Batch]:
    """The first documents, in rows as long as the longest of them."""
    order = np.arange(min(documents, len(shard)))
    longest = max((len(shard.document(i)) for i in order.tolist()), default=0)
    if not longest:
        return []
    rows = pack_rows(shard, longest, order)
    count = max(1, _BATCH_TOKENS // longest)
    return [rows.batch(range(len(rows))[first : first + count]) for first in range(0, len(rows), count)]


@dataclass
class _Figures:
    """What is counted on the way."""

    depth: int
    width: int
    num_experts: int
    hits: list[list[np.ndarray]] = field(default_factory=list)
    right: list[np.ndarray] = field(default_factory=list)
    walked: dict[int, list[int]] = field(default_factory=dict)
    experts: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hits = [[] for _ in range(self.depth)]
        self.walked = {1: [0, 0], self.width: [0, 0]}

    def add(self, place: Place, ranks: np.ndarray, right: np.ndarray | None) -> None:
        """Counts a document: ``[depth, L]`` and ``[L]`` ranks of its row, by the round's start."""
        bases = _bases(place)
        own = ranks[:, bases]
        for d in range(self.depth):
            self.hits[d].append(own[d, : max(0, own.shape[1] - d)])
        if right is not None:
            self.right.append(right[bases][: max(0, own.shape[1] - 1)])
        for allowed, totals in self.walked.items():
            rounds, emitted = _walk(own < allowed)
            totals[0] += rounds
            totals[1] += emitted

    def result(self) -> Quality:
        def share(found: list[np.ndarray], allowed: int) -> float:
            joined = np.concatenate(found)
            return float((joined < allowed).mean()) if len(joined) else 0.0

        wide, narrow = self.walked[self.width], self.walked[1]
        return Quality(
            top1=tuple(share(found, 1) for found in self.hits),
            top_k=tuple(share(found, self.width) for found in self.hits),
            right_top1=share(self.right, 1) if self.right else None,
            right_top_k=share(self.right, self.width) if self.right else None,
            acceptance_length=narrow[1] / narrow[0],
            acceptance_length_top_k=wide[1] / wide[0],
            width=self.width,
            positions=sum(len(found) for found in self.hits[0]),
            experts=self._expert_quality() if self.experts else None,
        )

    def _expert_quality(self) -> ExpertQuality:
        mean = np.concatenate(self.experts).mean(axis=0).tolist()
        count = self.num_experts
        entropy, same, overlap = mean[2 * count :]
        return ExpertQuality(tuple(mean[:count]), tuple(mean[count : 2 * count]), entropy, same, overlap)


def _bases(place: Place) -> slice:
    """Where rounds start whose root is a generated token and whose first draft has a token to be compared with.

    The first round follows the last prompt position; its root is the first generated token.
    """
    first = place.start + max(0, place.prompt - 1)
    return slice(first, max(first, place.start + place.length - 2))


def _draft_ranks(
    target: Target, head: DraftHead, batch: Batch, features: Tensor, figures: _Figures
) -> tuple[np.ndarray, np.ndarray | None]:
    """Ranks of the text's tokens among the drafts: ``([depth, B, L], [B, L]) int64``, by the round's start.

    A rank is ``width`` if the token is not among the ``width`` best. The second is of the contrastive output
    of the first forward.
    """
    contrast, depth = head.spec.has_contrast, figures.depth
    steps = depth - 1 if contrast else depth
    ranks = np.full((depth, *batch.tokens.shape), figures.width)
    right = None
    features = features.to(head.fc.weight.dtype)
    embeds = target.embed(batch.tokens).to(features.dtype)

    def rank(output: Tensor, ahead: int, behind: int) -> np.ndarray:
        best = _best(target.logits, output.flatten(0, 1), figures.width)
        found = best == batch.tokens.roll(-ahead, dims=1).flatten().unsqueeze(-1)
        where = torch.where(found.any(-1), found.int().argmax(-1), figures.width)
        return where.view(batch.tokens.shape).roll(-behind, dims=1).cpu().numpy()

    for k, output in enumerate(rollout(head, embeds, features, batch.segments, batch.positions, steps)):
        # Row i of step k drafts token i + 2 for the round that began at i - k.
        ranks[k] = rank(output.feature(), 2, k)
        if contrast and k in (0, steps - 1):
            found = rank(output.contrast(), 3, k)
            right = found if k == 0 else right
            if k == steps - 1:
                ranks[depth - 1] = found
        if k == 0 and output.routing.experts.shape[-1] > 1:
            _count_experts(target, output, batch, figures)
    return ranks, right


def _best(logits: Callable[[Tensor], Tensor], rows: Tensor, width: int) -> Tensor:
    """``[N, C] -> [N, W] int64``: the most probable tokens, a few rows at a time."""
    size = max(1, _LOGIT_ELEMENTS // logits(rows[:1]).shape[-1])
    return torch.cat([logits(chunk).topk(width, dim=-1).indices for chunk in rows.split(size)])


def _count_experts(target: Target, output: HeadOutput, batch: Batch, figures: _Figures) -> None:
    """Notes, for each position that is judged, what `ExpertQuality` averages."""
    judged = torch.zeros(batch.tokens.shape, dtype=torch.bool)
    for b, places in enumerate(batch.places):
        for place in places:
            judged[b, _bases(place)] = True
    judged = judged.flatten().to(batch.tokens.device)
    if not judged.any():
        return
    features = output.expert_features()[0].flatten(0, 1)[judged]  # [n, K, C]
    experts, weights = output.routing.experts[judged], output.routing.weights[judged].float()
    dense = weights.new_zeros(len(weights), figures.num_experts).scatter(1, experts, weights)
    first = F.one_hot(experts[:, 0], figures.num_experts).float()
    entropy = -torch.special.xlogy(weights, weights).sum(-1, keepdim=True)
    best, other = (_best(target.logits, features[:, k], figures.width) for k in (0, 1))
    shared = (best.unsqueeze(2) == other.unsqueeze(1)).sum((1, 2)).float().unsqueeze(1)
    same = (best[:, :1] == other[:, :1]).float()
    overlap = shared / (2 * figures.width - shared)
    figures.experts.append(torch.cat([dense, first, entropy, same, overlap], dim=1).double().cpu().numpy())


def _walk(hits: np.ndarray) -> tuple[int, int]:
    """Decodes one document with chains.

    Args:
        hits: ``[depth, bases] bool`` whether the round that starts at a base has the right draft at a depth.

    Returns:
        ``(rounds, emitted tokens)``.
    """
    depth, bases = hits.shape
    rounds, base = 0, 0
    while base < bases:
        accepted = 0
        while accepted < depth and base + accepted < bases and hits[accepted, base]:
            accepted += 1
        base += accepted + 1
        rounds += 1
    return rounds, max(0, bases)
