"""Growing a batch of draft trees: candidates level by level, then the best of all levels.

A beam's nodes propose candidates; a candidate's score is its parent's plus its own log-probability. The best of
a level are the next beam; the best of all levels are the tree. Of equal scores the earlier candidate is the
better one, so a parent comes before its children even where a probability rounds to one.

B sequences, K beam nodes, W candidates per node, M candidates of all levels, N nodes of a tree.
``reference.py`` is the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch import compiled, runs_triton
from . import native
from .reference import expand_reference, rerank_reference

#: Nodes of a tree, root included, and slots of a draft's own nodes: the bits of an ancestor word.
MAX_NODES = 64
MAX_CANDIDATES = 4096


@dataclass(frozen=True)
class Beam:
    """The nodes that are expanded next.

    Attributes:
        tokens: ``[B, K] int64``.
        scores: ``[B, K] float32`` cumulative log-probability, the highest first.
        ids: ``[B, K] int64`` index among the candidates of all levels, -1 for the root.
        origins: ``[B, K] int64`` which node of the beam before each came from.
        choices: ``[B, K] int64`` which of that node's candidates it is.
        words: ``[B, K] int64`` bit j is set when slot j holds the node itself or an ancestor; 0 for the root,
            which has no slot.
    """

    tokens: Tensor
    scores: Tensor
    ids: Tensor
    origins: Tensor
    choices: Tensor
    words: Tensor

    @classmethod
    def root(cls, batch_size: int, device: torch.device | str) -> Beam:
        """The beam before the first level: the root alone, whose token is not needed."""
        zeros = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        return cls(zeros, zeros.float(), zeros - 1, zeros, zeros, zeros)


@dataclass(frozen=True)
class Pool:
    """Candidates of all levels, level after level; within one in the order of the nodes that proposed them.

    Attributes:
        scores: ``[B, M] float32`` cumulative log-probability, -inf where there is no candidate.
        tokens: ``[B, M] int64``.
        parent_ids: ``[B, M] int64`` candidate index of the parent, -1 for the root.
    """

    scores: Tensor
    tokens: Tensor
    parent_ids: Tensor

    @classmethod
    def empty(cls, batch_size: int, total: int, device: torch.device | str) -> Pool:
        """A pool for ``total`` candidates, which ``expand`` fills."""
        tokens, parent_ids = torch.empty(2, batch_size, total, dtype=torch.int64, device=device).unbind()
        return cls(torch.empty(batch_size, total, dtype=torch.float32, device=device), tokens, parent_ids)


def expand(
    pool: Pool,
    beam: Beam,
    tokens: Tensor,
    log_probs: Tensor,
    first_id: int,
    count: int,
    first_slot: int = 0,
    rows: Tensor | None = None,
) -> Beam:
    """Hangs a level's candidates under a beam and picks the next beam, in one launch.

    Node k of the beam gets the candidates ``tokens[b, k]``, or ``tokens[b, rows[b, k]]`` where they were found
    for other nodes than the beam's.

    Args:
        pool: written at ``first_id`` to ``first_id + K * W``.
        beam: the parents, K nodes.
        tokens: ``[B, P, W] int64`` candidates; P is K without ``rows``.
        log_probs: ``[B, P, W] float32``, -inf where there is no candidate.
        first_id: number of candidates in earlier levels.
        count: nodes of the next beam, at most ``K * W``; 0 for the last level.
        first_slot: slot of the next beam's first node.
        rows: ``[B, K] int64`` in [0, P), or None.

    Returns:
        The next beam, the best first. It is filled up with candidates of score -inf where there are no others.

    Raises:
        ValueError: on shapes or dtypes that do not fit together, on more than 4096 candidates in a level, on a
            level that the pool has no room for, and on slots beyond 63.
    """
    batch, parents = beam.scores.shape
    if tokens.ndim != 3 or tokens.shape[0] != batch or (rows is None and tokens.shape[1] != parents):
        wanted = f"[{batch}, {parents if rows is None else 'P'}, W]"
        raise ValueError(f"tokens must be {wanted} for the beam, got {list(tokens.shape)}")
    if log_probs.shape != tokens.shape:
        raise ValueError(f"log_probs must be {list(tokens.shape)} as the tokens, got {list(log_probs.shape)}")
    if rows is not None and rows.shape != beam.scores.shape:
        raise ValueError(f"rows must be {[batch, parents]} for the beam, got {list(rows.shape)}")
    _check_dtypes({"tokens": tokens, "rows": rows}, {"log_probs": log_probs})
    size = parents * tokens.shape[2]
    if not 1 <= size <= MAX_CANDIDATES:
        raise ValueError(f"a level must have 1 to {MAX_CANDIDATES} candidates, got {parents} x {tokens.shape[2]}")
    into = pool.scores, pool.tokens, pool.parent_ids
    if not all(part.shape == into[0].shape and part.is_contiguous() for part in into):
        raise ValueError("the pool's tensors must be contiguous and of one shape; use Pool.empty")
    if pool.scores.shape[0] != batch or not 0 <= first_id <= pool.scores.shape[1] - size:
        room = list(pool.scores.shape)
        raise ValueError(f"the pool must have room for {batch} x {size} candidates from {first_id}, it has {room}")
    if not 0 <= count <= size:
        raise ValueError(f"count must be in [0, {size}], got {count}")
    if first_slot < 0 or first_slot + count > MAX_NODES:
        raise ValueError(f"slots must be in [0, {MAX_NODES - 1}], got {first_slot} to {first_slot + count - 1}")
    parts = beam.scores, beam.ids, beam.words
    if runs_triton(tokens):
        from .triton_kernel import launch_expand

        return Beam(*launch_expand(parts, tokens, log_probs, into, first_id, count, first_slot, rows))
    library = compiled(tokens, beam.scores, log_probs)
    if library is not None:
        return Beam(*native.expand(library, parts, tokens, log_probs, into, first_id, count, first_slot, rows))
    return Beam(*expand_reference(parts, tokens, log_probs, into, first_id, count, first_slot, rows))


def rerank(
    pool: Pool, root_tokens: Tensor, node_budget: int, max_depth: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Keeps the best ``node_budget`` candidates of all levels as a tree, in one launch.

    N is ``min(node_budget, M) + 1``. Nodes come in the order of their scores, which is topological, so the first n
    are the best tree of n nodes; a candidate of score -inf is never kept.

    Args:
        pool: all of it is filled; scores do not rise from parent to child.
        root_tokens: ``[B] int64`` the last emitted tokens.
        node_budget: draft nodes per tree, in [1, 63].
        max_depth: number of levels, at least 1.

    Returns:
        ``(tokens [B, N], parents [B, N], depths [B, N], ancestors [B, N], num_nodes [B], scores [B, N])``, int64
        and float32: tokens from the root, node indices of the parents (-1 for the root), edges from the root, words
        of which bit j is set for node j on the path from the root, the number of nodes, and the candidates' scores,
        0 for the root. Columns past the number hold a child of the root with token -1 and score -inf.

    Raises:
        ValueError: on shapes or dtypes that do not fit together, on a budget outside its range and on more than
            4096 candidates.
    """
    batch, total = pool.scores.shape
    if not 1 <= total <= MAX_CANDIDATES:
        raise ValueError(f"a tree must have 1 to {MAX_CANDIDATES} candidates, got {total}")
    if root_tokens.shape != (batch,):
        raise ValueError(f"root_tokens must be [{batch}] for the pool, got {list(root_tokens.shape)}")
    _check_dtypes({"root_tokens": root_tokens}, {})
    if not 1 <= node_budget < MAX_NODES:
        raise ValueError(f"node_budget must be in [1, {MAX_NODES - 1}], got {node_budget}")
    if max_depth < 1:
        raise ValueError(f"max_depth must be at least 1, got {max_depth}")
    arguments = pool.scores, pool.tokens, pool.parent_ids, root_tokens, node_budget, max_depth
    if runs_triton(root_tokens):
        from .triton_kernel import launch_rerank

        return launch_rerank(*arguments)
    library = compiled(root_tokens, pool.scores)
    if library is not None:
        return native.rerank(library, *arguments)
    return rerank_reference(*arguments)


def _check_dtypes(integers: dict[str, Tensor | None], floats: dict[str, Tensor]) -> None:
    wanted = {**dict.fromkeys(integers, torch.int64), **dict.fromkeys(floats, torch.float32)}
    for name, tensor in {**integers, **floats}.items():
        if tensor is not None and tensor.dtype != wanted[name]:
            raise ValueError(f"{name} must be {str(wanted[name]).removeprefix('torch.')}, got {tensor.dtype}")
