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
    _check(tokens, parents, num_nodes, max_depth, sampled=sampled)
    if runs_triton(tokens):
        from .triton_kernel import launch_walk

        return launch_walk(tokens, parents, num_nodes, sampled, max_depth)
    library = compiled(tokens)
    if library is not None:
        return native.walk_samples(library, tokens, parents, num_nodes, sampled, max_depth)
    from .reference import walk_samples_reference

    return walk_samples_reference(tokens, parents, num_nodes, sampled, max_depth)


def walk_greedy(
    tokens: Tensor, parents: Tensor, num_nodes: Tensor, logits: Tensor, starts: Tensor, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The walk of ``walk_samples`` where the target's token is that of the highest logit, on a CPU.

    Only the rows that a walk comes by are looked at. Of equal logits the lower token is taken, and a NaN is higher
    than all numbers, as ``argmax`` has it.

    Args:
        tokens: ``[B, N] int64``.
        parents: ``[B, N] int64``.
        num_nodes: ``[B] int64``.
        logits: ``[L, V]`` of any floating dtype; node n of tree b has row ``starts[b] + n``.
        starts: ``[B] int64``.
        max_depth: upper bound of the accepted nodes.

    Returns:
        As ``walk_samples``.

    Raises:
        ValueError: as ``walk_samples``, or if logits are not ``[L, V]``.
        IndexError: if a tree's rows are not among the logits.
    """
    _check(tokens, parents, num_nodes, max_depth, starts=starts)
    if logits.ndim != 2 or not logits.is_floating_point() or not logits.shape[1]:
        raise ValueError(f"logits must be [L, V] of a floating dtype, got {logits.dtype} {list(logits.shape)}")
    library = compiled(logits) if logits.stride(1) == 1 or logits.shape[1] == 1 else None
    if library is not None:
        return native.walk_greedy(library, tokens, parents, num_nodes, logits, starts, max_depth)
    from .reference import walk_greedy_reference

    return walk_greedy_reference(tokens, parents, num_nodes, logits, starts, max_depth)


def _check(
    tokens: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    max_depth: int,
    sampled: Tensor | None = None,
    starts: Tensor | None = None,
) -> None:
    if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= MAX_NODES:
        raise ValueError(f"tokens must be [B, N] with N in [1, {MAX_NODES}], got {list(tokens.shape)}")
    of_nodes, of_trees = tokens.shape, tokens.shape[:1]
    given = {
        "tokens": (tokens, of_nodes),
        "parents": (parents, of_nodes),
        "num_nodes": (num_nodes, of_trees),
        "sampled": (sampled, of_nodes),
        "starts": (starts, of_trees),
    }
    for name, (tensor, shape) in given.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {tensor.dtype}")
        if tensor.device != tokens.device:
            raise ValueError(f"{name} must be on the tokens' device {tokens.device}, got {tensor.device}")
    if max_depth < 0:
        raise ValueError(f"max_depth must be at least 0, got {max_depth}")
