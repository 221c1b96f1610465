"""Drafting: from committed rows to the next trees, batched over requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jakiro_vllm.config import TreeConfig
from jakiro_vllm.draft.candidates import LmHead, propose, resolve_policy, top_tokens
from jakiro_vllm.draft.head import DraftHead, HeadOutput
from jakiro_vllm.tree.batch import TreeBatch
from jakiro_vllm.tree.grow import Beam, Level, expand, rerank, root_beam


class HeadCache(Protocol):
    """The head's KV of committed tokens, wherever the engine keeps it."""

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Stores ``[T, G, D]`` keys and values of the round's committed rows."""

    def attend(
        self, query: Tensor, scratch_keys: Tensor, scratch_values: Tensor, num_scratch: int, ancestors: Tensor
    ) -> Tensor:
        """Attends to all committed tokens and to ancestors in the tree.

        Args:
            query: ``[B, R, H, D]``, R rows per request.
            scratch_keys: ``[B, S, G, D]`` scratch keys, of which the first ``num_scratch`` are written.
            scratch_values: ``[B, S, G, D]`` likewise.
            num_scratch: nodes written so far.
            ancestors: ``[B, R] int64`` bit j lets a row see scratch node j.

        Returns:
            ``[B, R, H, D]``.
        """


@dataclass(frozen=True)
class RoundInput:
    """What the head reads of a step.

    Attributes:
        features: ``[T, C]`` the target's last hidden states at the committed rows.
        next_tokens: ``[T] int64`` the token after each row.
        positions: ``[T] int64`` of the rows.
    """

    features: Tensor
    next_tokens: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Roots:
    """What trees grow from: each request's last committed row, as the head sees it.

    Attributes:
        x: ``[B, C]`` from ``TreeDrafter.observe``.
        tokens: ``[B] int64`` the roots: the tokens after the rows.
        positions: ``[B] int64`` of the rows.
    """

    x: Tensor
    tokens: Tensor
    positions: Tensor


class TreeDrafter:
    """Grows one tree per request with a draft head.

    ``depth`` levels take ``depth - 1`` forwards when the head has a contrastive output, since the last
    forward yields two levels, and ``depth`` forwards otherwise.
    """

    def __init__(
        self,
        head: DraftHead,
        config: TreeConfig,
        embed: Callable[[Tensor], Tensor],
        lm_head: LmHead,
        gather_parents: bool = True,
    ) -> None:
        """Binds a head to its target.

        Args:
            head: the draft head.
            config: shape of the trees.
            embed: the target's embedding, ``[T] int64 -> [T, C]``.
            lm_head: the target's LM head, ``[T, C] -> [T, V]``.
            gather_parents: False hangs the last level under the beam by position, as the method's reference
                code does; only for measuring what that costs.
        """
        self.head = head
        self.config = config
        self.policy = resolve_policy(config.policy, head.spec)
        self.embed = embed
        self.lm_head = lm_head
        self.gather_parents = gather_parents
        self.two_levels_last = head.spec.has_contrast and config.depth > 1
        self.num_forwards = config.depth - 1 if self.two_levels_last else config.depth

    def observe(self, rows: RoundInput, cache: HeadCache) -> Tensor:
        """Writes the head's KV of the committed rows, prompt chunks included; returns their ``x [T, C]``."""
        x = self.head.fuse(self.embed(rows.next_tokens), rows.features)
        cache.write(*self.head.keys_values(x, rows.positions))
        return x

    def draft(self, rows: RoundInput, last: Tensor, cache: HeadCache) -> TreeBatch:
        """Observes a step and grows the next trees.

        Args:
            rows: the committed rows of all requests.
            last: ``[B] int64`` index of the last row of each request that drafts.
            cache: of the requests that draft; written for all.
        """
        x = self.observe(rows, cache)
        return self.grow(Roots(x[last], rows.next_tokens[last], rows.positions[last]), cache)

    def grow(self, roots: Roots, cache: HeadCache) -> TreeBatch:
        """Grows one tree per root: launches only, nothing whose shape or course depends on a value."""
        batch, device = roots.x.shape[0], roots.x.device
        scratch = Scratch(self.head, batch, (self.num_forwards - 1) * self.config.top_k, roots.x)
        output = self.head.finish(
            roots.x,
            roots.positions,
            lambda q: cache.attend(q.unsqueeze(1), scratch.keys, scratch.values, 0, scratch.words).squeeze(1),
            contrastive=self._two_levels(0),
        )
        first_position = roots.positions + 1  # of a level-1 node's input
        levels: list[Level] = []
        beam = root_beam(batch, device)
        width = self.config.top_k
        for forward in range(self.num_forwards):
            parents = beam.tokens.shape[1]
            found = propose(output, self.lm_head, width, self.policy)
            per_node = (batch, parents)
            tokens, log_probs = found.tokens.unflatten(0, per_node), found.log_probs.unflatten(0, per_node)
            levels.append(expand(beam, tokens, log_probs, _num_candidates(levels)))
            chosen = levels[-1].best(width)
            if forward == self.num_forwards - 1:
                if self._two_levels(forward):
                    levels.append(self._last_level(output, chosen, per_node, _num_candidates(levels)))
                break
            origin = chosen.origins + parents * torch.arange(batch, device=device).unsqueeze(1)
            source = found.sources[origin, chosen.choices]
            features = found.features[origin, source].flatten(0, 1)  # [B * K, C]
            contrastive = self._two_levels(forward + 1)
            output = self._expand_beam(chosen, features, first_position + forward, scratch, cache, contrastive)
            beam = chosen
        return rerank(levels, roots.tokens, self.config.node_budget)

    def _two_levels(self, forward: int) -> bool:
        """Whether the contrastive output of this forward gives the last level."""
        return self.two_levels_last and forward == self.num_forwards - 1

    def _expand_beam(
        self,
        beam: Beam,
        features: Tensor,
        positions: Tensor,
        scratch: Scratch,
        cache: HeadCache,
        contrastive: bool,
    ) -> HeadOutput:
        """Runs the head on the beam's nodes; their KV goes to scratch."""
        batch, width = beam.tokens.shape
        positions = positions.unsqueeze(1).expand(batch, width).flatten()
        x = self.head.fuse(self.embed(beam.tokens.flatten()), features)
        words = scratch.append(beam, *self.head.keys_values(x, positions))
        return self.head.finish(
            x,
            positions,
            lambda q: cache.attend(
                q.unflatten(0, (batch, width)), scratch.keys, scratch.values, scratch.used, words
            ).flatten(0, 1),
            contrastive=contrastive,
        )

    def _last_level(self, output: HeadOutput, beam: Beam, per_node: tuple[int, int], first_id: int) -> Level:
        """The second level of the last forward: what the contrastive feature says of grandchildren.

        The candidates belong to the node that was expanded, so each child takes those of its own parent.
        """
        tokens, log_probs = top_tokens(output.contrast(), self.lm_head, self.config.top_k)
        tokens, log_probs = tokens.unflatten(0, per_node), log_probs.unflatten(0, per_node)
        if self.gather_parents:
            index = beam.origins
        else:
            index = torch.arange(beam.tokens.shape[1], device=tokens.device).expand_as(beam.origins) % per_node[1]
        index = index.unsqueeze(2).expand(*index.shape, tokens.shape[2])
        return expand(beam, tokens.gather(1, index), log_probs.gather(1, index), first_id)


class Scratch:
    """KV of a draft's own nodes, level by level, and who descends from whom."""

    def __init__(self, head: DraftHead, batch: int, size: int, like: Tensor) -> None:
        spec = head.spec
        shape = (batch, size, spec.num_kv_heads, spec.head_dim)
        self.keys = like.new_empty(shape)
        self.values = like.new_empty(shape)
        self.words = torch.zeros(batch, 1, dtype=torch.int64, device=like.device)
        self.used = 0

    def append(self, beam: Beam, keys: Tensor, values: Tensor) -> Tensor:
        """Stores ``[B * K, G, D]`` and returns the beam's ancestor words ``[B, K]``."""
        batch, width = beam.tokens.shape
        end = self.used + width
        self.keys[:, self.used : end] = keys.unflatten(0, (batch, width))
        self.values[:, self.used : end] = values.unflatten(0, (batch, width))
        bits = torch.ones_like(beam.tokens) << torch.arange(self.used, end, device=beam.tokens.device)
        self.words = self.words.gather(1, beam.origins) | bits
        self.used = end
        return self.words


def _num_candidates(levels: list[Level]) -> int:
    return sum(level.tokens.shape[1] for level in levels)
