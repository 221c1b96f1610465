"""The processes that train one head together: under torchrun, under Ray Train, or one alone.

Whoever starts them initialises ``torch.distributed``; the code that trains only asks who it is and adds up.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

#: The first worker may prepare for days while the others wait at a barrier; a dead one is noticed by its launcher.
_PATIENCE = datetime.timedelta(days=14)


@dataclass(frozen=True)
class Workers:
    """Who this process is.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Workers:
        """From ``torch.distributed`` if it is initialised, else the only one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_first(self) -> bool:
        """Whether this one writes what they all share."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this process computes: its GPU, or the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their sums over all workers, in one exchange.

        Args:
            tensors: of any shapes, of one dtype and device; the same ones in every worker.
        """
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def agree(self, mine: bool) -> bool:
        """Whether every worker says so; each gets the same answer."""
        votes = torch.tensor([float(mine)], device=self._exchange_device())
        self.sum_([votes])
        return votes.item() == self.size

    def barrier(self) -> None:
        """Waits for all."""
        self.agree(True)

    def _exchange_device(self) -> torch.device:
        """Where a small tensor may lie to be exchanged: NCCL takes none on the CPU."""
        nccl_only = self.size > 1 and dist.get_backend() == "nccl"
        return self.device if nccl_only else torch.device("cpu")


@contextmanager
def join_workers() -> Iterator[Workers]:
    """Joins the other processes if torchrun started this one.

    Yields:
        Who this process is. Its GPU is then the current one.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if not launched:
        yield Workers.current()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    try:
        yield Workers.current()
    finally:
        dist.destroy_process_group()
