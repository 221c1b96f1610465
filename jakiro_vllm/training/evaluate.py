"""How well a head drafts what its target writes: an estimate in plain PyTorch, without trees or an engine.

A chain is drafted from every position and compared with the target's own greedy text. Feeding the head the
tokens of that text is exact for a chain: a round only reaches a depth if everything above it was right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from jakiro_vllm.draft.head import DraftHead
from jakiro_vllm.training.generate import Shard, pack_documents
from jakiro_vllm.training.rollout import Rows, pack_rows, rollout, target_features


@dataclass(frozen=True)
class DraftQuality:
    """Agreement of drafts with the target's greedy text, on generated positions only.

    Attributes:
        top1: per depth from 1, the share of positions whose most probable draft is the target's token. The
            last depth is the contrastive output's if the head has one, as in a tree.
        top_k: the same for the ``width`` most probable drafts.
        right_top1, right_top_k: of the contrastive output of a round's first forward (depth 2); 0.0 without.
        acceptance_length: tokens per target forward of greedy decoding with this chain, bonus included. The
            true mean over the rounds that decoding would run, not over positions.
        acceptance_length_top_k: the same if a level's draft counts when it is among the ``width`` best, which
            no tree of that width exceeds.
        width: of the ``top_k`` figures.
    """

    top1: tuple[float, ...]
    top_k: tuple[float, ...]
    right_top1: float
    right_top_k: float
    acceptance_length: float
    acceptance_length_top_k: float
    width: int

    def __str__(self) -> str:
        def percent(values: Sequence[float]) -> str:
            return " ".join(f"{100 * value:.1f}" for value in values)

        return (
            f"acceptance length {self.acceptance_length:.3f} as a chain, at most "
            f"{self.acceptance_length_top_k:.3f} {self.width} wide; by depth top-1 {percent(self.top1)} %, "
            f"top-{self.width} {percent(self.top_k)} %; right at depth 2 "
            f"{percent([self.right_top1, self.right_top_k])} %"
        )


def prefixes(documents: Sequence[np.ndarray], count: int, length: int, seed: int = 0) -> list[np.ndarray]:
    """Cuts ``count`` prompts of exactly ``length`` tokens, documents weighted by their tokens.

    Args:
        documents: ``[tokens] uint16`` each, held out.
        count: number of prompts.
        length: tokens of each.
        seed: of the cuts.

    Raises:
        ValueError: if no document is longer than ``length``.
    """
    documents = [d for d in documents if len(d) > length]
    if not documents:
        raise ValueError(f"no document has more than {length} tokens; use shorter prompts or more text")
    rng = np.random.default_rng(seed)
    sizes = np.asarray([len(d) - length for d in documents], dtype=np.float64)
    chosen = rng.choice(len(documents), size=count, p=sizes / sizes.sum())
    starts = [int(rng.integers(len(documents[i]) - length)) for i in chosen]
    return [documents[i][s : s + length] for i, s in zip(chosen, starts, strict=True)]


@torch.no_grad()
def greedy_documents(
    target: LlamaForCausalLM, prompts: Sequence[np.ndarray], new_tokens: int, batch: int = 64
) -> Shard:
    """The target's greedy continuations of equally long prompts, in the precision of its parameters.

    Args:
        target: the frozen model.
        prompts: ``[length] uint16`` each, of one length.
        new_tokens: longest continuation; it ends behind the first end-of-text token.
        batch: prompts per forward.
    """
    end = target.config.eos_token_id
    continuations: list[list[int]] = []
    for first in range(0, len(prompts), batch):
        asked = torch.from_numpy(np.stack(prompts[first : first + batch]).astype(np.int64))
        written = target.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=end,
        )[:, asked.shape[1] :].tolist()
        continuations += [ids[: ids.index(end) + 1] if end in ids else ids for ids in written]
    return pack_documents(prompts, continuations)


@torch.no_grad()
def evaluate_head(
    target: LlamaForCausalLM, head: DraftHead, shard: Shard, depth: int = 6, width: int = 8, batch: int = 4
) -> DraftQuality:
    """Measures a head on text that its target wrote.

    Args:
        target: the frozen model.
        head: its draft head, with positions prepared for the longest document.
        shard: greedy continuations.
        depth: levels of a chain. A head with a contrastive output drafts the last level with it, so a chain
            takes ``depth - 1`` forwards; another head takes ``depth``.
        width: of the ``top_k`` figures.
        batch: rows per forward.

    Raises:
        ValueError: if ``depth`` is below 2, or the documents have no generated tokens to judge by.
    """
    if depth < 2:
        raise ValueError(f"depth must be at least 2, got {depth}")
    rows = pack_rows(shard, max(len(shard.document(i)) for i in range(len(shard))))
    ranks, right_rank = _draft_ranks(target, head, rows, depth, width, batch)
    hits: dict[int, list[np.ndarray]] = {d: [] for d in range(depth)}
    right: list[np.ndarray] = []
    walked: dict[int, list[int]] = {1: [0, 0], width: [0, 0]}
    for row, start, prompt, length in rows.places:
        # The first round follows the last prompt position; its root is the first generated token.
        own = ranks[:, row, start + prompt - 1 : start + length - 2].numpy()  # [depth, bases]
        for d in range(depth):
            hits[d].append(own[d, : max(0, own.shape[1] - d)])
        right.append(right_rank[row, start + prompt - 1 : start + length - 3].numpy())
        for allowed, totals in walked.items():
            rounds, emitted = _walk(own < allowed)
            totals[0] += rounds
            totals[1] += emitted
    if not walked[1][0]:
        raise ValueError("no document has two generated tokens; generate longer continuations")

    def share(found: list[np.ndarray], allowed: int) -> float:
        joined = np.concatenate(found)
        return float((joined < allowed).mean()) if len(joined) else 0.0

    return DraftQuality(
        top1=tuple(share(hits[d], 1) for d in range(depth)),
        top_k=tuple(share(hits[d], width) for d in range(depth)),
        right_top1=share(right, 1),
        right_top_k=share(right, width),
        acceptance_length=walked[1][1] / walked[1][0],
        acceptance_length_top_k=walked[width][1] / walked[width][0],
        width=width,
    )


def _draft_ranks(
    target: LlamaForCausalLM, head: DraftHead, rows: Rows, depth: int, width: int, batch: int
) -> tuple[Tensor, Tensor]:
    """Ranks of the text's tokens among the drafts: ``([depth, R, L], [R, L]) int64``, by the round's start.

    A rank is ``width`` if the token is not among the ``width`` best. The second is of the contrastive output
    of the first forward.
    """
    contrast = head.spec.has_contrast
    steps = depth - 1 if contrast else depth
    ranks = torch.full((depth, *rows.tokens.shape), width)
    right_rank = torch.full(rows.tokens.shape, width)
    lm_head = target.lm_head.weight

    def rank(output: Tensor, tokens: Tensor) -> Tensor:
        best = F.linear(output, lm_head).topk(width, dim=-1).indices  # [B, L, width]
        found = best == tokens.unsqueeze(-1)
        return torch.where(found.any(-1), found.int().argmax(-1), width)

    for first in range(0, len(rows), batch):
        span = slice(first, first + batch)
        tokens, segments, positions = rows.tokens[span], rows.segments[span], rows.positions[span]
        features = target_features(target, tokens, segments, positions)
        embeds = target.get_input_embeddings()(tokens)
        for k, output in enumerate(rollout(head, embeds, features, segments, positions, steps)):
            # Row i of step k drafts token i + 2 for the round that began at i - k.
            ranks[k, span] = rank(output.feature(), tokens.roll(-2, dims=1)).roll(-k, dims=1)
            if contrast and k in (0, steps - 1):
                found = rank(output.contrast(), tokens.roll(-3, dims=1)).roll(-k, dims=1)
                if k == 0:
                    right_rank[span] = found
                if k == steps - 1:
                    ranks[depth - 1, span] = found
    return ranks, right_rank


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
