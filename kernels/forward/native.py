"""Calls the compiled kernels, ``native.cpp``; see ``__init__.py``."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..experts.native import ActivateCall, RouteCall, WeighCall
from ..experts.reference import EXPERTS_PER_TOKEN
from ..native import DTYPES, INTEGER, POINTER, arguments
from ..rotary import native as rotary

if TYPE_CHECKING:
    from . import HeadWeights

Product = arguments(("packed bias", POINTER), ("inputs outputs", INTEGER))
ProjectCall = arguments(
    ("fuse qkv", Product),
    ("embeds features x projected place", POINTER),
    ("rows hidden threads dtype", INTEGER),
)
CompleteCall = arguments(
    ("output up down", Product),
    ("attended x residual route activate weigh normed hidden weighted outputs", POINTER),
    ("rows kinds threads dtype", INTEGER),
)


@dataclass(frozen=True)
class Work:
    """What a number of rows works in; ``call`` is complete but for what differs from forward to forward.

    Attributes:
        call: of ``forward_complete``.
        held: tensors and structures that it points to.
    """

    call: Any
    held: tuple[Any, ...]


class FewRows:
    """A head's packed weights and the memory that its forwards work in, which are for one thread at a time."""

    def __init__(self, library: ctypes.CDLL, weights: HeadWeights) -> None:
        """Packs; see ``pack``."""
        self.library = library
        self.dtype = weights.fuse.dtype
        self.num_heads, self.num_experts = weights.num_heads, weights.num_experts
        self.hidden, self.width = weights.down.shape
        self.norm, self.gate, self.eps = weights.norm.detach(), weights.gate, weights.eps
        self._held: list[Tensor | None] = []
        self._fuse = self._pack(weights.fuse, weights.fuse_bias)
        self._qkv, self._output, self._up, self._down = map(
            self._pack, (weights.qkv, weights.output, weights.up, weights.down)
        )
        self._work: dict[tuple[int, bool], Work] = {}

    def project(
        self, embeds: Tensor, features: Tensor, positions: Tensor, table: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All that comes before attention; B sequences, K rows of each.

        Args:
            embeds: ``[B * K, C]``.
            features: ``[B * K, C]``.
            positions: ``[B * K] int64``.
            table: ``[P, D] float32`` cosines and sines.
            keys: ``[B, K, G, D]``, written; ``rotary.native.lies_flat`` must hold.
            values: ``[B, K, G, D]``, likewise.

        Returns:
            ``(x [B * K, C], query [B * K, H, D])``.

        Raises:
            IndexError: if a position has no row in the table.
        """
        rows, dtype = embeds.shape[0], DTYPES[self.dtype]
        embeds, features, positions = embeds.contiguous(), features.contiguous(), positions.contiguous()
        x = torch.empty(rows, self.hidden, dtype=self.dtype)
        projected = torch.empty(rows, self._qkv.outputs, dtype=self.dtype)
        query = torch.empty(rows, self.num_heads, table.shape[1], dtype=self.dtype)
        place = rotary.place_call(projected, positions, table, query, keys, values)
        call = ProjectCall(
            *(self._fuse, self._qkv, embeds.data_ptr(), features.data_ptr(), x.data_ptr(), projected.data_ptr()),
            *(ctypes.addressof(place), rows, self.hidden, torch.get_num_threads(), dtype),
        )
        rotary.check(self.library.forward_project(ctypes.byref(call)))
        return x, query

    def complete(self, x: Tensor, attended: Tensor, contrastive: bool) -> tuple[Tensor, Tensor | None]:
        """All that comes after attention.

        Args:
            x: ``[T, C]``.
            attended: ``[T, H * D]``.
            contrastive: whether to compute the contrastive output, too.

        Returns:
            ``(mixture [T, C], contrastive [T, C] or None)``.
        """
        rows = x.shape[0]
        x, attended = x.contiguous(), attended.contiguous()
        call = self._work_for(rows, contrastive).call
        outputs = torch.empty(2 if contrastive else 1, rows, self.hidden, dtype=self.dtype)
        call.x, call.attended, call.outputs = x.data_ptr(), attended.data_ptr(), outputs.data_ptr()
        call.threads = torch.get_num_threads()
        self.library.forward_complete(ctypes.byref(call))
        return outputs[0], outputs[1] if contrastive else None

    def _pack(self, weight: Tensor, bias: Tensor | None = None) -> Any:
        """``[O, I]`` in panels ``[O / P, I, P]``, filled up with zeros."""
        panel = self.library.forward_panel()
        outputs, inputs = weight.shape
        padded = F.pad(weight.detach(), (0, 0, 0, -outputs % panel))
        packed = padded.view(-1, panel, inputs).transpose(1, 2).contiguous()
        bias = None if bias is None else bias.detach().contiguous()
        self._held += [packed, bias]
        return Product(packed.data_ptr(), None if bias is None else bias.data_ptr(), inputs, outputs)

    def _work_for(self, rows: int, contrastive: bool) -> Work:
        key = rows, contrastive
        if key not in self._work:
            self._work[key] = self._make_work(rows, contrastive)
        return self._work[key]

    def _make_work(self, rows: int, contrastive: bool) -> Work:
        dtype, code, width = self.dtype, DTYPES[self.dtype], self.width
        selected, kinds = min(EXPERTS_PER_TOKEN, self.num_experts), 2 if contrastive else 1
        residual, normed = torch.empty(2, rows, self.hidden, dtype=dtype).unbind()
        experts = torch.empty(rows, selected, dtype=torch.int64)
        weights, signed = torch.empty(2, rows, selected).unbind()
        hidden = torch.empty(rows, 2 * width, dtype=dtype)
        activations = torch.empty(rows, width, dtype=dtype)
        weighted = activations if selected == 1 else torch.empty(kinds * rows, width, dtype=dtype)
        gates, shares = 0 if self.gate is None else self.gate.shape[0], signed.data_ptr() if contrastive else None
        route = RouteCall(
            *(residual.data_ptr(), self.norm.data_ptr(), None if self.gate is None else self.gate.data_ptr()),
            *(normed.data_ptr(), experts.data_ptr(), weights.data_ptr(), shares),
            *(rows, self.hidden, self.num_experts, gates, code, self.eps),
        )
        activate = ActivateCall(hidden.data_ptr(), activations.data_ptr(), rows, width, code)
        weigh = None
        if selected > 1:
            weigh = WeighCall(
                *(activations.data_ptr(), experts.data_ptr(), weights.data_ptr(), shares, weighted.data_ptr()),
                *(rows, self.num_experts, selected, width // self.num_experts, code),
            )
        call = CompleteCall(
            *(self._output, self._up, self._down, None, None, residual.data_ptr()),
            *(ctypes.addressof(route), ctypes.addressof(activate), None if weigh is None else ctypes.addressof(weigh)),
            *(normed.data_ptr(), hidden.data_ptr(), weighted.data_ptr(), None, rows, kinds, 1, code),
        )
        tensors = residual, normed, experts, weights, signed, hidden, activations, weighted
        return Work(call, (*tensors, route, activate, weigh))
