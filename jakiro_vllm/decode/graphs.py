"""The draft loop as CUDA graphs, one per batch size: a hundred small launches become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from jakiro_vllm.decode.drafter import Roots
from jakiro_vllm.tree.batch import TreeBatch

#: Batches for which a graph is kept; a batch runs in the next larger one, and beyond the last one without a graph.
BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class DraftInput:
    """All that a draft reads, apart from weights and pages.

    Attributes:
        roots: B roots.
        block_tables: ``[B, M] int32`` the head's pages.
        context_lens: ``[B] int32`` committed tokens in them.
    """

    roots: Roots
    block_tables: Tensor
    context_lens: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor, requests first."""
        return self.roots.x, self.roots.tokens, self.roots.positions, self.block_tables, self.context_lens

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> DraftInput:
        """The reverse of ``tensors``."""
        return cls(Roots(*tensors[:3]), *tensors[3:])

    @classmethod
    def empty(cls, batch: int, hidden_size: int, dtype: torch.dtype, num_pages: int, device: Any) -> DraftInput:
        """Zeros: an input that is valid, and drafts from nothing."""
        integers = torch.zeros(2, batch, dtype=torch.int64, device=device)
        x = torch.zeros(batch, hidden_size, dtype=dtype, device=device)
        tables = torch.zeros(batch, num_pages, dtype=torch.int32, device=device)
        return cls(Roots(x, *integers), tables, torch.zeros(batch, dtype=torch.int32, device=device))


class Recorder(Protocol):
    """Records what a function launches."""

    def __call__(self, function: Callable[[], TreeBatch]) -> tuple[Callable[[], None], TreeBatch]:
        """Returns a replay, and the result that each replay writes anew."""


class CUDARecorder:
    """CUDA graphs that share one memory pool, since they never run at the same time."""

    def __init__(self, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """Makes the pool.

        Args:
            around: makes the context of each recording, where several ranks record the same graph.
        """
        self.pool = torch.cuda.graph_pool_handle()
        self.around = around

    def __call__(self, function: Callable[[], TreeBatch]) -> tuple[Callable[[], None], TreeBatch]:
        """See ``Recorder``."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with self.around(), torch.cuda.graph(graph, pool=self.pool):
            trees = function()
        return graph.replay, trees


class DraftGraphs:
    """Runs drafts from persistent buffers, so that what was recorded can be replayed."""

    def __init__(
        self, draft: Callable[[DraftInput], TreeBatch], buffers: DraftInput, sizes: Sequence[int], record: Recorder
    ) -> None:
        """Records a graph per size, the largest first: the others fit into its memory.

        Args:
            draft: grows trees; only launches, whose shapes follow from its input's.
            buffers: input of the largest size, valid as it is; kept and overwritten.
            sizes: batch sizes.
            record: how to record.
        """
        self.buffers = buffers
        self.sizes = sorted(sizes)
        self.graphs: dict[int, tuple[Callable[[], None], TreeBatch]] = {}
        for size in reversed(self.sizes):
            part = DraftInput.of([buffer[:size] for buffer in buffers.tensors()])
            draft(part)  # compiles and tunes the kernels for this size, which a recording must not do
            self.graphs[size] = record(lambda part=part: draft(part))  # type: ignore[misc]

    def fits(self, batch: int) -> bool:
        """Whether there is a graph for that many requests."""
        return bool(self.sizes) and batch <= self.sizes[-1]

    def __call__(self, given: DraftInput) -> TreeBatch:
        """Replays; the result lives until the next call.

        Args:
            given: of B requests, which must fit.
        """
        batch = given.context_lens.shape[0]
        size = next(size for size in self.sizes if size >= batch)
        for buffer, tensor in zip(self.buffers.tensors(), given.tensors(), strict=True):
            buffer[:batch].copy_(tensor)
        self.buffers.context_lens[batch:size].zero_()  # padding has no context to read
        replay, trees = self.graphs[size]
        replay()
        return trees.first(batch)
