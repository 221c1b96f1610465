"""The CUDA attention backend with trees: vLLM's Triton backend with this package's kernel.

One launch computes all rows of a step, prefill and plain decode included. Keys and values are written by vLLM's own
operator before it, so a tree's rows read each other from the pages, quantized as they would be later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from jakiro_vllm.kernels.batch_attention import BatchRows, Scratch, batch_attention


@dataclass
class TreeTritonAttentionMetadata(TritonAttentionMetadata):
    """vLLM's metadata and the step's rows, which the runner attaches."""

    trees: BatchRows | None = None


class TreeTritonAttentionBackend(TritonAttentionBackend):
    """Registered as ``CUSTOM``, the slot that vLLM keeps for backends from outside."""

    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]

    @staticmethod
    def get_name() -> str:
        """Name of the slot."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TreeTritonAttentionImpl]:
        """The layer implementation."""
        return TreeTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeTritonAttentionMetadataBuilder]:
        """The metadata builder."""
        return TreeTritonAttentionMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Sizes that the kernel has been compiled for, padded to a power of two."""
        return 32 <= head_size <= 256

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Causal attention of a decoder."""
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_non_causal(cls) -> bool:
        """No."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """No."""
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        """Not yet."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """Not yet."""
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """No: a connector would save rows that are moved or rejected later."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """No: how a context is split depends on the batch."""
        return False


class TreeTritonAttentionMetadataBuilder(TritonAttentionMetadataBuilder):
    """Builds metadata that can carry trees."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TreeTritonAttentionMetadata:
        """As vLLM's, without trees; see ``BatchRows``."""
        plain = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return TreeTritonAttentionMetadata(**vars(plain))


class TreeTritonAttentionImpl(TritonAttentionImpl):
    """One layer's attention."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The kernel reads queries in the model's dtype, whatever the pages hold.
        self.supports_quant_query_input = False

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """No: the output is written in the model's dtype."""
        return False

    @property
    def window(self) -> int:
        """Sliding window in positions, 0 for none; vLLM keeps how far a row looks back."""
        return self.sliding_window[0] + 1

    def page_refusal(self, layer: Any, dtype: torch.dtype) -> str | None:
        """Why the layer's pages cannot hold trees, or None."""
        if self.chunk_lookback != -1:
            return "has chunked local attention, which tree attention has not yet"
        if not self.quantized and layer.kv_cache.dtype != dtype:
            return f"keeps its KV as {layer.kv_cache.dtype}, the model computes in {dtype}"
        return None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TreeTritonAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attends for every row of the step; see ``batch_attention``."""
        if attn_metadata is None:  # a profiling run
            return output.fill_(0)
        assert attn_metadata.trees is not None and output_scale is None and output_block_scale is None
        self.attend(layer, query, kv_cache, attn_metadata.trees, output)
        return output

    def attend(
        self,
        layer: Any,
        query: Tensor,
        kv_cache: Tensor,
        rows: BatchRows,
        output: Tensor,
        scratch: Scratch | None = None,
    ) -> None:
        """Attends to the layer's pages, and to a draft's own nodes where there are some.

        Args:
            layer: the attention layer.
            query: ``[T, H, D]``, rows that padding adds included.
            kv_cache: ``[P, G, B, 2 * D]``.
            rows: what each row may see.
            output: ``[T, H, D]``, written.
            scratch: keys and values outside of the pages.
        """
        key_pages, value_pages = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        key_scale = value_scale = None
        if self.quantized:
            key_pages, value_pages = key_pages.view(self.fp8_dtype), value_pages.view(self.fp8_dtype)
            key_scale, value_scale = layer._k_scale, layer._v_scale
        batch_attention(
            query,
            key_pages,
            value_pages,
            rows,
            self.scale,
            output,
            softcap=self.logits_soft_cap,
            window=self.window or -1,
            key_scale=key_scale,
            value_scale=value_scale,
            scratch=scratch,
        )

    @property
    def quantized(self) -> bool:
        """Whether the pages hold fp8."""
        return self.kv_cache_dtype.startswith("fp8")

    def write_rows(self, layer: Any, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Writes ``[M, G, D]`` keys and values into ``slots [M] int64`` of the layer's pages."""
        self.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)
