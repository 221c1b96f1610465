"""KV compaction in one launch over requests, layers and heads.

B requests, L layers, S the longest path, G KV heads, W words per head and slot. A program loads all the rows
that it moves before it stores the first one, so rows may move onto each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ..aot import Variant

if TYPE_CHECKING:
    from . import LayerPages

NUM_WARPS = 4
#: Words that a program moves: 32 registers per thread, and enough bytes on their way to fill the memory's pipe.
TILE = 4096
WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32}


@triton.jit(do_not_specialize=["S", "stride_path", "word_chunks"])
def compact_kernel(
    p_table,  # [L, 7] int64, see LayerPages
    p_slots,  # [T] int64
    p_row_starts,  # [B] int32 or int64
    p_path,  # [B, S] int64
    p_num_accepted,  # [B] int64
    S,
    stride_path,
    word_chunks,
    WORD: tl.constexpr,  # integer type of a word
    VECTOR: tl.constexpr,  # words that divide every stride and size
    ALIGNMENT: tl.constexpr,  # bytes that divide every address
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """pages[slot(row_start + i)] <- pages[slot(row_start + path[i])] for i = 1 .. num_accepted.

    Grid (B, L, head chunks * word chunks). Oracle: ``compact_reference``.
    """
    b = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S) + 1
    # None of these three waits for another one: the path is read to its end, whatever lies there.
    num_accepted = tl.load(p_num_accepted + b)
    row_start = tl.load(p_row_starts + b).to(tl.int64)
    b_path = tl.load(p_path + b * stride_path + o_s, mask=o_s < S, other=0)  # [BLOCK_S]
    m_path = (o_s < S) & (o_s <= num_accepted) & (b_path != o_s)
    # Most rows of most steps stay where they are: then this is all there is to do.
    if tl.max(m_path.to(tl.int32), axis=0) > 0:
        b_source = tl.load(p_slots + row_start + b_path, mask=m_path, other=-1).to(tl.int32)  # [BLOCK_S]
        b_target = tl.load(p_slots + row_start + o_s, mask=m_path, other=-1).to(tl.int32)  # [BLOCK_S]
        m_s = m_path & (b_source >= 0) & (b_target >= 0)

        p_layer = p_table + tl.program_id(1) * 7
        p_pages = tl.multiple_of(tl.load(p_layer).to(tl.pointer_type(WORD)), ALIGNMENT)
        stride_page = tl.multiple_of(tl.load(p_layer + 1), VECTOR)
        stride_head = tl.multiple_of(tl.load(p_layer + 2), VECTOR)
        stride_slot = tl.multiple_of(tl.load(p_layer + 3), VECTOR)
        heads = tl.load(p_layer + 4).to(tl.int32)
        block = tl.load(p_layer + 5).to(tl.int32)
        words = tl.multiple_of(tl.load(p_layer + 6).to(tl.int32), VECTOR)

        chunk = tl.program_id(2)
        o_h = chunk // word_chunks * BLOCK_H + tl.arange(0, BLOCK_H)
        o_w = chunk % word_chunks * BLOCK_W + tl.arange(0, BLOCK_W)
        b_page = b_source // block
        o_source = b_page * stride_page + (b_source - b_page * block) * stride_slot  # [BLOCK_S]
        b_page = b_target // block
        o_target = b_page * stride_page + (b_target - b_page * block) * stride_slot  # [BLOCK_S]
        p_row = p_pages + (o_h * stride_head)[:, None] + o_w[None, :]  # [BLOCK_H, BLOCK_W]
        m_row = (o_h < heads)[:, None] & (o_w < words)[None, :]
        m_all = m_s[:, None, None] & m_row[None, :, :]  # [BLOCK_S, BLOCK_H, BLOCK_W]
        b_rows = tl.load(p_row[None, :, :] + o_source[:, None, None], mask=m_all)
        # Another thread may still have to read what this one is about to overwrite.
        tl.debug_barrier()
        tl.store(p_row[None, :, :] + o_target[:, None, None], b_rows, mask=m_all)


def launch_compact(
    pages: LayerPages, slot_mapping: Tensor, row_starts: Tensor, path: Tensor, num_accepted: Tensor
) -> None:
    """See ``compact`` for the arguments."""
    batch, steps = path.shape
    if batch == 0 or steps == 1:
        return
    path = path if path.stride(1) == 1 else path.contiguous()
    block_s, block_h, block_w = _tile(steps, pages.max_heads, pages.max_words)
    word_chunks = triton.cdiv(pages.max_words, block_w)
    compact_kernel[(batch, pages.table.shape[0], triton.cdiv(pages.max_heads, block_h) * word_chunks)](
        pages.table,
        slot_mapping.contiguous(),
        row_starts.contiguous(),
        path,
        num_accepted.contiguous(),
        steps,
        path.stride(0),
        word_chunks,
        WORD=WORDS[pages.word],
        VECTOR=pages.alignment // pages.word,
        ALIGNMENT=pages.alignment,
        BLOCK_S=block_s,
        BLOCK_H=block_h,
        BLOCK_W=block_w,
        num_warps=NUM_WARPS,
    )


def _tile(steps: int, heads: int, words: int) -> tuple[int, int, int]:
    """Rows, heads and words of a program."""
    block_s = triton.next_power_of_2(steps - 1)
    block_w = min(triton.next_power_of_2(words), TILE // block_s)
    block_h = min(triton.next_power_of_2(heads), TILE // (block_s * block_w))
    return block_s, block_h, block_w


def variants() -> list[Variant]:
    """What ``launch_compact`` launches, for ahead-of-time compilation."""
    pointers = ("p_table", "p_slots", "p_row_starts", "p_path", "p_num_accepted")
    found = []
    # D = 128 in bf16 with trees of depth 6 and 16, and rows that no word but a byte divides.
    for steps, heads, words, word, alignment in ((7, 8, 128, 4, 16), (17, 8, 128, 4, 16), (7, 8, 128, 1, 1)):
        block_s, block_h, block_w = _tile(steps, heads, words)
        variant = Variant(
            name=f"S{steps} G{heads} W{words} word{word}",
            function=compact_kernel,
            signature={name: "*i64" for name in pointers} | {"S": "i32", "stride_path": "i32", "word_chunks": "i32"},
            constants={
                "WORD": WORDS[word],
                "VECTOR": alignment // word,
                "ALIGNMENT": alignment,
                "BLOCK_S": block_s,
                "BLOCK_H": block_h,
                "BLOCK_W": block_w,
            },
            options={"num_warps": NUM_WARPS},
            aligned=pointers,
        )
        found.append(variant)
    return found
