"""KV compaction in batched PyTorch: reads all rows of a layer, then writes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Bytes are copied, whatever they mean: not every operator knows every float8.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compact_reference(
    pages: Sequence[Tensor], slot_mapping: Tensor, row_starts: Tensor, path: Tensor, num_accepted: Tensor
) -> None:
    """See ``compact`` for the arguments; ``pages`` are those of each layer."""
    order = torch.arange(path.shape[1], device=path.device)
    requests, steps = ((order > 0) & (order <= num_accepted.unsqueeze(1)) & (path != order)).nonzero(as_tuple=True)
    if not requests.numel():
        return
    first = row_starts[requests].to(torch.int64)
    sources = slot_mapping[first + path[requests, steps]]  # [M]
    destinations = slot_mapping[first + steps]  # [M]
    known = (sources >= 0) & (destinations >= 0)
    sources, destinations = sources[known], destinations[known]
    for layer in pages:
        block = layer.shape[2]
        raw = layer.view(INTEGERS[layer.element_size()])
        moved = raw[sources // block, :, sources % block]  # [M, G, E], a copy
        raw[destinations // block, :, destinations % block] = moved
