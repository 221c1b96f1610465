"""Calls the compiled kernels, ``native.cpp``; see ``__init__.py`` for the arguments."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..native import INTEGER, POINTER, arguments

ExpandCall = arguments(
    ("parent_scores parent_ids parent_words tokens log_probs rows pool_scores pool_tokens pool_parents", POINTER),
    ("next_scores next_tokens next_ids next_origins next_choices next_words", POINTER),
    ("batch parents proposers width total first_id count first_slot", INTEGER),
)
RerankCall = arguments(
    ("scores tokens parent_ids roots nodes parents depths words num_nodes node_scores", POINTER),
    ("batch total width rounds", INTEGER),
)


def expand(
    library: ctypes.CDLL,
    parents: tuple[Tensor, Tensor, Tensor],
    tokens: Tensor,
    log_probs: Tensor,
    pool: tuple[Tensor, Tensor, Tensor],
    first_id: int,
    count: int,
    first_slot: int,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hangs candidates under a beam; see ``reference.expand_reference``.

    Raises:
        IndexError: if ``rows`` names a node that has no candidates.
    """
    batch, proposers, width = tokens.shape
    held = [x.contiguous() for x in (*parents, tokens, log_probs)]
    if rows is not None:
        rows = rows.contiguous()
    scores = torch.empty(batch, count, dtype=torch.float32)
    nodes, ids, origins, choices, words = torch.empty(5, batch, count, dtype=torch.int64).unbind()
    if library.grow_expand(
        ctypes.byref(
            ExpandCall(
                *(x.data_ptr() for x in held),
                None if rows is None else rows.data_ptr(),
                *(x.data_ptr() for x in (*pool, scores, nodes, ids, origins, choices, words)),
                *(batch, parents[0].shape[1], proposers, width, pool[0].shape[1], first_id, count, first_slot),
            )
        )
    ):
        raise IndexError(f"rows must be in [0, {proposers})")
    return nodes, scores, ids, origins, choices, words


def rerank(
    library: ctypes.CDLL,
    scores: Tensor,
    tokens: Tensor,
    parent_ids: Tensor,
    root_tokens: Tensor,
    node_budget: int,
    max_depth: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Keeps the best candidates as trees; see ``reference.rerank_reference``.

    Raises:
        IndexError: if a parent is not in the pool.
    """
    batch, total = scores.shape
    width = min(node_budget, total) + 1
    held = [x.contiguous() for x in (scores, tokens, parent_ids, root_tokens)]
    nodes, parents, depths, words = torch.empty(4, batch, width, dtype=torch.int64).unbind()
    num_nodes = torch.empty(batch, dtype=torch.int64)
    node_scores = torch.empty(batch, width, dtype=torch.float32)
    if library.grow_rerank(
        ctypes.byref(
            RerankCall(
                *(x.data_ptr() for x in (*held, nodes, parents, depths, words, num_nodes, node_scores)),
                *(batch, total, width, max_depth.bit_length()),
            )
        )
    ):
        raise IndexError(f"parent_ids must be below {total}")
    return nodes, parents, depths, words, num_nodes, node_scores
