"""Moving small host tensors to the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(host: Tensor | Sequence[int], device: torch.device | str) -> Tensor:
    """Copies integers to ``device``; the host does not wait for the work that is queued there.

    Args:
        host: a tensor in host memory, or integers, which become ``int64``.
        device: where to.
    """
    if not isinstance(host, Tensor):
        host = torch.tensor(host, dtype=torch.int64)
    if torch.device(device).type == "cpu":
        return host
    if not host.numel():
        return host.to(device)  # nothing to copy, so nothing to wait for
    # Only from pinned memory is a copy asynchronous.
    return host.pin_memory().to(device, non_blocking=True)
