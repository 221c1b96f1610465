"""How close two tokens were, by a third opinion: the target in plain PyTorch, without vLLM.

A sampled token is the one with the highest sum of processed logit and noise, and the noise follows from the
request's seed. Where trees and plain vLLM took different tokens, the margin says by how much one beat the other.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jakiro_vllm.storm.cases import Case

#: Beyond any difference of noises.
WIDEST = 64.0


class Judge:
    """Computes margins; see ``compare.Margin``."""

    def __init__(self, target: Path) -> None:
        """Loads nothing yet, since most storms need no judge.

        Args:
            target: folder of the model.
        """
        self.target = target

    @cached_property
    def model(self) -> Any:
        """The target, in fp32."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.target, dtype=torch.float32).eval()

    def __call__(self, case: Case, choice: int, prompt: list[int], common: list[int], plain: int, trees: int) -> float:
        """Nats by which the target preferred one of two tokens to the other.

        Where the one with the higher sum may just have been cut off by top-k or top-p, its distance to that edge
        counts, if it is less.
        """
        logits = self.logits(case, prompt, common)
        lead = score_lead(case, choice, logits, len(common), plain, trees)
        if case.greedy:
            return abs(lead)
        return min(abs(lead), edge_distance(logits, plain if lead > 0 else trees, case.fields))

    @torch.inference_mode()
    def logits(self, case: Case, prompt: list[int], common: list[int]) -> Tensor:
        """What the next token is sampled from, before top-k and top-p: ``[V]``."""
        logits = self.model(torch.tensor([prompt + common])).logits[0, -1].float()
        return penalized(logits, case.fields, prompt, common) / (1.0 if case.greedy else case.fields["temperature"])


def score_lead(case: Case, choice: int, logits: Tensor, draws: int, a: int, b: int) -> float:
    """By how much the sum of logit and noise of token ``a`` exceeds that of ``b``.

    Args:
        case: the request.
        choice: index of the answer.
        logits: ``[V]`` processed.
        draws: tokens that were sampled before.
        a: a token.
        b: another.
    """
    lead = float(logits[a] - logits[b])
    if case.greedy:
        return lead
    seed = case.fields["seed"] + choice % case.fields.get("n", 1)
    return lead + noise_lead(seed, draws, a, b, logits.numel())


def penalized(logits: Tensor, fields: dict[str, Any], prompt: list[int], output: list[int]) -> Tensor:
    """Logits ``[V]`` after what a request bans and penalizes; banned words aside, which span tokens."""
    logits = logits.clone()
    if "allowed_token_ids" in fields:
        banned = torch.ones_like(logits, dtype=torch.bool)
        banned[fields["allowed_token_ids"]] = False
        logits[banned] = -torch.inf
    size = logits.numel()
    counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=size)
    seen = counts + torch.bincount(torch.tensor(prompt), minlength=size) > 0
    penalty = fields.get("repetition_penalty", 1.0)
    logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits -= fields.get("frequency_penalty", 0.0) * counts
    return logits - fields.get("presence_penalty", 0.0) * (counts > 0)


def noise_lead(seed: int, draws: int, a: int, b: int, vocab_size: int) -> float:
    """By how much the noise of token ``a`` exceeds that of ``b``, found by asking vLLM's sampler itself.

    Args:
        seed: of the request.
        draws: tokens that were sampled before, each of which drew once.
        a: a token.
        b: another.
        vocab_size: of the target.
    """
    import vllm._custom_ops  # noqa: F401  registers the operator

    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws + 1):
        drawn = torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
    low, high = -WIDEST, WIDEST
    for _ in range(40):
        middle = (low + high) / 2
        row = torch.full((1, vocab_size), -torch.inf)
        row[0, a], row[0, b] = middle, 0.0
        if int(torch.ops._C.fused_gumbel_argmax(row, drawn)) == a:
            high = middle
        else:
            low = middle
    return -(low + high) / 2


def edge_distance(logits: Tensor, token: int, fields: dict[str, Any]) -> float:
    """Distance of a token to the edge of what top-k and top-p keep: in nats, or in probability."""
    found = torch.inf
    kept = logits
    k = fields.get("top_k", 0)
    if 0 < k < logits.numel():
        # Its rival is the last token that is kept, or, if it is that token itself, the first that is not.
        values = logits.topk(k + 1).values
        rival = values[k] if logits[token] >= values[k - 1] else values[k - 1]
        found = min(found, float((logits[token] - rival).abs()))
        kept = logits.masked_fill(logits < values[k - 1], -torch.inf)
    p = fields.get("top_p", 1.0)
    if p < 1.0:
        probabilities = kept.softmax(0)
        above = probabilities[kept > kept[token]].sum()
        found = min(found, float((above - p).abs()))
    return found
