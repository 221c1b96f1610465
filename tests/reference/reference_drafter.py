"""Drafting for one request, node by node, by sorting Python lists; and a KV cache that keeps plain lists.

V vocabulary, C hidden size, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from reference_head import ReferenceHead, ReferenceOutput
from torch import Tensor

from jakiro_vllm.config import TreeConfig
from jakiro_vllm.tree.batch import TreeBatch


@dataclass(frozen=True)
class Row:
    """A committed row: the target's feature ``[C]``, the token after it, its position."""

    feature: Tensor
    next_token: int
    position: int


@dataclass
class Node:
    """A drafted token; the root has no parent."""

    token: int
    score: float
    parent: Node | None
    feature: Tensor | None = None  # that the head goes on from
    output: ReferenceOutput | None = None
    keys: list[Tensor] = field(default_factory=list)  # of its ancestors in the tree and itself
    values: list[Tensor] = field(default_factory=list)

    def path(self) -> tuple[int, ...]:
        """The tokens from the root's child to this node."""
        return (*self.parent.path(), self.token) if self.parent else ()


@dataclass
class ReferenceDraft:
    """A request's tree.

    Attributes:
        paths: token path of every kept node, root excluded.
        scores: cumulative log-probability per path.
        margin: the smallest score gap at any cut, below which another order of sums may decide otherwise.
    """

    paths: set[tuple[int, ...]]
    scores: dict[tuple[int, ...], float]
    margin: float


class ReferenceDrafter:
    """Draws the tree that ``TreeDrafter`` must draw."""

    def __init__(
        self,
        head: ReferenceHead,
        embedding: Tensor,
        lm_head: Tensor,
        config: TreeConfig,
        policy: str,
        gather_parents: bool = True,
    ) -> None:
        """Binds a head to matrices ``[V, C]`` for embedding and LM head."""
        self.head, self.embedding, self.lm_head = head, embedding.double(), lm_head.double()
        self.config, self.policy, self.gather_parents = config, policy, gather_parents

    def draft(self, rows: list[Row]) -> ReferenceDraft:
        """Grows the tree after the last of all committed rows of one request."""
        head, width = self.head, self.config.top_k
        self.margin = math.inf
        keys, values = [], []
        for row in rows:
            x = head.fuse(self.embedding[row.next_token], row.feature)
            key, value = head.key_value(x, row.position)
            keys.append(key)
            values.append(value)
        root = Node(rows[-1].next_token, 0.0, None)
        root.output = head.output(x, rows[-1].position, keys, values)

        two_levels_last = head.variant == "jakiro" and self.config.depth > 1
        forwards = self.config.depth - 1 if two_levels_last else self.config.depth
        frontier, everything = [root], []
        for forward in range(1, forwards + 1):
            level = [
                Node(token, parent.score + log_prob, parent, feature)
                for parent in frontier
                for token, log_prob, feature in self._candidates(parent.output)
            ]
            everything += level
            beam = self._best(level, width)
            if forward < forwards:
                for node in beam:
                    self._forward(node, rows[-1].position + forward, keys, values)
                frontier = beam
            elif two_levels_last:
                for i, node in enumerate(beam):
                    # The contrastive feature of a node speaks of its grandchildren.
                    grandparent = node.parent if self.gather_parents else frontier[i % len(frontier)]
                    for token, log_prob in self._top(grandparent.output.contrast):
                        everything.append(Node(token, node.score + log_prob, node))
        kept = self._best(everything, self.config.node_budget)
        return ReferenceDraft({n.path() for n in kept}, {n.path(): n.score for n in kept}, self.margin)

    def _forward(self, node: Node, position: int, keys: list[Tensor], values: list[Tensor]) -> None:
        x = self.head.fuse(self.embedding[node.token], node.feature)
        key, value = self.head.key_value(x, position)
        node.keys, node.values = [*node.parent.keys, key], [*node.parent.values, value]
        node.output = self.head.output(x, position, keys + node.keys, values + node.values)

    def _top(self, feature: Tensor) -> list[tuple[int, float]]:
        log_probs = (self.lm_head @ feature).log_softmax(dim=0).tolist()
        best = self._cut(sorted(enumerate(log_probs), key=lambda pair: -pair[1]), self.config.top_k, lambda p: p[1])
        return best

    def _candidates(self, output: ReferenceOutput) -> Iterable[tuple[int, float, Tensor]]:
        if self.policy == "mixture":
            return [(token, log_prob, output.mixture) for token, log_prob in self._top(output.mixture)]
        best: dict[int, tuple[float, Tensor]] = {}
        for feature, log_weight in output.experts:
            source = feature if self.head.variant == "jakiro_star" else output.mixture
            for token, log_prob in self._top(feature):
                score = log_prob + log_weight
                if token in best:
                    self.margin = min(self.margin, abs(best[token][0] - score))
                if token not in best or score > best[token][0]:
                    best[token] = (score, source)
        ordered = sorted(best.items(), key=lambda item: -item[1][0])
        chosen = self._cut(ordered, self.config.top_k, lambda item: item[1][0])
        return [(token, score, source) for token, (score, source) in chosen]

    def _best(self, nodes: list[Node], count: int) -> list[Node]:
        return self._cut(sorted(nodes, key=lambda n: -n.score), count, lambda n: n.score)

    def _cut(self, ordered: list, count: int, score) -> list:
        if len(ordered) > count:
            self.margin = min(self.margin, score(ordered[count - 1]) - score(ordered[count]))
        return ordered[:count]


def token_paths(trees: TreeBatch, index: int) -> list[tuple[int, ...]]:
    """The token path of every node of one tree, root excluded, in node order."""
    tokens, parents = trees.tokens[index].tolist(), trees.parents[index].tolist()
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, int(trees.num_nodes[index])):
        paths.append((*paths[parents[node]], tokens[node]))
    return paths[1:]


class DenseHeadCache:
    """A ``HeadCache`` that keeps every request's keys and values in full.

    Attributes:
        attends: calls of ``attend``, one per forward of the head.
        everyone: negative control: every scratch node is seen, ancestor or not.
    """

    def __init__(self, everyone: bool = False) -> None:
        self.keys: dict[int, list[Tensor]] = {}
        self.values: dict[int, list[Tensor]] = {}
        self.attends = 0
        self.everyone = everyone

    def begin(self, requests: list[int], drafting: list[int]) -> None:
        """Announces a round: the request of every committed row, and the requests that draft."""
        self.requests, self.drafting = requests, drafting

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Appends ``[T, G, D]``."""
        for request, key, value in zip(self.requests, keys, values, strict=True):
            self.keys.setdefault(request, []).append(key)
            self.values.setdefault(request, []).append(value)

    def attend(
        self, query: Tensor, scratch_keys: Tensor, scratch_values: Tensor, num_scratch: int, ancestors: Tensor
    ) -> Tensor:
        """Row by row, see ``HeadCache.attend``."""
        self.attends += 1
        assert query.shape[:2] == ancestors.shape
        assert query.shape[0] == len(self.drafting)
        out = torch.full_like(query, float("nan"))
        for i, request in enumerate(self.drafting):
            for r in range(query.shape[1]):
                word = int(ancestors[i, r]) % (1 << 64)  # bit 63 is the sign
                seen = [j for j in range(num_scratch) if self.everyone or word >> j & 1]
                assert word >> num_scratch == 0, "sees a node that is not written yet"
                keys = torch.stack([*self.keys[request], *scratch_keys[i, seen]])
                values = torch.stack([*self.values[request], *scratch_values[i, seen]])
                group = query.shape[2] // keys.shape[1]
                keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
                scores = torch.einsum("hd,shd->hs", query[i, r], keys) / query.shape[3] ** 0.5
                out[i, r] = torch.einsum("hs,shd->hd", scores.softmax(dim=1), values)
        return out
