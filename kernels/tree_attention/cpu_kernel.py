"""Tree attention on the CPU, compiled by Numba, reading vLLM's pages in place.

T query rows, H query heads, G KV heads, D head size, P pages of B slots, J jobs (sequences), N nodes.

One task is one sequence and one KV head: each page is read once for all rows and query heads of the group.
Softmax is computed online, page by page; the tree's nodes come last, from contiguous tensors.
"""

from __future__ import annotations

import numba
import numba.extending
import numpy as np

# Reassociation and fused multiply-add let the loops vectorise; infinities and NaNs keep their meaning.
_FAST = {"reassoc", "contract", "arcp", "nsz"}

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)


@numba.njit(fastmath=_FAST, inline="always")
def _exp_rows(values, bits, count):
    """Exponentiates ``values[:count]`` (at most 0) in place with a vectorisable polynomial (Cephes' expf)."""
    for j in range(count):
        x = max(values[j], np.float32(-87.0))
        n = np.floor(x * _LOG2E + np.float32(0.5))
        r = x - n * _LN2_HIGH - n * _LN2_LOW
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        bits[j] = (np.int32(n) + np.int32(127)) << np.int32(23)
        values[j] = p * r * r + r + np.float32(1.0)
    scale = bits.view(np.float32)
    for j in range(count):
        values[j] *= scale[j]


def _widen(word, table):
    """One stored value as float32; chosen by type when the kernel is compiled."""
    raise NotImplementedError("only called from compiled code")


@numba.extending.overload(_widen, inline="always")
def _widen_overload(word, table):
    if isinstance(word, numba.types.Float):
        return lambda word, table: word
    return lambda word, table: table[word]


@numba.njit(fastmath=_FAST, inline="always")
def _load_page(page, half, layout, block, dim, table, out):
    """Unpacks one page's keys into ``[D, B]`` (half 0) or values into ``[B, D]`` (half 1) as float32.

    ``page`` is ``[2, B * D]`` of raw float32, or of 16-bit words looked up in ``table``.
    ``layout`` 0: keys ``[D, B]``, values ``[B, D]``; 1 (AMX): keys ``[B/16, D/2, 16, 2]``, values
    ``[D/16, B/2, 16, 2]``.
    """
    raw = page[half]
    if layout == 0:
        for i in range(block * dim):
            out[i] = _widen(raw[i], table)
    elif half == 0:
        for slot in range(block):
            for d in range(dim):
                source = (((slot // 16) * (dim // 2) + d // 2) * 16 + slot % 16) * 2 + d % 2
                out[d * block + slot] = _widen(raw[source], table)
    else:
        for slot in range(block):
            for d in range(dim):
                source = (((d // 16) * (block // 2) + slot // 2) * 16 + d % 16) * 2 + slot % 2
                out[slot * dim + d] = _widen(raw[source], table)


@numba.njit(fastmath=_FAST, inline="always")
def _fold(scores, bits, count, value_rows, offset, dim, acc, maximum, total):
    """Adds ``count`` scored values to one row's running softmax; returns its new maximum and sum."""
    new = maximum
    for j in range(count):
        new = max(new, scores[j])
    if new == np.float32(-np.inf):
        return maximum, total
    if new > maximum:
        rescale = np.float32(0.0) if maximum == np.float32(-np.inf) else np.exp(maximum - new)
        total *= rescale
        for d in range(dim):
            acc[d] *= rescale
    for j in range(count):
        scores[j] -= new
    _exp_rows(scores, bits, count)
    for j in range(count):
        weight = scores[j]
        total += weight
        start = (offset + j) * dim
        for d in range(dim):
            acc[d] += weight * value_rows[start + d]
    return new, total


def _attend(
    query,  # [T, H, D] float32
    cache,  # [P, G, 2, B * D] float32 or uint16
    table,  # [65536] float32, or empty when the cache is float32
    layout,  # int
    block,  # int
    block_tables,  # [J, M] int32
    context_lens,  # [J] int64
    row_starts,  # [J] int64
    row_counts,  # [J] int64
    node_starts,  # [J] int64
    node_counts,  # [J] int64
    tree_keys,  # [N, G, D] float32
    tree_values,  # [N, G, D] float32
    ancestors,  # [T] int64
    depths,  # [T] int64
    scale,
    softcap,
    window,
    out,  # [T, H, D] float32
):
    jobs, kv_heads, dim = row_starts.shape[0], tree_keys.shape[1], query.shape[2]
    group = query.shape[1] // kv_heads
    for task in numba.prange(jobs * kv_heads):
        job, g = task // kv_heads, task % kv_heads
        first_row, context = row_starts[job], context_lens[job]
        rows = row_counts[job] * group
        acc = np.zeros((rows, dim), dtype=np.float32)
        maxima = np.full(rows, -np.inf, dtype=np.float32)
        totals = np.zeros(rows, dtype=np.float32)
        scores = np.empty((4, block), dtype=np.float32)
        bits = np.empty(block, dtype=np.int32)
        keys = np.empty(block * dim, dtype=np.float32)
        values = np.empty(block * dim, dtype=np.float32)

        earliest = 0
        if window > 0:
            earliest = max(0, context - window + 1)
        for start in range(earliest // block * block, context, block):
            page = cache[block_tables[job, start // block], g]
            _load_page(page, 0, layout, block, dim, table, keys)
            _load_page(page, 1, layout, block, dim, table, values)
            count = min(block, context - start)
            for first in range(0, rows, 4):
                width = min(4, rows - first)
                for i in range(width):
                    for j in range(block):
                        scores[i, j] = np.float32(0.0)
                if width == 4:
                    r0, h0 = first_row + first // group, g * group + first % group
                    r1, h1 = first_row + (first + 1) // group, g * group + (first + 1) % group
                    r2, h2 = first_row + (first + 2) // group, g * group + (first + 2) % group
                    r3, h3 = first_row + (first + 3) // group, g * group + (first + 3) % group
                    for d in range(dim):
                        q0, q1 = query[r0, h0, d] * scale, query[r1, h1, d] * scale
                        q2, q3 = query[r2, h2, d] * scale, query[r3, h3, d] * scale
                        for j in range(block):
                            k = keys[d * block + j]
                            scores[0, j] += q0 * k
                            scores[1, j] += q1 * k
                            scores[2, j] += q2 * k
                            scores[3, j] += q3 * k
                else:
                    for i in range(width):
                        row, head = first_row + (first + i) // group, g * group + (first + i) % group
                        for d in range(dim):
                            q = query[row, head, d] * scale
                            for j in range(block):
                                scores[i, j] += q * keys[d * block + j]
                for i in range(width):
                    row = first_row + (first + i) // group
                    skip = 0
                    if window > 0:
                        skip = min(max(context + depths[row] - window + 1 - start, 0), count)
                    if softcap > 0:
                        for j in range(skip, count):
                            scores[i, j] = softcap * np.tanh(scores[i, j] / softcap)
                    maxima[first + i], totals[first + i] = _fold(
                        scores[i, skip:],
                        bits,
                        count - skip,
                        values,
                        skip,
                        dim,
                        acc[first + i],
                        maxima[first + i],
                        totals[first + i],
                    )

        for r in range(rows):
            row, head = first_row + r // group, g * group + r % group
            word = ancestors[row]
            for j in range(node_counts[job]):
                if (word >> j) & 1 == 0:
                    continue
                node = node_starts[job] + j
                score = np.float32(0.0)
                for d in range(dim):
                    score += query[row, head, d] * tree_keys[node, g, d]
                score *= scale
                if softcap > 0:
                    score = softcap * np.tanh(score / softcap)
                new = max(maxima[r], score)
                rescale = np.float32(0.0) if maxima[r] == np.float32(-np.inf) else np.exp(maxima[r] - new)
                weight = np.exp(score - new)
                for d in range(dim):
                    acc[r, d] = acc[r, d] * rescale + weight * tree_values[node, g, d]
                totals[r] = totals[r] * rescale + weight
                maxima[r] = new
            for d in range(dim):
                out[row, head, d] = acc[r, d] / totals[r]


attend_parallel = numba.njit(parallel=True, fastmath=_FAST, cache=True, nogil=True)(_attend)
