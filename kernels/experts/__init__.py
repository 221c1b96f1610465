"""Expert routing and the dual-head mixture of experts.

    normed = RMSNorm(residual);  logits = gate @ normed
    mixture = residual + sum_k w_k * down_k @ act(up_k @ normed),  w = softmax over the selected experts' logits
    contrastive = the same with signed weights from two more logits

T rows, C hidden size, E experts, K experts per token (2, or 1 where E is 1), I expert intermediate size.
``act`` is SwiGLU or GELU. ``reference.py`` is the oracle. The kernels run, Triton's on a GPU and compiled ones on a
CPU, except in float64 and where autograd would need what they do not record. On a CPU the products are a library's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import compiled, runs_triton
from ..linear import Product
from . import native, reference
from .reference import EXPERTS_PER_TOKEN, Routing

__all__ = ["EXPERTS_PER_TOKEN", "Routing", "activate", "combine", "route", "separate"]

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Rows of ``up`` per expert and intermediate dimension.
HALVES = {"swiglu": 2, "gelu": 1}


def route(
    residual: Tensor, norm_weight: Tensor, eps: float, gate: Tensor | None, num_experts: int, contrast: bool
) -> Routing:
    """Normalises the rows, and selects and weighs each row's experts.

    Args:
        residual: ``[T, C]`` float32, bfloat16, float16 or float64.
        norm_weight: ``[C]`` of the RMSNorm.
        eps: of the RMSNorm.
        gate: ``[E, C]``, or ``[E + 2, C]`` with the contrastive logits last; None where E is 1, and then its only
            expert weighs 1.
        num_experts: E.
        contrast: whether the last two rows of the gate weigh a contrastive output, ``c_max * E_max - c_min * E_min``
            with ``c = softmax`` of their logits. With two experts ``c_j`` belongs to expert j; with more, to the
            j-th most probable one.

    Returns:
        The routing. Logits are rounded to the residual's dtype, as the gate's product is.

    Raises:
        ValueError: on a shape or dtype that does not fit, or a contrast of fewer than two experts.
    """
    _check_rows("residual", residual, 2)
    hidden = residual.shape[1]
    _check("norm_weight", norm_weight, (hidden,), residual)
    if gate is None:
        if num_experts != 1 or contrast:
            raise ValueError(
                f"route without a gate takes one expert and no contrast, got {num_experts} experts, contrast {contrast}"
            )
    else:
        least = EXPERTS_PER_TOKEN if contrast else 1
        if num_experts < least:
            raise ValueError(f"num_experts must be at least {least} with contrast {contrast}, got {num_experts}")
        _check("gate", gate, (num_experts + (2 if contrast else 0), hidden), residual)
    if _launches(residual, norm_weight, gate):
        from .triton_kernel import route as launch

        return launch(residual, norm_weight, eps, gate, num_experts, contrast)
    library = None if _autocast(residual) else compiled(residual, norm_weight, gate)
    if library is not None:
        return native.route(library, residual, norm_weight, eps, gate, num_experts, contrast)
    return reference.route(residual, norm_weight, eps, gate, num_experts, contrast)


def activate(
    normed: Tensor,
    up: Tensor,
    routing: Routing,
    num_experts: int,
    activation: str,
    product: Product | None = None,
) -> Tensor:
    """Computes what the experts' last matrices read.

    Args:
        normed: ``[T, C]`` float32, bfloat16, float16 or float64.
        up: ``[E * I, C]`` for GELU, the experts one after the other; ``[2 * E * I, C]`` for SwiGLU: those rows of
            the gate projections, then those of the up projections.
        routing: of the rows.
        num_experts: E.
        activation: ``swiglu`` or ``gelu`` (exact).
        product: who multiplies by ``up`` where no kernel of ours does; ``F.linear`` by default.

    Returns:
        ``[T, E, I]``; what an expert would give for rows that did not select it is undefined.

    Raises:
        ValueError: on a shape, dtype or activation that does not fit.
    """
    _check_rows("normed", normed, 2)
    if activation not in HALVES:
        raise ValueError(f"activation must be one of {', '.join(HALVES)}, got {activation!r}")
    parts = HALVES[activation] * num_experts
    if up.shape[0] % parts:
        raise ValueError(f"up must have a multiple of {parts} rows for {num_experts} experts, got {up.shape[0]}")
    _check("up", up, (up.shape[0], normed.shape[1]), normed)
    _check_routing(routing, normed.shape[0], num_experts)
    if _launches(normed, up):
        from .triton_kernel import activate as launch

        return launch(normed, up, routing, num_experts, HALVES[activation])
    library = None if _autocast(normed) else compiled(normed, up)
    if library is not None:
        return native.activate(library, normed, up, num_experts, activation, product)
    return reference.activate(normed, up, num_experts, activation, product)


def combine(
    activations: Tensor,
    down: Tensor,
    routing: Routing,
    residual: Tensor,
    contrast: bool,
    product: Product | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Computes the mixture and, from the same read of ``down``, the contrastive output.

    Args:
        activations: ``[T, E, I]`` from ``activate``.
        down: ``[C, E * I]``.
        routing: of the rows.
        residual: ``[T, C]``, added to both.
        contrast: whether to compute the contrastive output.
        product: who multiplies by ``down`` where no kernel of ours does; ``F.linear`` by default.

    Returns:
        ``(mixture [T, C], contrastive [T, C] or None)``.

    Raises:
        ValueError: on a shape or dtype that does not fit, or if the routing has no contrast weights.
    """
    _check_product(activations, down, routing, residual)
    if contrast and routing.contrast is None:
        raise ValueError("combine cannot contrast: the routing has no contrast weights; route with contrast=True")
    if _launches(activations, down, residual, routing.weights):
        from .triton_kernel import combine as launch

        return launch(activations, down, routing, residual, contrast)
    library = None if _autocast(activations) else compiled(activations, down, residual, routing.weights)
    if library is not None:
        return native.combine(library, activations, down, routing, residual, contrast, product)
    return reference.combine(activations, down, routing, residual, contrast, product)


def separate(activations: Tensor, down: Tensor, routing: Routing, residual: Tensor) -> Tensor:
    """Computes the selected experts' own features, unmixed.

    Args:
        activations: ``[T, E, I]`` from ``activate``.
        down: ``[C, E * I]``.
        routing: of the rows.
        residual: ``[T, C]``, added to each.

    Returns:
        ``[T, K, C]``, in the order of ``routing.experts``.

    Raises:
        ValueError: on a shape or dtype that does not fit.
    """
    _check_product(activations, down, routing, residual)
    if _launches(activations, down, residual):
        from .triton_kernel import separate as launch

        return launch(activations, down, routing, residual)
    return reference.separate(activations, down, routing, residual)


def _launches(first: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels run: not where gradients are wanted, which they would silently lose."""
    if not runs_triton(first) or first.dtype not in KERNEL_DTYPES or _autocast(first):
        return False
    return not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (first, *others)))


def _autocast(tensor: Tensor) -> bool:
    """Whether dtypes may differ: PyTorch then casts as it needs, which the kernels do not."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _check_rows(name: str, rows: Tensor, ndim: int) -> None:
    if rows.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {list(rows.shape)}")
    if rows.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {rows.dtype}")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Refuses what the kernels would misread: they take contiguous tensors of one dtype on one device."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if (tensor.dtype != like.dtype and not _autocast(like)) or tensor.device != like.device:
        raise ValueError(f"{name} must be {like.dtype} on {like.device}, got {tensor.dtype} on {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {list(shape)}")


def _check_routing(routing: Routing, rows: int, num_experts: int) -> None:
    shape = (rows, min(EXPERTS_PER_TOKEN, num_experts))
    if routing.experts.shape != shape:
        raise ValueError(f"routing must have experts of shape {list(shape)}, got {list(routing.experts.shape)}")


def _check_product(activations: Tensor, down: Tensor, routing: Routing, residual: Tensor) -> None:
    _check_rows("activations", activations, 3)
    rows, num_experts, width = activations.shape
    _check("down", down, (down.shape[0], num_experts * width), activations)
    if residual.shape != (rows, down.shape[0]) or residual.dtype != activations.dtype:
        raise ValueError(
            f"residual must be {activations.dtype} of shape {[rows, down.shape[0]]}, "
            f"got {residual.dtype} of shape {list(residual.shape)}"
        )
    _check_routing(routing, rows, num_experts)
