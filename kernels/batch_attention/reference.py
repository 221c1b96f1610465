"""Attention of whole batches with trees as its definition says it, in float64: the oracle of every fast version.

T packed rows, R requests, H query heads, G KV heads, D head size, P pages of B slots, M pages per request at most,
S scratch slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchRows:
    """Which rows belong to which request, and what each may see.

    Attributes:
        block_tables: ``[R, M] int32`` pages of each request.
        row_starts: ``[R + 1] int32``: request r owns rows ``row_starts[r]:row_starts[r + 1]``, perhaps none.
        context_lens: ``[R] int32`` committed tokens before these rows.
        ancestors: ``[T] int64``: 0 for rows that see all that comes before them; otherwise bit j lets the row see
            node j of its request's tree (itself included). Rows of no request may be missing at the end.
        depths: ``[T] int32 or int64`` position of the row after its context; used with a window only.
        max_rows: upper bound of the rows of a request.
    """

    block_tables: Tensor
    row_starts: Tensor
    context_lens: Tensor
    ancestors: Tensor
    depths: Tensor
    max_rows: int


@dataclass(frozen=True)
class Scratch:
    """Keys and values of a draft's own nodes, outside of the pages.

    Attributes:
        keys: ``[R, S, G, D]`` in the query's dtype.
        values: likewise.
        used: nodes written so far, at most 64.
    """

    keys: Tensor
    values: Tensor
    used: int


def batch_attention_reference(
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
) -> Tensor:
    """Attends row by row, for rows of any number and heads of any size.

    Args:
        query: ``[T, H, D]``.
        key_pages: ``[P, B, G, D]``.
        value_pages: likewise.
        rows: the requests.
        scale: of the scores.
        out: ``[T, H, D]``, written; rows of no request are left alone.
        softcap: ``c * tanh(score / c)`` where positive.
        window: sliding window in positions, where positive.
        key_scale: ``[1] float32``, by which stored keys are multiplied.
        value_scale: likewise.
        scratch: the nodes' keys and values where they are not in the pages.

    Returns:
        ``out``.
    """
    group = query.shape[1] // key_pages.shape[2]
    key_factor = 1.0 if key_scale is None else float(key_scale)
    value_factor = 1.0 if value_scale is None else float(value_scale)
    starts = rows.row_starts.tolist()
    for request, context in enumerate(rows.context_lens.tolist()):
        for row in range(starts[request], starts[request + 1]):
            word = int(rows.ancestors[row])
            nodes = [j for j in range(64) if word >> j & 1]
            begin = max(0, context + int(rows.depths[row]) - window + 1) if window > 0 else 0
            columns = list(range(begin, context))
            if scratch is None and word == 0:
                columns = list(range(begin, context + row - starts[request] + 1))
            elif scratch is None:
                columns += [context + j for j in nodes]
            keys = _slots(key_pages, rows.block_tables[request], columns) * key_factor
            values = _slots(value_pages, rows.block_tables[request], columns) * value_factor
            if scratch is not None:
                nodes = [j for j in nodes if j < scratch.used]
                keys = torch.cat([keys, scratch.keys[request, nodes].double()])
                values = torch.cat([values, scratch.values[request, nodes].double()])
            keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,shd->hs", query[row].double(), keys) * scale
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            out[row] = torch.einsum("hs,shd->hd", scores.softmax(dim=-1), values).to(out.dtype)  # 0 of no columns
    return out


def _slots(pages: Tensor, table: Tensor, columns: list[int]) -> Tensor:
    """``[P, B, G, D]`` pages at a request's columns, ``[S, G, D] float64``."""
    index = torch.tensor(columns, dtype=torch.int64, device=pages.device)
    size = pages.shape[1]
    return pages[table[index // size].long(), index % size].double()
