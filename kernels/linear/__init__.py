"""Products with a weight that is used again and again, on a CPU.

    y = x @ weight.T + bias

oneDNN, which PyTorch brings, multiplies a few rows several times faster by a weight that lies in its own order than
``F.linear`` does by the weight as it is: 3-4 times in float32, 1.5 times in bfloat16. ``F.linear`` is the oracle.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: ``[..., I] -> [..., O]``; adds ``[..., O]``, its second argument, if there is one.
Product = Callable[..., Tensor]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PlainProduct:
    """``F.linear``, where there is nothing better."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Holds ``[O, I]`` and ``[O]`` or None."""
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """See ``PackedProduct``."""
        y = F.linear(x, self.weight, self.bias)
        return y if added is None else added + y


class PackedProduct:
    """``x @ weight.T + bias`` with a copy of the weight in oneDNN's order. Gradients do not flow through it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Packs a weight; ``pack`` tries whether that is possible.

        Args:
            weight: ``[O, I]`` in main memory.
            bias: ``[O]`` or None.
        """
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self.bias = None if bias is None else bias.detach()
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._multiply_add = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Multiplies.

        Args:
            x: ``[..., I]`` in the weight's dtype.
            added: ``[..., O]`` added to the product before it is rounded, or None.

        Returns:
            ``[..., O]``.
        """
        if added is None:
            return self._multiply(x, self.packed, self.bias, "none", [], "")
        return self._multiply_add(x, added, self.packed, self.bias, "add")


def pack(weight: Tensor, bias: Tensor | None = None) -> Product:
    """A product with a copy of the weight, packed where that can be had.

    Whether oneDNN has a kernel for a dtype depends on the processor, and PyTorch's operators for it are not documented,
    so they are tried out.

    Args:
        weight: ``[O, I]``.
        bias: ``[O]`` or None.
    """
    if weight.device.type == "cpu" and weight.dtype in DTYPES and torch.backends.mkldnn.is_available():
        try:
            with torch.inference_mode(False), torch.no_grad():
                product = PackedProduct(weight, bias)
                if _multiplies(product, weight, bias):
                    return product
        except (RuntimeError, AttributeError):
            pass
    return PlainProduct(weight, bias)


def _multiplies(product: Product, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a product is one; only to tell it from anything else."""
    rows = torch.linspace(-1, 1, 2 * weight.shape[1]).view(2, -1).to(weight.dtype)
    expected = F.linear(rows, weight, bias)
    tolerance = torch.finfo(weight.dtype).eps ** 0.5 * max(1.0, float(expected.abs().max()))
    found = product(rows), product(rows, expected)
    return all(torch.allclose(y, times * expected, rtol=0, atol=tolerance) for times, y in enumerate(found, 1))
