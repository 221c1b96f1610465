"""Calls the compiled kernels, ``native.cpp``; the products are a library's. See ``__init__.py`` for the arguments."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..linear import PlainProduct, Product
from ..native import DTYPES, FLOAT, INTEGER, POINTER, arguments
from . import reference
from .reference import EXPERTS_PER_TOKEN, Routing

RouteCall = arguments(
    ("residual norm gate normed experts weights contrast", POINTER),
    ("rows hidden num_experts gates dtype", INTEGER),
    ("eps", FLOAT),
)
ActivateCall = arguments(("hidden activations", POINTER), ("rows width dtype", INTEGER))
WeighCall = arguments(
    ("activations experts weights contrast weighted", POINTER),
    ("rows num_experts selected width dtype", INTEGER),
)


def route(
    library: ctypes.CDLL,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate: Tensor | None,
    num_experts: int,
    contrast: bool,
) -> Routing:
    """Normalises and routes in one pass over the rows."""
    residual = residual.contiguous()
    rows, hidden = residual.shape
    selected = min(EXPERTS_PER_TOKEN, num_experts)
    normed = torch.empty_like(residual)
    experts = torch.empty(rows, selected, dtype=torch.int64)
    weights = torch.empty(rows, selected, dtype=torch.float32)
    signed = torch.empty_like(weights) if contrast else None
    library.experts_route(
        ctypes.byref(
            RouteCall(
                *(residual.data_ptr(), norm_weight.data_ptr(), None if gate is None else gate.data_ptr()),
                *(normed.data_ptr(), experts.data_ptr(), weights.data_ptr()),
                *(None if signed is None else signed.data_ptr(), rows, hidden, num_experts),
                *(0 if gate is None else gate.shape[0], DTYPES[residual.dtype], eps),
            )
        )
    )
    return Routing(normed, experts, weights, signed)


def activate(
    library: ctypes.CDLL, normed: Tensor, up: Tensor, num_experts: int, activation: str, product: Product | None
) -> Tensor:
    """SwiGLU in one pass over the product; GELU is one operation in PyTorch already."""
    if activation != "swiglu":
        return reference.activate(normed, up, num_experts, activation, product)
    hidden = (product or PlainProduct(up))(normed).contiguous()
    rows, width = hidden.shape[0], hidden.shape[1] // 2
    activations = hidden.new_empty(rows, num_experts, width // num_experts)
    library.experts_activate(
        ctypes.byref(ActivateCall(hidden.data_ptr(), activations.data_ptr(), rows, width, DTYPES[hidden.dtype]))
    )
    return activations


def combine(
    library: ctypes.CDLL,
    activations: Tensor,
    down: Tensor,
    routing: Routing,
    residual: Tensor,
    contrast: bool,
    product: Product | None,
) -> tuple[Tensor, Tensor | None]:
    """Weighs once per output, and multiplies once.

    Raises:
        IndexError: if a row selected an expert that does not exist.
    """
    product = product or PlainProduct(down)
    rows, num_experts, width = activations.shape
    selected = routing.experts.shape[1]
    if selected == 1:  # its weight is 1
        return product(activations.flatten(1), residual), None
    kinds = 2 if contrast else 1
    weighted = activations.new_empty(kinds * rows, num_experts * width)
    activations, experts, weights = (x.contiguous() for x in (activations, routing.experts, routing.weights))
    signed = routing.contrast.contiguous() if contrast and routing.contrast is not None else None
    if library.experts_weigh(
        ctypes.byref(
            WeighCall(
                *(activations.data_ptr(), experts.data_ptr(), weights.data_ptr()),
                *(None if signed is None else signed.data_ptr(), weighted.data_ptr()),
                *(rows, num_experts, selected, width, DTYPES[activations.dtype]),
            )
        )
    ):
        raise IndexError(f"routing names experts outside [0, {num_experts})")
    if not contrast:
        return product(weighted, residual), None
    mixture, contrastive = product(weighted, residual.repeat(2, 1)).chunk(2)
    return mixture, contrastive
