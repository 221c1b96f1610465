"""Drafting: from committed rows to the next trees, batched over requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jakiro_vllm.config import TreeConfig
from jakiro_vllm.draft.candidates import LmHead, propose, resolve_policy, top_tokens
from jakiro_vllm.draft.head import DraftHead, HeadOutput, Mixture
from jakiro_vllm.kernels.grow import Beam, Pool, expand, rerank
from jakiro_vllm.tree.batch import TreeBatch


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


@dataclass(frozen=True)
class DraftShape:
    """How far a draft goes; its trees have at most the nodes that the configuration allows.

    Attributes:
        levels: below the root, at least 1.
        width: nodes expanded per level and candidates per expansion, at least 1.
    """

    levels: int
    width: int


class TreeDrafter:
    """Grows one tree per request with a draft head.

    n levels take n - 1 forwards when the head has a contrastive output, since the last forward yields two levels, and
    n forwards otherwise; one level takes one.
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
        self.full = DraftShape(config.depth, config.top_k)

    @property
    def num_forwards(self) -> int:
        """Forwards of a draft of the configured depth."""
        return self.forwards(self.full.levels)

    def forwards(self, levels: int) -> int:
        """Forwards that so many levels take."""
        return levels - 1 if self._two_levels_last(levels) else levels

    def observe(self, rows: RoundInput, cache: HeadCache) -> Tensor:
        """Writes the head's KV of the committed rows, prompt chunks included; returns their ``x [T, C]``."""
        x, keys, values = self.head.observe(self.embed(rows.next_tokens), rows.features, rows.positions)
        cache.write(keys, values)
        return x

    def grow(self, roots: Roots, cache: HeadCache, shape: DraftShape | None = None) -> TreeBatch:
        """Grows one tree per root: launches only, nothing whose shape or course depends on a value.

        Args:
            roots: of B requests.
            cache: the head's KV of their contexts.
            shape: of the draft; the configured one if None.
        """
        batch, device = roots.x.shape[0], roots.x.device
        shape = shape or self.full
        width, forwards = shape.width, self.forwards(shape.levels)
        two_levels_last = self._two_levels_last(shape.levels)
        scratch = Scratch(self.head, batch, (forwards - 1) * width, roots.x)
        beam = Beam.root(batch, device)
        query = self.head.queries(roots.x, roots.positions).unsqueeze(1)
        attended = cache.attend(query, scratch.keys, scratch.values, 0, beam.words).squeeze(1)
        output = self._complete(roots.x, attended, contrastive=two_levels_last and forwards == 1)
        pool = Pool.empty(batch, width + (shape.levels - 1) * width * width, device)
        first_id = 0
        for forward in range(forwards):
            parents = beam.tokens.shape[1]
            found = propose(output, self.lm_head, width, self.policy)
            tokens, log_probs = (x.view(batch, parents, width) for x in (found.tokens, found.log_probs))
            last = forward == forwards - 1
            two_levels = two_levels_last and last
            count = width if two_levels or not last else 0  # nothing grows from the last level
            chosen = expand(pool, beam, tokens, log_probs, first_id, count, first_slot=scratch.used)
            first_id += parents * width
            if two_levels:
                self._last_level(pool, output, chosen, width, parents, first_id)
            if last:
                break
            features = found.continue_from(chosen.origins, chosen.choices)  # [B * K, C]
            # A level-1 node's input stands one position after its root's row.
            positions = roots.positions + 1 + forward
            contrastive = two_levels_last and forward == forwards - 2
            output = self._expand_beam(chosen, features, positions, scratch, cache, contrastive)
            beam = chosen
        return TreeBatch(*rerank(pool, roots.tokens, self.config.node_budget, shape.levels))

    def _two_levels_last(self, levels: int) -> bool:
        """Whether the contrastive output of the last forward gives the last level."""
        return self.head.spec.has_contrast and levels > 1

    def _expand_beam(
        self,
        beam: Beam,
        features: Tensor,
        positions: Tensor,
        scratch: Scratch,
        cache: HeadCache,
        contrastive: bool,
    ) -> HeadOutput | Mixture:
        """Runs the head on the beam's nodes; their KV goes to scratch."""
        batch, width = beam.tokens.shape
        positions = positions.unsqueeze(1).expand(batch, width).flatten()
        x, query = self.head.begin(self.embed(beam.tokens.flatten()), features, positions, *scratch.append(width))
        query = query.view(batch, width, *query.shape[1:])
        attended = cache.attend(query, scratch.keys, scratch.values, scratch.used, beam.words)
        return self._complete(x, attended.flatten(0, 1), contrastive)

    def _complete(self, x: Tensor, attended: Tensor, contrastive: bool) -> HeadOutput | Mixture:
        complete = self.head.mix if self.policy == "mixture" else self.head.complete
        return complete(x, attended, contrastive)

    def _last_level(
        self, pool: Pool, output: HeadOutput | Mixture, beam: Beam, width: int, parents: int, first_id: int
    ) -> None:
        """The second level of the last forward: what the contrastive feature says of grandchildren.

        The candidates belong to the node that was expanded, so each child takes those of its own parent.
        """
        batch = beam.tokens.shape[0]
        found = top_tokens(output.contrast(), self.lm_head, width)
        tokens, log_probs = (x.unflatten(0, (batch, parents)) for x in found)
        rows = beam.origins
        if not self.gather_parents:
            rows = torch.arange(beam.tokens.shape[1], device=rows.device).expand_as(rows) % parents
        expand(pool, beam, tokens, log_probs, first_id, count=0, rows=rows)


class Scratch:
    """Keys and values of a draft's own nodes, level by level."""

    def __init__(self, head: DraftHead, batch: int, size: int, like: Tensor) -> None:
        spec = head.spec
        shape = (batch, size, spec.num_kv_heads, spec.head_dim)
        self.keys = like.new_empty(shape)
        self.values = like.new_empty(shape)
        self.used = 0

    def append(self, width: int) -> tuple[Tensor, Tensor]:
        """``([B, K, G, D], [B, K, G, D])`` where the next level's keys and values are to be written."""
        level = slice(self.used, self.used + width)
        self.used += width
        return self.keys[:, level], self.values[:, level]
