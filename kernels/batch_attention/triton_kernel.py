"""Attention of whole batches with trees, in Triton.

T packed rows, R requests, H query heads, G KV heads, D head size, P pages of B slots, S scratch slots.

A program holds BLOCK_Q rows of one request times the H / G query heads of one KV head (BLOCK_M rows of a
matrix), so that each tile of keys and values read from memory serves them all. It walks the columns that its
rows may see in tiles of BLOCK_N with a running softmax in base 2. Tiles that every row sees whole take no mask.
Where a launch would leave the GPU idle, the columns are split among several programs, whose sums ``merge`` adds.
Block tables tell how many splits there are, contexts how many of them have columns: the others end at once.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import ARCHITECTURES, Variant
from ..dispatch import interpreted, tuned

if TYPE_CHECKING:
    from .reference import BatchRows, Scratch

#: Rows of a program's matrix, at most.
LARGEST_BLOCK = 128
#: Splits of the columns, at most, and the fewest columns that are worth one, whatever the block.
MOST_SPLITS, SPLIT_COLUMNS = 32, 256
#: Launches whose requests may have more rows than this take one split: they fill the GPU, and their partial
#: results would be large.
MOST_SPLIT_ROWS = 256
#: Multiprocessors to fill where none can be counted.
MULTIPROCESSORS = 132

_UNALIGNED = ["block_tables", "row_starts", "context_lens", "ancestors", "depths", "key_scale", "value_scale"]
_VARYING = ["requests", "num_rows", "used", "table_stride"]


@triton.jit
def _find_block(row_starts, requests, block, BLOCK_Q: tl.constexpr, CHUNK: tl.constexpr):
    """Request of a block of the ragged grid, and the block's number within it (negative: of no request).

    Request r's blocks begin at row_starts[r] // BLOCK_Q + r, which leaves room for every partial block before.
    """
    begun = 0
    for first in range(0, requests, CHUNK):
        o_r = first + tl.arange(0, CHUNK)
        begins = tl.load(row_starts + o_r, mask=o_r < requests, other=0) // BLOCK_Q + o_r
        begun += tl.sum(((begins <= block) & (o_r < requests)).to(tl.int32), 0)
    request = tl.maximum(begun - 1, 0)
    return request, block - (tl.load(row_starts + request) // BLOCK_Q + request)


@triton.jit
def _matrix_rows(block, kv_head, rows, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Each matrix row's row of the request and query head, ``[BLOCK_M]``, and whether it is one."""
    o_m = tl.arange(0, BLOCK_M)
    o_i = block * (BLOCK_M // GROUP) + o_m // GROUP
    return o_i, kv_head * GROUP + o_m % GROUP, (o_m < BLOCK_M // GROUP * GROUP) & (o_i < rows)


@triton.jit
def _add_tile(
    b_q,  # [BLOCK_M, BLOCK_D]
    b_k,  # [BLOCK_N, BLOCK_D]
    b_v,  # [BLOCK_N, BLOCK_D]
    m_seen,  # [BLOCK_M, BLOCK_N] or None
    factor,
    unit,
    b_max,  # [BLOCK_M]
    b_sum,  # [BLOCK_M]
    b_acc,  # [BLOCK_M, BLOCK_D]
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One step of the running softmax: a score is ``factor`` times a product, ``unit`` makes it an exponent of 2."""
    b_k, b_v = b_k.to(b_q.dtype), b_v.to(b_q.dtype)
    if WIDEN:
        b_s = tl.dot(b_q.to(tl.float32), tl.trans(b_k.to(tl.float32)), input_precision="ieee")
    else:
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if factor is not None:
        b_s *= factor
    if SOFTCAP > 0:
        b_s = 1 - 2 / (tl.exp2(b_s) + 1)  # tanh: ``factor`` holds the 2 * log2(e) of its exponential
    if m_seen is not None:
        b_s = tl.where(m_seen, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_pivot = b_new * unit
    if m_seen is not None:
        b_pivot = tl.where(b_new == float("-inf"), 0.0, b_pivot)  # a row that has seen nothing: not -inf - -inf
    b_p = tl.exp2(b_s * unit - b_pivot[:, None])
    b_kept = tl.exp2(b_max * unit - b_pivot)
    b_sum = b_sum * b_kept + tl.sum(b_p, 1)
    b_acc = b_acc * b_kept[:, None]
    b_p = b_p.to(b_q.dtype)
    if WIDEN:
        b_acc += tl.dot(b_p.to(tl.float32), b_v.to(tl.float32), input_precision="ieee")
    else:
        b_acc = tl.dot(b_p, b_v, b_acc, input_precision=PRECISION)
    return b_new, b_sum, b_acc


@triton.jit
def _add_pages(
    b_q, keys, values, table, keys_p, keys_b, values_p, values_b,
    begin, end, columns, context, first, last_own, named, b_own, b_begin, b_words,
    factor, unit, b_max, b_sum, b_acc,
    MASKED: tl.constexpr, STAGES: tl.constexpr, SCRATCH: tl.constexpr, WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr, PAGE_SIZE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the page columns of tiles [begin, end): those that any row sees where MASKED, otherwise all."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < HEAD_SIZE)[None, :]
    o_n = begin * BLOCK_N + tl.arange(0, BLOCK_N)
    # Page numbers are read a tile ahead: they are addresses' addresses, and would be waited for otherwise.
    b_page = tl.load(table + o_n // PAGE_SIZE, mask=o_n < columns, other=0)
    for tile in tl.range(begin, end, num_stages=STAGES):
        o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        o_slot = o_n % PAGE_SIZE
        p_k = keys + (b_page.to(tl.int64) * keys_p + o_slot * keys_b)[:, None] + o_d[None, :]
        p_v = values + (b_page.to(tl.int64) * values_p + o_slot * values_b)[:, None] + o_d[None, :]
        if MASKED:
            o_j = o_n - context  # [BLOCK_N] column after the context: node or row of the request
            m_n = (o_j < 0) & (o_n >= first)
            m_seen = (o_j < 0)[None, :]
            if not SCRATCH:
                # Bit j where column j is a node's, else none.
                b_bit = tl.where((o_j >= 0) & (o_j < 64), tl.full([BLOCK_N], 1, tl.int64) << (o_j & 63), 0)
                m_n |= (o_j >= 0) & ((o_j < last_own) | ((named & b_bit) != 0))
                m_seen = m_seen | (o_j[None, :] < b_own[:, None])
            if WINDOW > 0:
                m_seen = m_seen & (o_n[None, :] >= b_begin[:, None])
            if not SCRATCH:
                m_seen = m_seen | ((b_words[:, None] & b_bit[None, :]) != 0)  # a tree is shallower than the window
            b_k = tl.load(p_k, mask=m_n[:, None] & m_d, other=0.0)
            b_v = tl.load(p_v, mask=m_n[:, None] & m_d, other=0.0)
        else:
            m_seen = None
            if HEAD_SIZE < BLOCK_D:
                b_k = tl.load(p_k, mask=m_d, other=0.0)
                b_v = tl.load(p_v, mask=m_d, other=0.0)
            else:
                b_k = tl.load(p_k)
                b_v = tl.load(p_v)
        o_n += BLOCK_N
        b_page = tl.load(table + o_n // PAGE_SIZE, mask=o_n < columns, other=0)
        b_max, b_sum, b_acc = _add_tile(
            b_q, b_k, b_v, m_seen, factor, unit, b_max, b_sum, b_acc, SOFTCAP, PRECISION, WIDEN
        )
    return b_max, b_sum, b_acc


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def attend(
    query,  # [T, H, D]
    keys,  # [P, B, G, D]
    values,  # [P, B, G, D]
    block_tables,  # [R, M] int32
    row_starts,  # [R + 1] int32
    context_lens,  # [R] int32
    ancestors,  # [T] int64
    depths,  # [T] int32 or int64
    key_scale,  # [1] float32 or None
    value_scale,  # [1] float32 or None
    scratch_keys,  # [R, S, G, D] or None
    scratch_values,  # [R, S, G, D] or None
    out,  # [T, H, D], or [splits, T, H, D] float32 where SPLIT
    stats,  # [2 * splits + 1, T, H] float32 where SPLIT: maxima as exponents of 2, sums, and how many splits count
    scale,
    requests,
    num_rows,
    used,
    table_stride,
    query_t,  # strides, by dimension
    query_h,
    keys_p,
    keys_b,
    keys_g,
    values_p,
    values_b,
    values_g,
    scratch_keys_r,
    scratch_keys_s,
    scratch_keys_g,
    scratch_values_r,
    scratch_values_s,
    scratch_values_g,
    out_t,
    out_h,
    HEAD_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    RAGGED: tl.constexpr,
    WIDEN: tl.constexpr,
    LEAST_COLUMNS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attends a block of rows to one split of their columns; grid (row blocks, G, splits).

    Oracle: ``reference.batch_attention_reference``.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    SCRATCH: tl.constexpr = scratch_keys is not None
    PRECISION: tl.constexpr = "ieee" if query.dtype.element_ty == tl.float32 else "tf32"
    LOG2_E: tl.constexpr = 1.4426950408889634
    FAR: tl.constexpr = 2147483647

    # The last rows of a prompt have the most columns: they go first, so that none runs alone at the end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    if RAGGED:
        request, block = _find_block(row_starts, requests, block, BLOCK_Q, 256)
    else:
        per_request = tl.num_programs(0) // requests
        request, block = block // per_request, block % per_request
    first_row = tl.load(row_starts + request)
    rows = tl.load(row_starts + request + 1) - first_row
    if (block < 0) | (block * BLOCK_Q >= rows):
        return
    context = tl.load(context_lens + request).to(tl.int32)

    o_d = tl.arange(0, BLOCK_D)
    o_i, o_h, m_m = _matrix_rows(block, kv_head, rows, GROUP, BLOCK_M)
    o_t = (first_row + o_i).to(tl.int64)
    m_md = m_m[:, None] & (o_d < HEAD_SIZE)[None, :]
    b_q = tl.load(query + (o_t * query_t + o_h * query_h)[:, None] + o_d[None, :], mask=m_md, other=0.0)
    b_words = tl.load(ancestors + o_t, mask=m_m, other=0)
    b_own = tl.where(m_m & (b_words == 0), o_i + 1, 0)  # [BLOCK_M] columns after the context that a plain row sees

    # Columns [first, end) are seen by some row; columns [0, everyone) by each, but for the window.
    named = tl.reduce_or(b_words, 0)
    last_own = tl.max(b_own, 0)
    if SCRATCH:
        end, everyone = context, context
    else:
        o_bit = tl.arange(0, 64)
        last_named = tl.max(tl.where(((named >> o_bit) & 1) != 0, o_bit + 1, 0), 0)
        end = context + tl.maximum(last_own, last_named)
        everyone = tl.minimum(context + tl.min(tl.where(m_m, b_own, rows), 0), end)
    if WINDOW > 0:
        b_begin = context - WINDOW + 1 + tl.load(depths + o_t, mask=m_m, other=0).to(tl.int32)  # [BLOCK_M]
        first = tl.minimum(tl.maximum(tl.min(tl.where(m_m, b_begin, FAR), 0), 0), end)
        everyone = 0
    else:
        b_begin = 0
        first = 0
    first_tile, last_tile = first // BLOCK_N, tl.cdiv(end, BLOCK_N)
    if SPLIT:
        tiles = last_tile - first_tile
        share = tl.maximum(tl.cdiv(tiles, tl.num_programs(2)), tl.cdiv(LEAST_COLUMNS, BLOCK_N))
        active = tl.maximum(tl.cdiv(tiles, share), 1)  # splits that have columns; one where nothing is seen
        if split >= active:
            return
        first_tile += split * share
        last_tile = tl.minimum(last_tile, first_tile + share)
    whole_tile = first_tile
    if TAIL > 0:
        whole_tile = tl.maximum(tl.minimum(everyone // BLOCK_N, last_tile), first_tile)

    if SOFTCAP > 0:
        factor = scale * (2 * LOG2_E / SOFTCAP)
        unit = SOFTCAP * LOG2_E
    else:
        factor = None
        unit = scale * LOG2_E
    page_factor = factor
    if key_scale is not None:
        page_factor = tl.load(key_scale)
        if SOFTCAP > 0:
            page_factor *= factor

    again = tl.load(row_starts + request, volatile=True)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    keys += kv_head.to(tl.int64) * keys_g
    values += kv_head.to(tl.int64) * values_g
    table = block_tables + request.to(tl.int64) * table_stride
    STAGES: tl.constexpr = TAIL if WINDOW <= 0 and TAIL > 0 else None
    # fmt: off
    if WINDOW <= 0 and TAIL > 0:
        b_max, b_sum, b_acc = _add_pages(
            b_q, keys, values, table, keys_p, keys_b, values_p, values_b,
            first_tile, whole_tile, end, context, first, last_own, named, b_own, b_begin, b_words,
            page_factor, unit, b_max, b_sum, b_acc,
            False, None, SCRATCH, WINDOW, HEAD_SIZE, PAGE_SIZE, SOFTCAP, PRECISION, WIDEN, BLOCK_D, BLOCK_N,
        )
    b_max, b_sum, b_acc = _add_pages(
        b_q, keys, values, table, keys_p, keys_b, values_p, values_b,
        whole_tile, last_tile, end, context, first, last_own, named, b_own, b_begin, b_words,
        page_factor, unit, b_max, b_sum, b_acc,
        True, STAGES, SCRATCH, WINDOW, HEAD_SIZE, PAGE_SIZE, SOFTCAP, PRECISION, WIDEN, BLOCK_D, BLOCK_N,
    )
    # fmt: on
    if value_scale is not None:
        b_acc *= tl.load(value_scale)

    if SCRATCH:
        nodes = used
        if SPLIT:
            nodes = tl.where(split == active - 1, used, 0)
        p_r = request.to(tl.int64)
        p_k = scratch_keys + p_r * scratch_keys_r + kv_head * scratch_keys_g
        p_v = scratch_values + p_r * scratch_values_r + kv_head * scratch_values_g
        BLOCK_S: tl.constexpr = 32 if BLOCK_N > 32 else BLOCK_N  # nodes are few, and so are the registers left
        for start in tl.range(0, nodes, BLOCK_S, num_stages=1):
            o_j = start + tl.arange(0, BLOCK_S)
            b_bit = tl.where(o_j < nodes, tl.full([BLOCK_S], 1, tl.int64) << (o_j & 63), 0)
            m_n = (named & b_bit) != 0
            m_seen = (b_words[:, None] & b_bit[None, :]) != 0
            m_nd = m_n[:, None] & (o_d < HEAD_SIZE)[None, :]
            b_k = tl.load(p_k + (o_j * scratch_keys_s)[:, None] + o_d[None, :], mask=m_nd, other=0.0)
            b_v = tl.load(p_v + (o_j * scratch_values_s)[:, None] + o_d[None, :], mask=m_nd, other=0.0)
            b_max, b_sum, b_acc = _add_tile(
                b_q, b_k, b_v, m_seen, factor, unit, b_max, b_sum, b_acc, SOFTCAP, PRECISION, WIDEN
            )

    # Computed anew from what the compiler cannot know: else these addresses hold registers all through the loops.
    o_i, o_h, m_m = _matrix_rows(block + again - first_row, kv_head, rows, GROUP, BLOCK_M)
    o_t = (again + o_i).to(tl.int64)
    m_md = m_m[:, None] & (o_d < HEAD_SIZE)[None, :]
    if SPLIT:
        heads = tl.num_programs(1) * GROUP
        o_stat = (split.to(tl.int64) * num_rows + o_t) * heads + o_h
        size = tl.num_programs(2).to(tl.int64) * num_rows * heads
        tl.store(stats + o_stat, b_max * unit, mask=m_m)
        tl.store(stats + size + o_stat, b_sum, mask=m_m)
        if split == 0:
            b_active = tl.zeros([BLOCK_M], tl.float32) + active
            tl.store(stats + 2 * size + o_t * heads + o_h, b_active, mask=m_m)
        m_md = m_md & (b_sum != 0)[:, None]  # ``merge`` reads no others
        tl.store(out + (o_stat * HEAD_SIZE)[:, None] + o_d[None, :], b_acc, mask=m_md)
    else:
        b_acc = b_acc / tl.where(b_sum != 0, b_sum, 1.0)[:, None]  # 0 of no columns; NaN stays NaN
        p_o = out + (o_t * out_t + o_h * out_h)[:, None] + o_d[None, :]
        tl.store(p_o, b_acc.to(out.dtype.element_ty), mask=m_md)


@triton.jit(do_not_specialize=["requests", "num_rows", "splits"], do_not_specialize_on_alignment=["row_starts"])
def merge(
    partial,  # [splits, T, H, D] float32, undefined where the sum is 0
    stats,  # [2 * splits + 1, T, H] float32: maxima as exponents of 2, sums, and how many splits count
    row_starts,  # [R + 1] int32
    out,  # [T, H, D]
    requests,
    num_rows,
    splits,
    out_t,
    out_h,
    MOST_SPLITS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds the splits' sums, each scaled to the largest maximum; grid (T, H).

    Compiled once for all numbers of splits, which change with the batch. Oracle: the softmax of all columns at once,
    ``reference.batch_attention_reference``.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1)
    size = splits * num_rows.to(tl.int64) * heads
    active = tl.minimum(tl.load(stats + 2 * size + row.to(tl.int64) * heads + head), splits)
    if (row < tl.load(row_starts)) | (row >= tl.load(row_starts + requests)):
        return
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_SIZE
    o_s = tl.arange(0, MOST_SPLITS)
    m_s = o_s < active
    o_stat = (o_s.to(tl.int64) * num_rows + row) * heads + head  # [MOST_SPLITS]
    b_max = tl.load(stats + o_stat, mask=m_s, other=float("-inf"))
    b_sum = tl.load(stats + size + o_stat, mask=m_s, other=0.0)
    m_part = (b_sum != 0)[:, None] & m_d[None, :]
    b_part = tl.load(partial + (o_stat * HEAD_SIZE)[:, None] + o_d[None, :], mask=m_part, other=0.0)
    largest = tl.max(b_max, 0)
    b_weight = tl.exp2(b_max - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(b_weight * b_sum, 0)
    b_out = tl.sum(b_weight[:, None] * b_part, 0) / tl.where(total != 0, total, 1.0)  # [BLOCK_D]
    tl.store(out + row.to(tl.int64) * out_t + head * out_h + o_d, b_out.to(out.dtype.element_ty), mask=m_d)


def _config(block_n: int, num_warps: int, num_stages: int, tail: int) -> Any:
    """A tile's columns, and TAIL: stages of the loop over masked tiles, 0 for one loop that masks every tile."""
    return triton.Config({"BLOCK_N": block_n, "TAIL": tail}, num_warps=num_warps, num_stages=num_stages)


#: What to choose among, by the shape of a program's matrix. None spills; masks are free where memory is waited for.
#: One of each kind fits GPUs with 100 KB of shared memory; tuning passes over what does not fit.
_CONFIGS = {
    "low": [_config(64, 4, 3, 0), _config(32, 4, 4, 0)],
    "middle": [_config(64, 8, 3, 2), _config(32, 4, 3, 2)],
    "high": [_config(64, 8, 3, 2), _config(32, 8, 4, 2)],
    "wide low": [_config(32, 4, 3, 0)],
    "wide": [_config(32, 8, 3, 2), _config(32, 8, 2, 2)],
    "float": [_config(16, 8, 2, 0)],
}


def _kind(block: int, block_dim: int, dtype: torch.dtype) -> str:
    """Which of ``_CONFIGS`` a launch chooses from."""
    if dtype == torch.float32:
        return "float"
    if block_dim > 128:
        return "wide low" if block <= 32 else "wide"
    return "low" if block <= 32 else "middle" if block <= 64 else "high"


@functools.cache
def _tuned_attend(kind: str) -> Any:
    """The attention kernel with its kind's configurations; timed anew where the work differs in kind."""
    return tuned(_CONFIGS[kind], key=["HEAD_SIZE", "GROUP", "BLOCK_M", "SPLIT", "WINDOW"], keep=False)(attend)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS


def block_rows(max_rows: int, group: int, block_dim: int, dtype: torch.dtype, scratch: bool) -> int:
    """Rows of a program's matrix: as many as a request has, so that its keys are read once, if registers allow."""
    largest = LARGEST_BLOCK if block_dim <= 128 else LARGEST_BLOCK // 2
    if scratch:
        largest //= 2
    if dtype == torch.float32:
        largest = 16
    return max(16, min(largest, triton.next_power_of_2(max_rows * group)), triton.next_power_of_2(group))


def least_columns(block: int) -> int:
    """Fewest columns that are worth a split: of 16 bits, twice the bytes of its results, written and read again."""
    return max(SPLIT_COLUMNS, 4 * block)


def count_splits(programs: int, block: int, max_rows: int, capacity: int, multiprocessors: int) -> int:
    """Splits of the columns that fill the GPU: a power of two, by shapes alone.

    More programs never have more splits, so that warming up the fewest and the most meets every kind of launch.

    Args:
        programs: of a launch with one split.
        block: rows of a program's matrix; a multiprocessor holds one program of the highest.
        max_rows: of a request.
        capacity: columns that the block tables have room for.
        multiprocessors: of the GPU.
    """
    if max_rows > MOST_SPLIT_ROWS:
        return 1
    slots = multiprocessors * (3 if block <= 32 else 2 if block <= 64 else 1)
    splits = max(1, min(slots // programs, capacity // least_columns(block), MOST_SPLITS))
    return 1 << (splits.bit_length() - 1)


def merging_warps(block_dim: int) -> int:
    """Warps that merge a head, 32 numbers per thread."""
    return max(1, MOST_SPLITS * block_dim // 1024)


def launch(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    rows: BatchRows,
    scale: float,
    out: Tensor,
    softcap: float = 0.0,
    window: int = -1,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    scratch: Scratch | None = None,
    splits: int | None = None,
) -> Tensor:
    """Launches the kernels; arguments and result are those of ``batch_attention``.

    Args:
        splits: of the columns, a power of two; None chooses by the shapes.
    """
    num_rows, heads, dim = query.shape
    page_size, kv_heads = key_pages.shape[1:3]
    requests = rows.context_lens.shape[0]
    group = heads // kv_heads
    block_dim = max(16, triton.next_power_of_2(dim))
    block = block_rows(rows.max_rows, group, block_dim, query.dtype, scratch is not None)
    ragged = num_rows // (block // group) + requests
    even = requests * triton.cdiv(rows.max_rows, block // group)
    blocks = min(ragged, even)
    if splits is None:
        capacity = rows.block_tables.shape[1] * page_size
        units = _multiprocessors(query.device)
        splits = count_splits(blocks * kv_heads, block, rows.max_rows, capacity, units)
    result, stats = out, None
    if splits > 1:
        result = torch.empty((splits, num_rows, heads, dim), dtype=torch.float32, device=query.device)
        stats = torch.empty((2 * splits + 1, num_rows, heads), dtype=torch.float32, device=query.device)
    nodes_k, nodes_v = (scratch.keys, scratch.values) if scratch is not None else (None, None)
    _tuned_attend(_kind(block, block_dim, query.dtype))[(blocks, kv_heads, splits)](
        query,
        key_pages,
        value_pages,
        rows.block_tables,
        rows.row_starts,
        rows.context_lens,
        rows.ancestors,
        rows.depths,
        key_scale,
        value_scale,
        nodes_k,
        nodes_v,
        result,
        stats,
        scale,
        requests,
        num_rows,
        scratch.used if scratch is not None else 0,
        rows.block_tables.stride(0),
        *query.stride()[:2],
        *key_pages.stride()[:3],
        *value_pages.stride()[:3],
        *(nodes_k.stride()[:3] if nodes_k is not None else (0, 0, 0)),
        *(nodes_v.stride()[:3] if nodes_v is not None else (0, 0, 0)),
        *out.stride()[:2],
        HEAD_SIZE=dim,
        GROUP=group,
        PAGE_SIZE=page_size,
        SOFTCAP=float(softcap),
        WINDOW=window,
        SPLIT=splits > 1,
        RAGGED=ragged < even,
        WIDEN=interpreted() and query.dtype == torch.bfloat16,  # its products of bfloat16 are not floats'
        LEAST_COLUMNS=least_columns(block),
        BLOCK_M=block,
        BLOCK_D=block_dim,
    )
    if splits > 1:
        merge[(num_rows, heads)](
            result,
            stats,
            rows.row_starts,
            out,
            requests,
            num_rows,
            splits,
            *out.stride()[:2],
            MOST_SPLITS=MOST_SPLITS,
            HEAD_SIZE=dim,
            BLOCK_D=block_dim,
            num_warps=merging_warps(block_dim),
        )
    return out


def variants() -> list[Variant]:
    """What the kernels are compiled to: each configuration once, the options spread over them."""
    found = []
    for name, kind, block, options in (
        ("bf16 D128 tree split", "high", LARGEST_BLOCK, {"splits": True}),
        ("fp8 D128 scratch split", "middle", 64, {"pages": "fp8e4nv", "scratch": True, "splits": True}),
        ("fp16 D128 decode split", "low", 16, {"dtype": "fp16", "splits": True}),
        ("bf16 D192 window softcap", "wide", 64, {"dim": 192, "window": 4096, "softcap": 50.0, "ragged": True}),
        ("bf16 D256 scratch", "wide low", 32, {"dim": 256, "scratch": True}),
        ("fp32 D128", "float", 16, {"dtype": "fp32"}),
    ):
        found += [_attend_variant(name, config, block, **options) for config in _CONFIGS[kind]]
    pointers = {"partial": "*fp32", "stats": "*fp32", "row_starts": "*i32", "out": "*bf16"}
    counts = dict.fromkeys(("requests", "num_rows", "splits", "out_t", "out_h"), "i32")
    constants = {"MOST_SPLITS": MOST_SPLITS, "HEAD_SIZE": 128, "BLOCK_D": 128}
    aligned = ("partial", "stats", "out", "out_t", "out_h")
    options = {"num_warps": merging_warps(128)}
    found.append(Variant("merge bf16 D128", merge, pointers | counts, constants, options, aligned))
    return found


def _attend_variant(
    name: str,
    config: Any,
    block: int,
    dtype: str = "bf16",
    pages: str = "",
    dim: int = 128,
    splits: bool = False,
    ragged: bool = False,
    scratch: bool = False,
    window: int = -1,
    softcap: float = 0.0,
) -> Variant:
    """One configuration of ``attend``, with 4 heads per KV head."""
    own, stored = f"*{dtype}", f"*{pages or dtype}"
    pointers = {
        "query": own,
        "keys": stored,
        "values": stored,
        "block_tables": "*i32",
        "row_starts": "*i32",
        "context_lens": "*i32",
        "ancestors": "*i64",
        "depths": "*i64",
        "out": "*fp32" if splits else own,
    }
    nothing = [] if pages else ["key_scale", "value_scale"]
    pointers |= {"key_scale": "*fp32", "value_scale": "*fp32"} if pages else {}
    nothing += [] if scratch else ["scratch_keys", "scratch_values"]
    pointers |= {"scratch_keys": own, "scratch_values": own} if scratch else {}
    nothing += [] if splits else ["stats"]
    pointers |= {"stats": "*fp32"} if splits else {}
    strides = [name for name in attend.arg_names if name.split("_")[-1] in ("t", "h", "p", "b", "g", "r", "s")]
    constants = dict.fromkeys(nothing) | {
        "HEAD_SIZE": dim,
        "GROUP": 4,
        "PAGE_SIZE": 16,
        "SOFTCAP": softcap,
        "WINDOW": window,
        "SPLIT": splits,
        "RAGGED": ragged,
        "WIDEN": False,
        "LEAST_COLUMNS": least_columns(block),
        "BLOCK_M": block,
        "BLOCK_D": triton.next_power_of_2(dim),
        **config.kwargs,
    }
    signature = pointers | {"scale": "fp32"} | dict.fromkeys([*_VARYING, *strides], "i32")
    aligned = tuple(name for name in (*pointers, *strides) if name not in _UNALIGNED)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    name = f"{name} {block}x{config.kwargs['BLOCK_N']} {config.num_stages} stages"
    architectures = (89, *(a for a in ARCHITECTURES if a >= 89)) if pages == "fp8e4nv" else ARCHITECTURES
    return Variant(name, attend, signature, constants, options, aligned, architectures)
