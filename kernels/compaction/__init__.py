"""KV compaction: the accepted rows of every tree move to where the text goes on, in all layers at once.

A step's rows lie in slots in row order. Of a request's tree the i-th accepted node is row ``path[i] >= i``, and
its token's position belongs to row i, so its keys and values move from one slot to the other:

    pages[slot(row_start + i)] <- pages[slot(row_start + path[i])],  i = 1 .. num_accepted

all reads before all writes, since one row's destination may be another one's source. ``reference.py`` is the
oracle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch import runs_triton

MAX_STEPS = 65
MAX_SLOTS = 2**31


@dataclass(frozen=True)
class LayerPages:
    """The KV pages of L layers, and where they lie; made once by ``of``, valid while the pages stay where they are.

    Attributes:
        pages: per layer ``[P, G, B, E]``; holding them keeps the addresses theirs.
        table: ``[L, 7] int64`` on the pages' device: address, strides of page, head and slot, heads, slots per
            page, size of a row. Strides and sizes are in words.
        word: bytes that are copied at a time, 1, 2 or 4.
        alignment: bytes, at most 16, that divide every address and stride and the size of a row.
        max_heads: largest number of heads of a layer.
        max_words: largest row of a layer and head.
    """

    pages: tuple[Tensor, ...]
    table: Tensor
    word: int
    alignment: int
    max_heads: int
    max_words: int

    @classmethod
    def of(cls, pages: Sequence[Tensor]) -> LayerPages:
        """Describes the pages of a group of layers that share their slots.

        P pages, G KV heads, B slots per page, E elements of a slot's key and value. Keys and values in tensors of
        their own are two layers.

        Args:
            pages: per layer ``[P, G, B, E]`` of any dtype and strides, the last dimension contiguous. Layers may
                differ in all but device and element size.

        Raises:
            ValueError: without layers, or on shapes, strides, devices or element sizes that are not as above.
        """
        if not pages:
            raise ValueError("LayerPages needs the pages of at least one layer, got none")
        first = pages[0]
        for i, tensor in enumerate(pages):
            if tensor.ndim != 4 or not tensor.numel():
                raise ValueError(f"pages of layer {i} must be [P, G, B, E] and not empty, got {list(tensor.shape)}")
            if tensor.stride(3) != 1 and tensor.shape[3] > 1:
                raise ValueError(f"pages of layer {i} must be contiguous in E, got strides {list(tensor.stride())}")
            if tensor.element_size() != first.element_size():
                raise ValueError(
                    f"pages of all layers must have elements of one size, got {tensor.element_size()} bytes in layer "
                    f"{i} and {first.element_size()} in layer 0"
                )
            if tensor.device != first.device:
                raise ValueError(f"pages of all layers must be on {first.device}, got {tensor.device} in layer {i}")
            if tensor.shape[0] * tensor.shape[2] >= MAX_SLOTS:
                raise ValueError(f"pages must hold fewer than 2**31 slots, got {tensor.shape[0] * tensor.shape[2]}")

        rows = [_bytes_of(tensor) for tensor in pages]
        alignment = math.gcd(16, *(value for _, row in rows for value in row))
        word = min(4, alignment)
        table = [
            [address, *(size // word for size in strides), tensor.shape[1], tensor.shape[2], width // word]
            for tensor, (address, (_, *strides, width)) in zip(pages, rows, strict=True)
        ]
        return cls(
            pages=tuple(pages),
            table=torch.tensor(table, dtype=torch.int64, device=first.device),
            word=word,
            alignment=alignment,
            max_heads=max(tensor.shape[1] for tensor in pages),
            max_words=max(row[-1] for row in table),
        )


def compact(pages: LayerPages, slot_mapping: Tensor, row_starts: Tensor, path: Tensor, num_accepted: Tensor) -> None:
    """Moves the accepted rows' keys and values, bit for bit, in every layer.

    T rows, B requests, S the longest path. Row r lies in slot ``slot_mapping[r]``: page ``slot // B``, offset
    ``slot % B``, B being a layer's slots per page. A move from or to a negative slot is left out.

    Args:
        pages: of all layers, written in place.
        slot_mapping: ``[T] int64``, different for all rows, negative ones aside.
        row_starts: ``[B] int32 | int64`` row of each request's root.
        path: ``[B, S] int64`` accepted nodes from the root, increasing, S at most 65; entries past
            ``num_accepted`` may hold anything.
        num_accepted: ``[B] int64`` accepted nodes below the root; 0 moves nothing, and reads no slot.

    Raises:
        ValueError: on shapes, dtypes or devices that are not as above.
    """
    if path.ndim != 2 or not 1 <= path.shape[1] <= MAX_STEPS:
        raise ValueError(f"path must be [B, S] with S in [1, {MAX_STEPS}], got {list(path.shape)}")
    batch = path.shape[:1]
    if slot_mapping.ndim != 1:
        raise ValueError(f"slot_mapping must be [T], got {list(slot_mapping.shape)}")
    if row_starts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"row_starts must be int32 or int64, got {row_starts.dtype}")
    given = {"slot_mapping": slot_mapping, "row_starts": row_starts, "path": path, "num_accepted": num_accepted}
    for name, tensor in given.items():
        if name in ("row_starts", "num_accepted") and tensor.shape != batch:
            raise ValueError(f"{name} must be {list(batch)}, got {list(tensor.shape)}")
        if name != "row_starts" and tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {tensor.dtype}")
        if tensor.device != pages.table.device:
            raise ValueError(f"{name} must be on the pages' device {pages.table.device}, got {tensor.device}")
    if runs_triton(pages.table):
        from .triton_kernel import launch_compact

        launch_compact(pages, slot_mapping, row_starts, path, num_accepted)
    else:
        from .reference import compact_reference

        compact_reference(pages.pages, slot_mapping, row_starts, path, num_accepted)


def _bytes_of(pages: Tensor) -> tuple[int, tuple[int, int, int, int, int]]:
    """A layer's address, and what must be multiples of a word: it, the strides of P, G and B, and a row's size."""
    size = pages.element_size()
    # The stride of a dimension of one is never used and may be odd.
    page, head, slot = (pages.stride(i) * size if pages.shape[i] > 1 else 0 for i in range(3))
    return pages.data_ptr(), (pages.data_ptr(), page, head, slot, pages.shape[3] * size)
