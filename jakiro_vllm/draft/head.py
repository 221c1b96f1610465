"""The Jakiro draft head: one decoder layer whose MLP is a mixture of experts.

Shapes: T tokens, C hidden size, H query heads, G KV heads, D head size, E experts, K experts per token,
I expert intermediate size, V vocabulary.

Source of the formulas: "Jakiro: Boosting Speculative Decoding with Decoupled Multi-Head via MoE",
arXiv 2502.06282.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jakiro_vllm.kernels import forward as few_rows
from jakiro_vllm.kernels.experts import HALVES, Routing, activate, combine, route, separate
from jakiro_vllm.kernels.linear import Product, pack
from jakiro_vllm.kernels.rotary import place, rotate

#: ``attend(query [T, H, D]) -> [T, H, D]``; whoever calls the head knows where keys and values live.
Attend = Callable[[Tensor], Tensor]
#: Adds up a tensor of all ranks, each of which has other attention heads; may overwrite its argument.
SumOverRanks = Callable[[Tensor], Tensor]


class Variant(StrEnum):
    """Which MLP the head has.

    ``JAKIRO``: SwiGLU experts, a mixture and a contrastive output. ``JAKIRO_STAR``: GELU experts, trained
    on their gated sum. ``DENSE``: one SwiGLU MLP (EAGLE-1/2), the baseline.
    """

    JAKIRO = "jakiro"
    JAKIRO_STAR = "jakiro_star"
    DENSE = "dense"


@dataclass(frozen=True)
class HeadSpec:
    """Every size of a head.

    Attributes:
        variant: which MLP.
        hidden_size: C, equal to the target's.
        num_heads, num_kv_heads, head_dim: H, G and D of its attention.
        intermediate_size: I of one expert.
        num_experts: E; 1 for ``DENSE``.
        fc_bias: whether ``fc`` has a bias.
        rms_norm_eps: of the only norm.
        rope: keyword arguments of ``LlamaConfig`` that fix the rotary embedding.
    """

    variant: Variant
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_experts: int
    fc_bias: bool
    rms_norm_eps: float
    rope: LlamaConfig

    @property
    def num_gates(self) -> int:
        """Rows of the gate: E routing logits, and two contrastive ones for ``JAKIRO``."""
        return {Variant.JAKIRO: self.num_experts + 2, Variant.JAKIRO_STAR: self.num_experts, Variant.DENSE: 0}[
            self.variant
        ]

    @property
    def has_contrast(self) -> bool:
        """Whether one forward also predicts the token after the next."""
        return self.variant is Variant.JAKIRO


def _unless_training(product: Product | None) -> Product | None:
    """A product that gradients do not flow through, where none are wanted."""
    return None if torch.is_grad_enabled() else product


class Linear(nn.Linear):
    """``nn.Linear`` that may keep a packed copy of its weight for inference on a CPU; see ``DraftHead.pack``."""

    packed: Product | None = None

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """``[..., I] -> [..., O]``, to which ``added [..., O]`` is added."""
        product = _unless_training(self.packed)
        if product is not None:
            return product(x, added)
        y = F.linear(x, self.weight, self.bias)
        return y if added is None else added + y


class Experts(nn.Module):
    """Gate and experts, with the experts' matrices side by side so that each is read once."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        width = spec.num_experts * spec.intermediate_size
        self.activation = "gelu" if spec.variant is Variant.JAKIRO_STAR else "swiglu"
        self.gate = Linear(spec.hidden_size, spec.num_gates, bias=False) if spec.num_gates else None
        self.up = Linear(spec.hidden_size, HALVES[self.activation] * width, bias=False)
        self.down = Linear(width, spec.hidden_size, bias=False)


@dataclass
class HeadOutput:
    """One forward of the head, from which each reader takes only what it needs.

    Attributes:
        head: the head it came from.
        residual: ``[..., C]`` what the experts' outputs are added to.
        activations: ``[T, E, I]`` what the experts' last matrices read, for all rows.
        routing: of all rows.
        contrastive: whether ``contrast`` will be asked for: both outputs then come from one read of the weights.
    """

    head: DraftHead
    residual: Tensor
    activations: Tensor
    routing: Routing
    contrastive: bool

    @cached_property
    def _combined(self) -> tuple[Tensor, Tensor | None]:
        rows = self.residual.flatten(0, -2)
        down = self.head.experts.down
        return combine(self.activations, down.weight, self.routing, rows, self.contrastive, product=down.forward)

    def feature(self) -> Tensor:
        """``[..., C]`` the mixture: the next feature, whose logits predict the next token."""
        return self._combined[0].view_as(self.residual)

    def contrast(self) -> Tensor:
        """``[..., C]`` the contrastive feature, whose logits predict the token after the next.

        ``c_max * E_max(h) - c_min * E_min(h)`` with ``c = softmax(gate[E:])``. With two experts ``c_j``
        belongs to expert j; with more, to the j-th most probable one.
        """
        contrast = self._combined[1]
        assert contrast is not None, "asked of a forward that was not contrastive"
        return contrast.view_as(self.residual)

    def attenuated(self, share: float) -> HeadOutput:
        """The same output, of whose gradient only ``share`` reaches what it was computed from; for training.

        Norm, gate and the experts' last matrices, which it is computed with, get their gradients in full.
        """
        residual, activations = (x.detach() + share * (x - x.detach()) for x in (self.residual, self.activations))
        return HeadOutput(self.head, residual, activations, self.head.route(residual.flatten(0, -2)), self.contrastive)

    def expert_features(self) -> tuple[Tensor, Tensor]:
        """The selected experts' own features, unmixed.

        Returns:
            ``([..., K, C], [..., K] float32)``: features and log gate weights, the most probable expert first.
            ``K`` is 1 for ``DENSE``.
        """
        rows = self.residual.flatten(0, -2)
        own = separate(self.activations, self.head.experts.down.weight, self.routing, rows)
        shape = self.residual.shape[:-1]
        return own.unflatten(0, shape), self.routing.weights.log().unflatten(0, shape)


@dataclass(frozen=True)
class Mixture:
    """What one forward gave where nothing but mixtures was asked for; see ``HeadOutput``."""

    mixture: Tensor
    contrastive: Tensor | None

    def feature(self) -> Tensor:
        """``[T, C]`` the next feature."""
        return self.mixture

    def contrast(self) -> Tensor:
        """``[T, C]`` the contrastive feature."""
        assert self.contrastive is not None, "asked of a forward that was not contrastive"
        return self.contrastive


def tabulate_rotary(rope: LlamaConfig, positions: Tensor) -> Tensor:
    """``[P, D] float32`` cosines and sines of ``[P] int64`` positions."""
    rotary = LlamaRotaryEmbedding(rope).to(positions.device)
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32, device=positions.device), positions.unsqueeze(0))
    half = cos.shape[-1] // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)


class DraftHead(nn.Module):
    """Fuses token and feature, attends, and runs the experts.

    ``x_t = fc([emb(token_{t+1}) ; f_t])``, ``h = x + Attn(x)``, ``out = h + MoE(RMSNorm(h))``. There is
    neither an input norm nor a final one. Embedding and LM head are the target's and are not held here.
    """

    def __init__(self, spec: HeadSpec, sum_over_ranks: SumOverRanks | None = None) -> None:
        """Builds a head with random weights.

        Args:
            spec: its sizes; of a part of a head, that part's.
            sum_over_ranks: for a part of a head, see ``shard``.
        """
        super().__init__()
        self.spec = spec
        self.sum_over_ranks = sum_over_ranks
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.fc = Linear(2 * spec.hidden_size, spec.hidden_size, bias=spec.fc_bias)
        self.q_proj = Linear(spec.hidden_size, q_size, bias=False)
        self.kv_proj = Linear(spec.hidden_size, 2 * kv_size, bias=False)
        self.o_proj = Linear(q_size, spec.hidden_size, bias=False)
        self.norm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.experts = Experts(spec)
        #: Queries, keys and values in one product, and keys and values; None unless packed.
        self.packed_qkv: Product | None = None
        self.packed_kv: Product | None = None
        #: Forwards of few rows; None unless packed, and where that would not pay.
        self.few_rows: few_rows.FewRows | None = None
        self.rotary_table: Tensor
        self.register_buffer("rotary_table", torch.empty(0), persistent=False)

    def prepare_positions(self, max_position: int) -> None:
        """Tabulates the rotary embedding for positions below ``max_position``."""
        self.rotary_table = tabulate_rotary(self.spec.rope, torch.arange(max_position, device=self.fc.weight.device))

    def pack(self) -> None:
        """Packs copies of the weights for faster inference on a CPU, where that can be done.

        To be called once the weights are what they will be. Without gradients, the copies are used.
        """
        for linear in (self.fc, self.o_proj, self.experts.up, self.experts.down):
            linear.packed = pack(linear.weight, linear.bias)
        spec, experts = self.spec, self.experts
        qkv = torch.cat([self.q_proj.weight, self.kv_proj.weight])
        self.packed_qkv = pack(qkv)
        self.packed_kv = pack(self.kv_proj.weight)
        if self.sum_over_ranks is None and experts.activation == "swiglu":
            self.few_rows = few_rows.pack(
                few_rows.HeadWeights(
                    fuse=self.fc.weight,
                    fuse_bias=self.fc.bias,
                    qkv=qkv,
                    output=self.o_proj.weight,
                    norm=self.norm.weight,
                    eps=spec.rms_norm_eps,
                    gate=None if experts.gate is None else experts.gate.weight,
                    up=experts.up.weight,
                    down=experts.down.weight,
                    num_heads=spec.num_heads,
                    num_experts=spec.num_experts,
                )
            )

    def fuse(self, token_embeds: Tensor, features: Tensor) -> Tensor:
        """``x_t = fc([emb(token_{t+1}) ; f_t])``: ``[..., C], [..., C] -> [..., C]``."""
        return self.fc.forward(torch.cat([token_embeds, features], dim=-1))

    def queries(self, x: Tensor, positions: Tensor) -> Tensor:
        """``[..., C], [...] int64 -> [..., H, D]``: what attends."""
        heads = (self.spec.num_heads, self.spec.head_dim)
        product = _unless_training(self.packed_qkv)
        projected = self.q_proj(x) if product is None else product(x)[..., : heads[0] * heads[1]]
        return rotate(projected.unflatten(-1, heads), positions, self.rotary_table)

    def keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``[..., C], [...] int64 -> ([..., G, D], [..., G, D])``: what later tokens attend to."""
        product = _unless_training(self.packed_kv) or self.kv_proj.forward
        projected = product(x)
        k, v = projected.unflatten(-1, (2, self.spec.num_kv_heads, self.spec.head_dim)).unbind(-3)
        return rotate(k, positions, self.rotary_table), v

    def project(self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries, and keys and values written where they belong.

        Args:
            x: ``[B * K, C]`` from ``fuse``.
            positions: ``[B * K] int64``.
            keys: ``[B, K, G, D]``, written.
            values: ``[B, K, G, D]``, written.

        Returns:
            ``[B * K, H, D]``.
        """
        product = _unless_training(self.packed_qkv)
        if product is not None:
            return place(product(x), positions, self.rotary_table, self.spec.num_heads, keys, values)
        new_keys, new_values = self.keys_values(x, positions)
        keys.copy_(new_keys.view_as(keys))
        values.copy_(new_values.view_as(values))
        return self.queries(x, positions)

    def begin(
        self, token_embeds: Tensor, features: Tensor, positions: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``fuse`` and ``project``: all that comes before attention.

        Args:
            token_embeds: ``[B * K, C]``.
            features: ``[B * K, C]``.
            positions: ``[B * K] int64``.
            keys: ``[B, K, G, D]``, written.
            values: ``[B, K, G, D]``, written.

        Returns:
            ``(x [B * K, C], query [B * K, H, D])``.
        """
        few = self._if_few(features)
        if few is not None:
            return few.project(token_embeds, features, positions, self.rotary_table, keys, values)
        x = self.fuse(token_embeds, features)
        return x, self.project(x, positions, keys, values)

    def observe(self, token_embeds: Tensor, features: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``fuse`` and ``keys_values``: all that committed tokens need.

        Args:
            token_embeds: ``[T, C]``.
            features: ``[T, C]``.
            positions: ``[T] int64``.

        Returns:
            ``(x [T, C], keys [T, G, D], values [T, G, D])``.
        """
        few = self._if_few(features)
        if few is None:
            x = self.fuse(token_embeds, features)
            return x, *self.keys_values(x, positions)
        shape = features.shape[0], 1, self.spec.num_kv_heads, self.spec.head_dim
        keys, values = features.new_empty(2, *shape).unbind()
        x, _ = few.project(token_embeds, features, positions, self.rotary_table, keys, values)
        return x, keys.squeeze(1), values.squeeze(1)

    def mix(self, x: Tensor, attended: Tensor, contrastive: bool = False) -> HeadOutput | Mixture:
        """As ``complete``, where only mixtures will be asked for; rows have one dimension."""
        few = self._if_few(x)
        if few is None:
            return self.complete(x, attended, contrastive)
        return Mixture(*few.complete(x, attended.flatten(-2), contrastive))

    def _if_few(self, rows: Tensor) -> few_rows.FewRows | None:
        few = self.few_rows
        if few is None or torch.is_grad_enabled() or rows.dtype != few.dtype:
            return None
        return few if rows.shape[0] <= few_rows.MAX_ROWS[few.dtype] else None

    def finish(self, x: Tensor, positions: Tensor, attend: Attend, contrastive: bool = False) -> HeadOutput:
        """Attends and runs the experts, for the rows whose output is wanted.

        A head of one layer needs no output of the tokens before them, only their keys and values.

        Args:
            x: ``[..., C]`` from ``fuse``.
            positions: ``[...] int64``.
            attend: ``[..., H, D] -> [..., H, D]``, over earlier positions or ancestors and the row itself.
            contrastive: whether the output's contrastive feature will be asked for.
        """
        return self.complete(x, attend(self.queries(x, positions)), contrastive)

    def complete(self, x: Tensor, attended: Tensor, contrastive: bool = False) -> HeadOutput:
        """Runs the experts on rows that have attended.

        Args:
            x: ``[..., C]`` from ``fuse``.
            attended: ``[..., H, D]`` what their queries found.
            contrastive: whether the output's contrastive feature will be asked for.
        """
        found = attended.flatten(-2)
        if self.sum_over_ranks is None:
            residual = self.o_proj.forward(found, x)
        else:
            residual = x + self.sum_over_ranks(self.o_proj.forward(found))
        spec, experts = self.spec, self.experts
        routing = self.route(residual.flatten(0, -2))
        up = experts.up
        activations = activate(
            routing.normed, up.weight, routing, spec.num_experts, experts.activation, product=up.forward
        )
        return HeadOutput(self, residual, activations, routing, contrastive)

    def route(self, rows: Tensor) -> Routing:
        """Normalises ``[T, C]`` rows of the residual stream, and selects and weighs each row's experts."""
        spec, experts = self.spec, self.experts
        gate = None if experts.gate is None else experts.gate.weight
        return route(rows, self.norm.weight, spec.rms_norm_eps, gate, spec.num_experts, spec.has_contrast)

    def forward(
        self,
        token_embeds: Tensor,
        features: Tensor,
        positions: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> HeadOutput:
        """Runs the head on whole sequences, as training does.

        Args:
            token_embeds: ``[..., C]`` embedding of the token after each position.
            features: ``[..., C]`` the target's last hidden state, or the head's own feature inside a tree.
            positions: ``[...] int64`` position of the feature, one less than its token's.
            attend: ``query [..., H, D], key [..., G, D], value [..., G, D] -> [..., H, D]``.

        Returns:
            The output to read features from.
        """
        x = self.fuse(token_embeds, features)
        k, v = self.keys_values(x, positions)
        return self.finish(x, positions, lambda q: attend(q, k, v), contrastive=self.spec.has_contrast)
