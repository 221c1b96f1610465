"""Attention of whole batches with trees over paged keys and values: one launch for prompts, decoding and trees.

Row i of a request sees its committed context, which lies in pages, and of what comes after the context either
everything up to itself (prompts and plain decoding) or the nodes whose bits its ancestor word names (trees):

    out_i = softmax(scale * q_i [K_context ; K_own(i)]^T) [V_context ; V_own(i)]

The rows' own keys lie in the pages right after the context, or, while a draft grows, in scratch memory.
``reference.py`` is the oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import runs_triton
from .reference import BatchRows, Scratch, batch_attention_reference

__all__ = ["BatchRows", "Scratch", "batch_attention"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NARROW_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
MAX_HEAD_SIZE, MAX_GROUP, MAX_NODES = 256, 128, 64
#: Nothing older than this multiplies or converts float8_e4m3fn.
E4M3_CAPABILITY = (8, 9)


def batch_attention(
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
    """Computes attention for the rows of every request; other rows of ``out`` are left alone.

    T packed rows, H query heads, G KV heads, D head size, P pages of B slots. Rows whose ancestor word is 0 see
    the context and, without ``scratch``, their request's rows up to themselves. Other rows see the context and
    the nodes that their word names: page slots after the context, or scratch nodes. A row that sees nothing
    gets zeros. Memory that no row sees may hold anything, NaN included. Nothing waits for the device, and the
    launches are a function of shapes and ``rows.max_rows`` alone, so a CUDA graph may hold them.

    Args:
        query: ``[T, H, D]`` float32, bfloat16 or float16, heads contiguous.
        key_pages: ``[P, B, G, D]`` in the query's dtype, float8_e4m3fn or float8_e5m2; the last dimension
            contiguous, the others strided in any way.
        value_pages: likewise.
        rows: the requests.
        scale: of the scores, positive.
        out: ``[T, H, D]`` float32, bfloat16 or float16, written.
        softcap: ``c * tanh(score / c)`` where positive.
        window: a row sees context positions above ``position - window``, where positive; a tree must be
            shallower than it.
        key_scale: ``[1]`` or ``[] float32``, by which stored keys are multiplied; None for 1.
        value_scale: likewise.
        scratch: the nodes' keys and values where they are not in the pages; never scaled.

    Returns:
        ``out``.

    Raises:
        ValueError: on shapes or dtypes that do not fit, or that have no kernel.
    """
    _check(query, key_pages, value_pages, rows, scale, out, scratch)
    if not query.shape[0] or not rows.context_lens.shape[0]:
        return out
    arguments = query, key_pages, value_pages, rows, scale, out, softcap, window, key_scale, value_scale, scratch
    if runs_triton(query):
        from .triton_kernel import launch

        return launch(*arguments)
    return batch_attention_reference(*arguments)


def _check(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    rows: BatchRows,
    scale: float,
    out: Tensor,
    scratch: Scratch | None,
) -> None:
    """Raises ValueError with one sentence on the first thing that has no kernel."""
    if query.ndim != 3 or query.dtype not in DTYPES or query.stride(2) != 1:
        raise ValueError(
            f"query must be [T, H, D] in float32, bfloat16 or float16 with contiguous heads, "
            f"got {list(query.shape)} {query.dtype} with strides {query.stride()}"
        )
    heads, dim = query.shape[1:]
    if out.shape != query.shape or out.dtype not in DTYPES or out.stride(2) != 1:
        raise ValueError(
            f"out must be {list(query.shape)} in float32, bfloat16 or float16 with contiguous heads, "
            f"got {list(out.shape)} {out.dtype} with strides {out.stride()}"
        )
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        if pages.ndim != 4 or pages.shape != key_pages.shape or pages.shape[3] != dim or pages.stride(3) != 1:
            raise ValueError(
                f"{name} must be [P, B, G, {dim}] with contiguous heads, alike for keys and values, "
                f"got {list(pages.shape)} with strides {pages.stride()}"
            )
        if pages.dtype not in (query.dtype, *NARROW_DTYPES):
            raise ValueError(
                f"{name} must be {query.dtype} as the query, float8_e4m3fn or float8_e5m2, got {pages.dtype}"
            )
        if pages.dtype == torch.float8_e4m3fn and pages.is_cuda:
            capability = torch.cuda.get_device_capability(pages.device)
            if capability < E4M3_CAPABILITY:
                raise ValueError(
                    f"float8_e4m3fn pages need compute capability 8.9 or newer, got {capability}; use float8_e5m2"
                )
    kv_heads = key_pages.shape[2]
    if heads % kv_heads or heads // kv_heads > MAX_GROUP:
        raise ValueError(f"query heads must be 1 to {MAX_GROUP} per KV head, got {heads} for {kv_heads} KV heads")
    if not 1 <= dim <= MAX_HEAD_SIZE:
        raise ValueError(f"head size must be in [1, {MAX_HEAD_SIZE}], got {dim}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    requests = rows.context_lens.shape[0]
    if rows.row_starts.shape[0] != requests + 1 or rows.block_tables.shape[0] != requests:
        raise ValueError(
            f"{requests} contexts need {requests + 1} row starts and {requests} block tables, "
            f"got {rows.row_starts.shape[0]} and {rows.block_tables.shape[0]}"
        )
    if rows.ancestors.ndim != 1 or rows.ancestors.shape != rows.depths.shape:
        raise ValueError(
            f"ancestors and depths must have one entry for each row, "
            f"got {list(rows.ancestors.shape)} and {list(rows.depths.shape)}"
        )
    if rows.ancestors.dtype != torch.int64:
        raise ValueError(f"ancestors must be int64, got {rows.ancestors.dtype}")
    for name in ("block_tables", "row_starts", "context_lens", "ancestors", "depths"):
        tensor = getattr(rows, name)
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if rows.max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {rows.max_rows}")
    if scratch is None:
        return
    if not 0 <= scratch.used <= min(MAX_NODES, scratch.keys.shape[1]):
        raise ValueError(
            f"scratch.used must be in [0, {MAX_NODES}] and within the {scratch.keys.shape[1]} slots, got {scratch.used}"
        )
    wanted = (requests, scratch.keys.shape[1], kv_heads, dim)
    for name, nodes in (("keys", scratch.keys), ("values", scratch.values)):
        if nodes.shape != wanted or nodes.dtype != query.dtype or nodes.stride(3) != 1:
            raise ValueError(
                f"scratch.{name} must be {list(wanted)} {query.dtype} with contiguous heads, "
                f"got {list(nodes.shape)} {nodes.dtype}"
            )
