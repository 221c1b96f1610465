"""Beam and re-rank, one program per sequence each; ``reference.py`` is the oracle.

B sequences, K beam nodes, W candidates per node, M candidates of all levels, N nodes of a tree.

The best of n candidates are chosen in as many rounds: the highest score and, of those that share it, the lowest
index. Nothing that a program writes is read by the same program, so its threads need not wait for each other's
writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Variant
from ..top_tokens.triton_kernel import LEAST, LOWEST, NOWHERE, choosing_warps, first_best, ordered


@triton.jit
def expand_kernel(
    p_scores,  # [B, K] float32
    p_ids,  # [B, K] int64
    p_words,  # [B, K] int64
    p_rows,  # [B, K] int64
    p_found_tokens,  # [B, P, W] int64
    p_found_log_probs,  # [B, P, W] float32
    p_pool_scores,  # [B, M] float32
    p_pool_tokens,  # [B, M] int64
    p_pool_parents,  # [B, M] int64
    p_next_scores,  # [B, COUNT] float32
    p_next,  # [5, B, COUNT] int64: tokens, ids, origins, choices, words
    K,
    P,
    W,
    M,
    first_id,
    count,
    first_slot,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes a level to the pool and picks the next beam."""
    b = tl.program_id(0).to(tl.int64)
    p_scores += b * K
    p_ids += b * K
    p_words += b * K
    p_rows += b * K
    p_found_tokens += b * P * W
    p_found_log_probs += b * P * W

    o_m = tl.arange(0, BLOCK_M)
    m_m = o_m < K * W
    parent = o_m // W
    row = parent
    if GATHER:
        row = tl.load(p_rows + parent, mask=m_m, other=0).to(tl.int32)
    o_found = row * W + o_m % W
    score = tl.load(p_scores + parent, mask=m_m, other=0.0)
    score += tl.load(p_found_log_probs + o_found, mask=m_m, other=0.0)  # [BLOCK_M]
    o_pool = b * M + first_id + o_m
    tl.store(p_pool_scores + o_pool, score, mask=m_m)
    tl.store(p_pool_tokens + o_pool, tl.load(p_found_tokens + o_found, mask=m_m, other=0), mask=m_m)
    tl.store(p_pool_parents + o_pool, tl.load(p_ids + parent, mask=m_m, other=0), mask=m_m)

    values = tl.where(m_m, ordered(score), LOWEST)
    o_k = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    for k in range(count):
        _, first = first_best(values, o_m)
        chosen = tl.where(o_k == k, first, chosen)
        values = tl.where(o_m == first, LOWEST, values)

    m_k = o_k < count
    origin = chosen // W
    choice = chosen % W
    row = origin
    if GATHER:
        row = tl.load(p_rows + origin, mask=m_k, other=0).to(tl.int32)
    o_found = row * W + choice
    score = tl.load(p_scores + origin, mask=m_k, other=0.0)
    score += tl.load(p_found_log_probs + o_found, mask=m_k, other=0.0)  # [BLOCK_K]
    word = tl.load(p_words + origin, mask=m_k, other=0)
    word |= tl.full([BLOCK_K], 1, tl.int64) << (first_slot + o_k).to(tl.int64)
    o_next = b * count + o_k
    part = tl.num_programs(0).to(tl.int64) * count
    tl.store(p_next_scores + o_next, score, mask=m_k)
    tl.store(p_next + o_next, tl.load(p_found_tokens + o_found, mask=m_k, other=0), mask=m_k)
    tl.store(p_next + part + o_next, (first_id + chosen).to(tl.int64), mask=m_k)
    tl.store(p_next + 2 * part + o_next, origin.to(tl.int64), mask=m_k)
    tl.store(p_next + 3 * part + o_next, choice.to(tl.int64), mask=m_k)
    tl.store(p_next + 4 * part + o_next, word, mask=m_k)


@triton.jit
def rerank_kernel(
    p_scores,  # [B, M] float32
    p_tokens,  # [B, M] int64
    p_parent_ids,  # [B, M] int64
    p_roots,  # [B] int64
    p_nodes,  # [4, B, N] int64: tokens, parents, depths, ancestors
    p_num_nodes,  # [B] int64
    p_node_scores,  # [B, N] float32
    M,
    N,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Makes the best candidates a tree; paths double their known part in each of ``STEPS`` steps."""
    b = tl.program_id(0).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    m_m = o_m < M
    scores = tl.load(p_scores + b * M + o_m, mask=m_m, other=0.0)
    values = tl.where(m_m, ordered(scores), LOWEST)

    # Candidate indices, the best first: the root's is -1, and what is no candidate comes after all.
    o_n = tl.arange(0, BLOCK_N)
    kept = tl.where(o_n == 0, -1, NOWHERE)
    for n in range(1, N):
        best, first = first_best(values, o_m)
        kept = tl.where(o_n == n, tl.where(best > LEAST, first, NOWHERE), kept)
        values = tl.where(o_m == first, LOWEST, values)
    m_n = (kept >= 0) & (kept < NOWHERE)
    tl.store(p_num_nodes + b, 1 + tl.sum(m_n.to(tl.int64), axis=0))

    token = tl.load(p_tokens + b * M + kept, mask=m_n, other=-1)
    token = tl.where(o_n == 0, tl.load(p_roots + b), token)
    parent_id = tl.load(p_parent_ids + b * M + kept, mask=m_n, other=-1).to(tl.int32)
    # The root is its own parent here, and that of the padding.
    parent = tl.sum(tl.where(parent_id[None, :] == kept[:, None], o_n[:, None], 0), axis=0)

    word = tl.full([BLOCK_N], 1, tl.int64) << o_n.to(tl.int64)
    depth = (o_n > 0).to(tl.int32)
    jump = parent
    for _ in tl.static_range(STEPS):
        word |= tl.gather(word, jump, 0)
        depth += tl.gather(depth, jump, 0)
        jump = tl.gather(jump, jump, 0)

    o_node = b * N + o_n
    part = tl.num_programs(0).to(tl.int64) * N
    tl.store(p_nodes + o_node, token, mask=o_n < N)
    tl.store(p_nodes + part + o_node, tl.where(o_n == 0, -1, parent).to(tl.int64), mask=o_n < N)
    tl.store(p_nodes + 2 * part + o_node, depth.to(tl.int64), mask=o_n < N)
    tl.store(p_nodes + 3 * part + o_node, word, mask=o_n < N)
    score = tl.load(p_scores + b * M + kept, mask=m_n, other=float("-inf"))
    tl.store(p_node_scores + o_node, tl.where(o_n == 0, 0.0, score), mask=o_n < N)


def launch_expand(
    parents: tuple[Tensor, Tensor, Tensor],
    tokens: Tensor,
    log_probs: Tensor,
    pool: tuple[Tensor, Tensor, Tensor],
    first_id: int,
    count: int,
    first_slot: int,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the kernel; see ``expand_reference`` for the arguments. The pool's tensors are contiguous."""
    batch, size = parents[0].shape
    width = tokens.shape[2]
    device = tokens.device
    scores = torch.empty(batch, count, dtype=torch.float32, device=device)
    integers = torch.empty(5, batch, count, dtype=torch.int64, device=device)
    ids = parents[1].contiguous()
    blocks = _expand_blocks(size * width, count)
    if batch:
        expand_kernel[(batch,)](
            parents[0].contiguous(),
            ids,
            parents[2].contiguous(),
            ids if rows is None else rows.contiguous(),
            tokens.contiguous(),
            log_probs.contiguous(),
            *pool,
            scores,
            integers,
            size,
            tokens.shape[1],
            width,
            pool[0].shape[1],
            first_id,
            count,
            first_slot,
            GATHER=rows is not None,
            **blocks,
            num_warps=_expand_warps(blocks),
        )
    beam_tokens, beam_ids, origins, choices, words = integers.unbind()
    return beam_tokens, scores, beam_ids, origins, choices, words


def launch_rerank(
    scores: Tensor, tokens: Tensor, parent_ids: Tensor, root_tokens: Tensor, node_budget: int, max_depth: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the kernel; see ``rerank``."""
    batch, total = scores.shape
    size = min(node_budget, total) + 1
    nodes = torch.empty(4, batch, size, dtype=torch.int64, device=scores.device)
    num_nodes = torch.empty(batch, dtype=torch.int64, device=scores.device)
    node_scores = torch.empty(batch, size, dtype=torch.float32, device=scores.device)
    constants = _rerank_constants(total, size, max_depth)
    if batch:
        rerank_kernel[(batch,)](
            scores.contiguous(),
            tokens.contiguous(),
            parent_ids.contiguous(),
            root_tokens.contiguous(),
            nodes,
            num_nodes,
            node_scores,
            total,
            size,
            **constants,
            num_warps=choosing_warps(constants["BLOCK_M"]),
        )
    node_tokens, parents, depths, ancestors = nodes.unbind()
    return node_tokens, parents, depths, ancestors, num_nodes, node_scores


def _expand_blocks(candidates: int, count: int) -> dict[str, int]:
    return {"BLOCK_M": triton.next_power_of_2(candidates), "BLOCK_K": triton.next_power_of_2(max(1, count))}


def _expand_warps(blocks: dict[str, int]) -> int:
    """More than to choose alone, since 64-bit tokens and ids pass through registers beside the scores."""
    return 1 if blocks["BLOCK_M"] <= 512 else blocks["BLOCK_M"] // 256


def _rerank_constants(total: int, size: int, max_depth: int) -> dict[str, int]:
    # No path is longer than the tree.
    steps = min(max_depth, size - 1).bit_length()
    return {"STEPS": steps, "BLOCK_M": triton.next_power_of_2(total), "BLOCK_N": triton.next_power_of_2(size)}


def variants() -> list[Variant]:
    """The kernels for ahead-of-time compilation: small trees, large ones, and the largest."""
    found = []
    pool = {"p_pool_scores": "*fp32", "p_pool_tokens": "*i64", "p_pool_parents": "*i64"}
    beam = {"p_scores": "*fp32", "p_ids": "*i64", "p_words": "*i64", "p_rows": "*i64"}
    given = {"p_found_tokens": "*i64", "p_found_log_probs": "*fp32"}
    pointers = {**beam, **given, **pool, "p_next_scores": "*fp32", "p_next": "*i64"}
    sizes = dict.fromkeys(("K", "P", "W", "M", "first_id", "count", "first_slot"), "i32")
    for candidates, count, gather in ((100, 10, False), (100, 10, True), (400, 20, True), (63 * 63, 63, True)):
        blocks = _expand_blocks(candidates, count)
        found.append(
            Variant(
                f"expand {candidates} to {count}{' gathered' if gather else ''}",
                expand_kernel,
                {**pointers, **sizes},
                {"GATHER": gather, **blocks},
                {"num_warps": _expand_warps(blocks)},
                aligned=tuple(pointers),
            )
        )
    pointers = {"p_scores": "*fp32", "p_tokens": "*i64", "p_parent_ids": "*i64", "p_roots": "*i64"}
    pointers |= {"p_nodes": "*i64", "p_num_nodes": "*i64", "p_node_scores": "*fp32"}
    for total, size, max_depth in ((84, 17, 6), (610, 64, 7), (4032, 64, 16)):
        constants = _rerank_constants(total, size, max_depth)
        found.append(
            Variant(
                f"rerank {total} to {size}",
                rerank_kernel,
                {**pointers, "M": "i32", "N": "i32"},
                constants,
                {"num_warps": choosing_warps(constants["BLOCK_M"])},
                aligned=tuple(pointers),
            )
        )
    return found
