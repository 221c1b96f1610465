"""The verification walk: from each root to the child that holds the target's token, while there is one.

B sequences, N nodes, S = ``max_depth`` + 1 steps. ``reference.py`` is the oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import compiled, runs_triton
from . import native

MAX_NODES = 64


def walk_samples(
    tokens: Tensor, parents: Tensor, num_nodes: Tensor, sampled: Tensor, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Follows the target's tokens down each tree.

    At node n the emitted token is ``sampled[n]``. The walk goes on to the first child of n that holds it, and
    ends where there is none or after S tokens. A token of -1, sampled or in the tree, matches nothing.

    Args:
        tokens: ``[B, N] int64``, N at most 64; -1 is a placeholder. Tokens are below 2**31.
        parents: ``[B, N] int64`` node indices, -1 for the root, which is node 0.
        num_nodes: ``[B] int64`` valid nodes; what lies past them may hold anything.
        sampled: ``[B, N] int64`` the target's token after each node.
        max_depth: upper bound of the accepted nodes.

    Returns:
        ``(path [B, S] int64, emitted [B, S] int64, num_accepted [B] int64)``: node indices from the root (0 past
        the end), emitted tokens (-1 past the end), and the draft tokens among them: ``num_accepted + 1`` tokens
        are emitted.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit together, on more than 64 nodes, and on a negative
            ``max_depth``.
    """
    if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= MAX_NODES:
        raise ValueError(f"tokens must be [B, N] with N in [1, {MAX_NODES}], got {list(tokens.shape)}")
    shapes = {"tokens": tokens.shape, "parents": tokens.shape, "num_nodes": tokens.shape[:1], "sampled": tokens.shape}
    given = {"tokens": tokens, "parents": parents, "num_nodes": num_nodes, "sampled": sampled}
    for name, tensor in given.items():
        if tensor.shape != shapes[name]:
            raise ValueError(f"{name} must be {list(shapes[name])}, got {list(tensor.shape)}")
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {tensor.dtype}")
        if tensor.device != tokens.device:
            raise ValueError(f"{name} must be on the tokens' device {tokens.device}, got {tensor.device}")
    if max_depth < 0:
        raise ValueError(f"max_depth must be at least 0, got {max_depth}")
    if runs_triton(tokens):
        from .triton_kernel import launch_walk

        return launch_walk(tokens, parents, num_nodes, sampled, max_depth)
    library = compiled(tokens)
    if library is not None:
        return native.walk_samples(library, tokens, parents, num_nodes, sampled, max_depth)
    from .reference import walk_samples_reference

    return walk_samples_reference(tokens, parents, num_nodes, sampled, max_depth)
