"""The verification walk, one warp per sequence.

B sequences, N nodes, S steps. The tree lies in registers, a pair of nodes per thread: a level costs two
reductions over the warp and no memory access.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Variant

NUM_WARPS = 1


# The counts may be a row of a larger tensor, aligned for some batches and not for others.
@triton.jit(
    do_not_specialize=["N", "S", "stride_t", "stride_p", "stride_s"], do_not_specialize_on_alignment=["p_num_nodes"]
)
def walk_kernel(
    p_tokens,  # [B, N] int64
    p_parents,  # [B, N] int64
    p_num_nodes,  # [B] int64
    p_sampled,  # [B, N] int64
    p_path,  # [B, S] int64
    p_emitted,  # [B, S] int64
    p_num_accepted,  # [B] int64
    N,
    S,
    stride_t,
    stride_p,
    stride_s,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """From node 0: node <- first n < num_nodes with parents[n] == node and tokens[n] == sampled[node].

    Grid (B). Oracle: ``walk_samples_reference``.
    """
    b = tl.program_id(0).to(tl.int64)
    num_nodes = tl.load(p_num_nodes + b)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < N
    # Token ids and node indices fit 32 bits, which halves the registers and reduces in one instruction.
    b_tokens = tl.load(p_tokens + b * stride_t + o_n, mask=m_n, other=-1).to(tl.int32)  # [BLOCK_N]
    b_parents = tl.load(p_parents + b * stride_p + o_n, mask=m_n, other=-1).to(tl.int32)  # [BLOCK_N]
    b_sampled = tl.load(p_sampled + b * stride_s + o_n, mask=m_n, other=-1).to(tl.int32)  # [BLOCK_N]
    m_child = m_n & (o_n < num_nodes) & (b_tokens >= 0)

    o_s = tl.arange(0, BLOCK_S)
    b_path = tl.zeros([BLOCK_S], dtype=tl.int32)
    b_emitted = tl.full([BLOCK_S], -1, dtype=tl.int32)
    node = tl.zeros([], dtype=tl.int32)
    step = tl.zeros([], dtype=tl.int32)
    while (step < S) & (node < BLOCK_N):
        token = tl.sum(tl.where(o_n == node, b_sampled, 0), axis=0)
        b_path = tl.where(o_s == step, node, b_path)
        b_emitted = tl.where(o_s == step, token, b_emitted)
        m_next = m_child & (b_parents == node) & (b_tokens == token)
        node = tl.min(tl.where(m_next, o_n, BLOCK_N), axis=0)  # BLOCK_N: no child
        step += 1

    m_s = o_s < S
    o_out = b * S + o_s
    tl.store(p_path + o_out, b_path.to(tl.int64), mask=m_s)
    tl.store(p_emitted + o_out, b_emitted.to(tl.int64), mask=m_s)
    tl.store(p_num_accepted + b, (step - 1).to(tl.int64))


def launch_walk(
    tokens: Tensor, parents: Tensor, num_nodes: Tensor, sampled: Tensor, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``walk_samples`` for the arguments and the result."""
    batch, steps = tokens.shape[0], max_depth + 1
    path, emitted = (torch.empty(batch, steps, dtype=torch.int64, device=tokens.device) for _ in range(2))
    num_accepted = torch.empty(batch, dtype=torch.int64, device=tokens.device)
    walk_into(tokens, parents, num_nodes, sampled, path, emitted, num_accepted)
    return path, emitted, num_accepted


def walk_into(
    tokens: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    sampled: Tensor,
    path: Tensor,
    emitted: Tensor,
    num_accepted: Tensor,
) -> None:
    """Walks and writes the results; ``path`` and ``emitted`` are contiguous, their width is S."""
    (batch, width), steps = tokens.shape, path.shape[1]
    if batch == 0:
        return
    # Nodes lie side by side as a rule; a copy serves the rest.
    tokens, parents, sampled = (x if x.stride(1) == 1 else x.contiguous() for x in (tokens, parents, sampled))
    walk_kernel[(batch,)](
        tokens,
        parents,
        num_nodes.contiguous(),
        sampled,
        path,
        emitted,
        num_accepted,
        width,
        steps,
        tokens.stride(0),
        parents.stride(0),
        sampled.stride(0),
        BLOCK_N=triton.next_power_of_2(width),
        BLOCK_S=triton.next_power_of_2(steps),
        num_warps=NUM_WARPS,
    )


def variants() -> list[Variant]:
    """What ``launch_walk`` launches, for ahead-of-time compilation."""
    pointers = ("p_tokens", "p_parents", "p_num_nodes", "p_sampled", "p_path", "p_emitted", "p_num_accepted")
    sizes = ("N", "S", "stride_t", "stride_p", "stride_s")
    return [
        Variant(
            name=f"N{nodes} S{steps}",
            function=walk_kernel,
            signature={name: "*i64" for name in pointers} | {name: "i32" for name in sizes},
            constants={"BLOCK_N": triton.next_power_of_2(nodes), "BLOCK_S": triton.next_power_of_2(steps)},
            options={"num_warps": NUM_WARPS},
            aligned=pointers,
        )
        for nodes, steps in ((16, 7), (64, 17))
    ]
