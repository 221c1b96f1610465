"""Trees between the step that drafts them and the step that verifies them.

Topology does not travel through the scheduler, which only knows a flat list of tokens per request; it waits
here under the request's name. A request that is not scheduled for a while keeps its tree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jakiro_vllm.transfer import upload
from jakiro_vllm.tree.batch import TreeBatch, chains


class TreeStore:
    """One tree per request, in device tensors that grow with the number of live requests."""

    def __init__(self, num_nodes: int, device: torch.device | str, uniform: bool = False) -> None:
        """Reserves nothing yet.

        Args:
            num_nodes: columns, root included.
            device: of the tensors.
            uniform: fill every request's draft tokens up to ``num_nodes - 1`` with -1, which is never
                accepted, so that all requests verify the same number of rows.
        """
        self.num_nodes = num_nodes
        self.device = device
        self.uniform = uniform
        self._slots: dict[str, int] = {}
        self._tokens: dict[str, list[int]] = {}
        self._chains: set[str] = set()
        self._free: list[int] = []
        self._trees = self._empty(0)
        self._roots: TreeBatch | None = None

    def __len__(self) -> int:
        """Requests that have a tree."""
        return len(self._slots)

    def put(self, request_ids: Sequence[str], trees: TreeBatch, branch: bool = True) -> list[list[int]]:
        """Stores one tree per request, replacing older ones.

        Args:
            request_ids: B names.
            trees: B trees of at most ``num_nodes`` columns.
            branch: whether they may; False where all of them are known to be chains.

        Returns:
            Per request its draft tokens in node order, as the scheduler wants them.
        """
        # The only values that the host needs of a draft, in one copy.
        known = torch.cat([trees.num_nodes.unsqueeze(1), trees.tokens], dim=1).tolist()
        rows = [row[2 : row[0] + 1] for row in known]
        if self.uniform:
            rows = [row + [-1] * (self.num_nodes - 1 - len(row)) for row in rows]
        slots = upload([self._slot(name) for name in request_ids], self.device)
        for name, row in zip(request_ids, rows, strict=True):
            self._tokens[name] = row
        if branch:
            self._chains.difference_update(request_ids)
        else:
            self._chains.update(request_ids)
        for mine, new in zip(_tensors(self._trees), _tensors(trees), strict=True):
            if new.ndim == 2:
                mine[slots, : new.shape[1]] = new
            else:
                mine[slots] = new
        return rows

    def discard(self, request_id: str) -> None:
        """Forgets a request's tree, if it has one."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._tokens.pop(request_id)
            self._chains.discard(request_id)
            self._free.append(slot)

    def gather(self, request_ids: Sequence[str], scheduled: Sequence[Sequence[int]]) -> TreeBatch:
        """Returns the trees to verify.

        Args:
            request_ids: B names.
            scheduled: per request the draft tokens that the scheduler really scheduled. A prefix of the
                stored tree keeps its topology, -1 in places of struck nodes included; anything else becomes a
                chain. -1 is never accepted.
        """
        if not any(scheduled):
            return self._bare(len(request_ids))
        slots, counts, struck, strangers = [], [], [], []
        for row, (name, tokens) in enumerate(zip(request_ids, scheduled, strict=True)):
            counts.append(len(tokens) + 1)
            known = self._tokens.get(name)
            if known is not None and _is_prefix(tokens, known):
                slots.append(self._slots[name])
                if known[: len(tokens)] != list(tokens):
                    struck.append(row)
            else:
                slots.append(-1)
                if tokens:
                    strangers.append(row)
        index, num_nodes = upload(torch.tensor([slots, counts], dtype=torch.int64), self.device)
        # Slot 0 always exists; a request without a tree borrows it and keeps only the root.
        self._reserve(1)
        trees = self._trees.select(index.clamp(min=0))
        if struck:
            trees.tokens[upload(struck, self.device)] = self._drafts([scheduled[row] for row in struck])
        if strangers:
            rows = upload(strangers, self.device)
            as_chains = chains(self._drafts([scheduled[row] for row in strangers]), num_nodes[rows])
            for mine, new in zip(_tensors(trees), _tensors(as_chains), strict=True):
                mine[rows] = new
        return TreeBatch(trees.tokens, trees.parents, trees.depths, trees.ancestors, num_nodes)

    def may_branch(self, request_id: str) -> bool:
        """Whether a request's tree may be other than a chain."""
        return request_id not in self._chains

    def _bare(self, batch: int) -> TreeBatch:
        """Roots alone; those of the last such batch serve again if it was as large."""
        if self._roots is None or self._roots.batch_size != batch:
            self._roots = self._empty(batch)
        return self._roots

    def parents(self, request_id: str) -> list[int]:
        """The parent of each of a request's draft tokens, as its place among them; -1 for children of the root."""
        count = len(self._tokens[request_id])
        return (self._trees.parents[self._slots[request_id], 1 : count + 1] - 1).tolist()

    def _drafts(self, scheduled: Sequence[Sequence[int]]) -> torch.Tensor:
        """``[B, num_nodes] int64``: draft tokens behind a root that nobody reads, padded with -1."""
        drafts = torch.full((len(scheduled), self.num_nodes), -1, dtype=torch.int64)
        for row, tokens in zip(drafts, scheduled, strict=True):
            row[1 : len(tokens) + 1] = torch.tensor(tokens, dtype=torch.int64)
        return upload(drafts, self.device)

    def _slot(self, name: str) -> int:
        if name not in self._slots:
            if not self._free:
                self._reserve(max(16, 2 * self._trees.batch_size))
            self._slots[name] = self._free.pop()
        return self._slots[name]

    def _reserve(self, size: int) -> None:
        """Grows the tensors to at least ``size`` rows."""
        old = self._trees.batch_size
        if old >= size:
            return
        grown = self._empty(size)
        for mine, previous in zip(_tensors(grown), _tensors(self._trees), strict=True):
            mine[:old] = previous
        self._trees = grown
        self._free.extend(range(size - 1, old - 1, -1))

    def _empty(self, rows: int) -> TreeBatch:
        tokens = torch.full((rows, self.num_nodes), -1, dtype=torch.int64, device=self.device)
        return TreeBatch(*(t.clone() for t in _tensors(chains(tokens, torch.ones_like(tokens[:, 0])))))


def _is_prefix(tokens: Sequence[int], known: Sequence[int]) -> bool:
    """Whether ``tokens`` are the first of ``known``, some of them struck out."""
    return len(tokens) <= len(known) and all(token in (old, -1) for token, old in zip(tokens, known, strict=False))


def _tensors(trees: TreeBatch) -> tuple[torch.Tensor, ...]:
    return trees.tokens, trees.parents, trees.depths, trees.ancestors, trees.num_nodes
