"""The head's drafting steps after every position of packed documents.

Drafting runs the head on its own features and with the target's keys behind the position where the round
began. Run naively that is one short sequence per position; here every position of a batch is the start of its
own round and one step of all rounds is one forward.

Shapes: R rows of packed documents (B of them in a batch), L positions of a row, H query heads, G KV heads,
D head size, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from jakiro_vllm.draft.head import DraftHead, HeadOutput


def causal_mask(segments: Tensor) -> Tensor:
    """``[B, L] -> [B, 1, L, L] bool``: whether a row sees a column. Padding sees padding, so no row is blind."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return ((segments[:, :, None] == segments[:, None, :]) & causal).unsqueeze(1)


def rollout(
    head: DraftHead, embeds: Tensor, features: Tensor, segments: Tensor, positions: Tensor, steps: int
) -> Iterator[HeadOutput]:
    """Runs ``steps`` drafting steps from every position, fed with the tokens of the text.

    Row i of step k belongs to the round that began at position i - k: it reads the head's own feature of row
    i - 1 of step k - 1, and attends to the target's positions up to i - k and to the k steps of its round.
    A row whose round would begin in another document holds values without meaning.

    Args:
        head: the draft head.
        embeds: ``[B, L, C]`` of the row's own token (not of the next).
        features: ``[B, L, C]`` the target's.
        segments: ``[B, L] int64``.
        positions: ``[B, L] int64``.
        steps: number of outputs.

    Yields:
        The head's output of each step, ``[B, L, ...]``.
    """
    next_embeds = embeds.roll(-1, dims=1)  # the last row wraps around; it has no goal in its document
    attention = _RolloutAttention(causal_mask(segments))
    for step in range(steps):
        output = head(next_embeds, features, positions, attention.of_step(step))
        yield output
        if step + 1 < steps:
            features = output.feature().roll(1, dims=1)


class _RolloutAttention:
    """Attention of every step, which remembers the keys and values of the steps before."""

    def __init__(self, visible: Tensor) -> None:
        self.visible = visible  # [B, 1, L, L]
        self.keys: list[Tensor] = []  # [B, H, L, D] of each step
        self.values: list[Tensor] = []

    def of_step(self, step: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The ``attend`` of one step, for ``[B, L, H, D]`` queries and ``[B, L, G, D]`` keys and values."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            groups = query.shape[2] // key.shape[2]
            query = query.transpose(1, 2)
            key, value = (x.transpose(1, 2).repeat_interleave(groups, dim=1) for x in (key, value))
            self.keys.append(key)
            self.values.append(value)
            if step == 0:
                return F.scaled_dot_product_attention(query, key, value, attn_mask=self.visible).transpose(1, 2)
            # Row i sees the target's columns as row i - step does, and one row of each step of its own round.
            scale = query.shape[-1] ** -0.5
            committed = query @ self.keys[0].transpose(-1, -2) * scale
            committed = committed.masked_fill(~self.visible.roll(step, dims=2), float("-inf"))
            own_keys, own_values = (
                torch.stack([states[j].roll(step - j, dims=2) for j in range(1, step + 1)], dim=3)  # [B, H, L, k, D]
                for states in (self.keys, self.values)
            )
            own = (query.unsqueeze(3) * own_keys).sum(-1) * scale  # [B, H, L, k]
            probs = torch.cat([committed, own], dim=-1).float().softmax(-1).to(value.dtype)
            length = committed.shape[-1]
            mixed = probs[..., :length] @ self.values[0]
            mixed = mixed + (probs[..., length:].unsqueeze(-1) * own_values).sum(3)
            return mixed.transpose(1, 2)

        return attend
