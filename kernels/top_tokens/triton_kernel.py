"""The most probable tokens of each row, in two launches; ``reference.py`` is the oracle.

T rows, V vocabulary, W tokens per row. A row is cut into S splits of ``TILE_ROWS x TILE_COLUMNS`` tokens,
each of which one program holds in registers as a tile [R, C].

The better of two tokens is the one with the higher logit and, if they are equal, the lower id. A column of a
tile is worth its best token. If a token is among the row's best W, then so is its column among the columns:
each column that is worth more holds a better token. So

1. ``split_kernel`` reduces its tile to column maxima, keeps the best W columns, and sums exponentials;
2. ``merge_kernel`` keeps the best W columns of all splits, and reads their W * R tokens again.

Choosing takes W rounds over the column maxima, an R-th of the tile. A tile belongs to one warp, whose rounds
need no barrier.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Variant

#: 64 logits per thread of a warp: twice as many leave sm_100 without registers.
TILE_ROWS = 8
TILE_COLUMNS = 256
SPLIT_WARPS = 1

#: Below the ordered integer of every number, -inf included: what is no candidate, or no longer one.
LOWEST = tl.constexpr(-(2**31))
#: Above every index.
NOWHERE = tl.constexpr(2**31 - 1)
#: The ordered integer of -inf.
LEAST = tl.constexpr(-(2**31) + 0x7FFFFF)


@triton.jit
def ordered(x):
    """Integers in the order of the numbers: float32 to int32, where both zeros become 0."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == LOWEST, 0, bits)
    return bits ^ ((bits >> 31) & NOWHERE)


@triton.jit
def number(order):
    """The inverse of ``ordered``."""
    return (order ^ ((order >> 31) & NOWHERE)).to(tl.float32, bitcast=True)


@triton.jit
def first_best(values, index):
    """The highest of ``values [n] int32`` and, of those that share it, the lowest ``index [n] int32``."""
    best = tl.max(values, axis=0)
    return best, tl.min(tl.where(values == best, index, NOWHERE), axis=0)


@triton.jit
def split_kernel(
    p_logits,  # [T, V]
    p_values,  # [T, S, W] int32, ordered
    p_tokens,  # [T, S, W] int32
    p_maxima,  # [T, S] float32
    p_sums,  # [T, S] float32
    stride,
    V,
    W,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """The best columns of one split: each one's value and best token."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    part = row * tl.num_programs(1) + split

    o_r = tl.arange(0, R)
    o_c = split * (R * C) + tl.arange(0, C)
    o_x = o_c[None, :] + o_r[:, None] * C
    x = tl.load(p_logits + row * stride + o_x, mask=o_x < V, other=float("-inf")).to(tl.float32)  # [R, C]
    column = tl.max(x, axis=0)  # [C]
    token = o_c + C * tl.min(tl.where(x == column[None, :], o_r[:, None], R - 1), axis=0)

    maximum = tl.max(column, axis=0)
    # Where all is masked, a finite pivot leaves the weights at exp(-inf) = 0.
    pivot = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.sum(tl.exp(x - pivot), axis=0), axis=0)
    tl.store(p_maxima + part, maximum)
    tl.store(p_sums + part, total)

    values = tl.where(o_c < V, ordered(column), LOWEST)
    for w in range(W):
        best, first = first_best(values, token)
        tl.store(p_values + part * W + w, best)
        tl.store(p_tokens + part * W + w, first)
        values = tl.where(token == first, LOWEST, values)


@triton.jit
def merge_kernel(
    p_logits,  # [T, V]
    p_values,  # [T, S, W] int32, ordered
    p_tokens,  # [T, S, W] int32
    p_maxima,  # [T, S] float32
    p_sums,  # [T, S] float32
    p_best_tokens,  # [T, W] int64
    p_log_probs,  # [T, W] float32
    stride,
    V,
    S,
    W,
    R: tl.constexpr,
    C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The best tokens of one row, out of its splits' best columns; P = S * W of them."""
    row = tl.program_id(0).to(tl.int64)

    o_p = tl.arange(0, BLOCK_P)
    m_p = o_p < S * W
    values = tl.load(p_values + row * S * W + o_p, mask=m_p, other=LOWEST)  # [BLOCK_P]
    tokens = tl.load(p_tokens + row * S * W + o_p, mask=m_p, other=0)

    o_s = tl.arange(0, BLOCK_S)
    maxima = tl.load(p_maxima + row * S + o_s, mask=o_s < S, other=float("-inf"))
    sums = tl.load(p_sums + row * S + o_s, mask=o_s < S, other=0.0)
    maximum = tl.max(maxima, axis=0)
    pivot = tl.where(maximum == float("-inf"), 0.0, maximum)
    log_total = pivot + tl.log(tl.sum(sums * tl.exp(maxima - pivot), axis=0))

    o_w = tl.arange(0, BLOCK_W)
    columns = tl.zeros([BLOCK_W], tl.int32)
    for w in range(W):
        best, first = first_best(values, tokens)
        columns = tl.where(o_w == w, first, columns)
        values = tl.where(tokens == first, LOWEST, values)

    # The first token of a column, from any of its tokens.
    columns = columns - columns % (R * C) + columns % C
    o_x = columns[:, None] + tl.arange(0, R)[None, :] * C  # [BLOCK_W, R]
    m_x = (o_w[:, None] < W) & (o_x < V)
    x = tl.load(p_logits + row * stride + o_x, mask=m_x, other=0.0).to(tl.float32)
    values = tl.reshape(tl.where(m_x, ordered(x), LOWEST), [BLOCK_W * R])
    tokens = tl.reshape(o_x, [BLOCK_W * R])
    for w in range(W):
        best, first = first_best(values, tokens)
        logit = number(best)
        # NaN has no place in the order, but must not lead to a token that does not exist.
        tl.store(p_best_tokens + row * W + w, tl.minimum(first, V - 1).to(tl.int64))
        tl.store(p_log_probs + row * W + w, tl.where(logit == float("-inf"), logit, logit - log_total))
        values = tl.where(tokens == first, LOWEST, values)


def launch_top_tokens(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Launches the kernels; see ``top_tokens``."""
    rows, vocabulary = logits.shape
    splits = triton.cdiv(vocabulary, TILE_ROWS * TILE_COLUMNS)
    device = logits.device
    tokens = torch.empty(rows, width, dtype=torch.int64, device=device)
    log_probs = torch.empty(rows, width, dtype=torch.float32, device=device)
    if not rows:
        return tokens, log_probs
    columns = torch.empty(2, rows, splits, width, dtype=torch.int32, device=device)
    partial = torch.empty(2, rows, splits, dtype=torch.float32, device=device)
    shared = (columns[0], columns[1], partial[0], partial[1])
    split_kernel[(rows, splits)](
        logits, *shared, logits.stride(0), vocabulary, width, R=TILE_ROWS, C=TILE_COLUMNS, num_warps=SPLIT_WARPS
    )
    blocks = _merge_blocks(splits, width)
    merge_kernel[(rows,)](
        logits,
        *shared,
        tokens,
        log_probs,
        logits.stride(0),
        vocabulary,
        splits,
        width,
        R=TILE_ROWS,
        C=TILE_COLUMNS,
        **blocks,
        num_warps=_merge_warps(blocks),
    )
    return tokens, log_probs


def choosing_warps(count: int) -> int:
    """Warps that choose among ``count`` values: one alone needs no barriers, but has to hold them all."""
    return 1 if count <= 1024 else 4 if count <= 4096 else 16


def _merge_blocks(splits: int, width: int) -> dict[str, int]:
    return {
        "BLOCK_S": triton.next_power_of_2(splits),
        "BLOCK_P": triton.next_power_of_2(splits * width),
        "BLOCK_W": triton.next_power_of_2(width),
    }


def _merge_warps(blocks: dict[str, int]) -> int:
    return choosing_warps(max(blocks["BLOCK_P"], blocks["BLOCK_W"] * TILE_ROWS))


def variants() -> list[Variant]:
    """The kernels for ahead-of-time compilation: logits of 128k tokens, ten or the most of them wanted."""
    tile = {"R": TILE_ROWS, "C": TILE_COLUMNS}
    partial = {"p_values": "*i32", "p_tokens": "*i32", "p_maxima": "*fp32", "p_sums": "*fp32"}
    out = {"p_best_tokens": "*i64", "p_log_probs": "*fp32"}
    sizes = {"stride": "i32", "V": "i32"}
    found = []
    for name, dtype, even in (("bf16", "bf16", sizes), ("fp32", "fp32", sizes), ("fp16 odd V", "fp16", ())):
        signature = {"p_logits": f"*{dtype}", **partial, **sizes, "W": "i32"}
        aligned = ("p_logits", *partial, *even)
        found.append(
            Variant(f"split {name}", split_kernel, signature, tile, {"num_warps": SPLIT_WARPS}, aligned=aligned)
        )
    for width, splits in ((10, 63), (63, 63), (63, 256)):
        signature = {"p_logits": "*bf16", **partial, **out, **sizes, "S": "i32", "W": "i32"}
        blocks = _merge_blocks(splits, width)
        found.append(
            Variant(
                f"merge W{width} S{splits}",
                merge_kernel,
                signature,
                {**tile, **blocks},
                {"num_warps": _merge_warps(blocks)},
                aligned=("p_logits", *partial, *out, *sizes),
            )
        )
    return found
