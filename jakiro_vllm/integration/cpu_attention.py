"""The CPU attention backend with tree rows.

Everything but the rows of trees goes through vLLM's own operator, so a step without trees is exactly
vLLM's. Keys and values of tree rows are kept aside while the step runs; compaction writes those of the
accepted path again with vLLM's own cache-write operator, which makes it independent of the cache's layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from jakiro_vllm.kernels.tree_attention import PagedCache, TreeJobs, tree_attention

#: vLLM's instruction sets, by the layout of the pages that they write.
PAGE_LAYOUTS = {"vec": "vec", "vec16": "vec", "amx": "amx"}


@dataclass
class TreeRows:
    """The tree rows of a step, shared by all layers of a KV group.

    T rows in the step, N of them in trees.

    Attributes:
        jobs: which rows belong to which tree, with the group's block tables.
        rows: ``[N] int64`` the tree rows.
        ancestors: ``[T] int64`` ancestor words, 0 for other rows.
        depths: ``[T] int64``.
        only_trees: whether the step has no other rows, so that vLLM's operator need not run.
        kept: per layer the tree rows' ``([N, G, D], [N, G, D])`` keys and values.
    """

    jobs: TreeJobs
    rows: Tensor
    ancestors: Tensor
    depths: Tensor
    only_trees: bool
    kept: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class TreeCPUAttentionMetadata(CPUAttentionMetadata):
    """vLLM's metadata and the step's trees, which the runner attaches."""

    trees: TreeRows | None = None


class TreeCPUAttentionBackend(CPUAttentionBackend):
    """Takes the place of ``CPU_ATTN``, under the same name."""

    @staticmethod
    def get_impl_cls() -> type[TreeCPUAttentionImpl]:
        """The layer implementation."""
        return TreeCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeCPUAttentionMetadataBuilder]:
        """The metadata builder."""
        return TreeCPUAttentionMetadataBuilder


class TreeCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds metadata that can carry trees."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TreeCPUAttentionMetadata:
        """As vLLM's, without trees; see ``TreeRows``."""
        plain = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return TreeCPUAttentionMetadata(**vars(plain))


class TreeCPUAttentionImpl(CPUAttentionBackendImpl):
    """One layer's attention."""

    @property
    def window(self) -> int:
        """Sliding window in positions, not positive for none."""
        return self.sliding_window

    def page_refusal(self, layer: Any, dtype: torch.dtype) -> str | None:
        """Why the layer's pages cannot hold trees, or None."""
        if layer.isa not in PAGE_LAYOUTS:
            return f"keeps its KV in layout {layer.isa!r}; known: {', '.join(PAGE_LAYOUTS)}"
        if layer.kv_cache.dtype != dtype:
            return f"keeps its KV as {layer.kv_cache.dtype}, the model computes in {dtype}"
        return None

    def paged_cache(self, layer: Any, kv_cache: Tensor, keep: bool = False) -> PagedCache:
        """The layer's pages as the tree kernel reads them; ``keep`` for several calls on the same context.

        Layouts that the kernel does not know were refused at start-up (``layers.check_layers``).
        """
        return PagedCache(kv_cache, PAGE_LAYOUTS[layer.isa], {} if keep else None)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TreeCPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As vLLM's, then the tree rows again with their mask.

        Rows of trees that pass through vLLM's operator in a mixed step get a meaningless result first, which
        is overwritten.
        """
        trees = getattr(attn_metadata, "trees", None)
        if trees is None or not trees.only_trees:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if trees is not None:
            tree_attention(
                query,
                self.paged_cache(layer, kv_cache),
                trees.jobs,
                key,
                value,
                trees.ancestors,
                trees.depths,
                self.scale,
                output,
                softcap=self.logits_soft_cap,
                window=self.window,
            )
        return output

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Writes all rows, and keeps a copy of the tree rows for compaction."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        metadata = get_forward_context().attn_metadata
        trees = getattr(metadata[layer.layer_name], "trees", None) if isinstance(metadata, dict) else None
        if trees is not None:
            trees.kept[layer.layer_name] = (key[trees.rows], value[trees.rows])

    def write_rows(self, layer: Any, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Writes ``[M, G, D]`` keys and values into ``slots [M] int64`` of the layer's pages."""
        super().do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)

    def move_rows(self, layer: Any, trees: TreeRows, sources: Tensor, slots: Tensor) -> None:
        """Compacts: writes kept tree rows into other slots.

        Args:
            layer: the attention layer.
            trees: of the step.
            sources: ``[M] int64`` rows of the step, all of them tree rows.
            slots: ``[M] int64`` where each belongs.
        """
        keys, values = trees.kept[layer.layer_name]
        index = torch.searchsorted(trees.rows, sources)
        self.write_rows(layer, keys[index], values[index], slots)


def make_tree_jobs(
    block_table: Tensor, requests: Tensor, context_lens: Tensor, row_starts: Tensor, row_counts: Tensor
) -> TreeJobs:
    """Jobs whose trees are the query rows themselves, as in verification.

    Args:
        block_table: ``[B, M] int32`` of the KV group.
        requests: ``[J] int64`` those with trees.
        context_lens: ``[J] int64`` committed tokens.
        row_starts: ``[J] int64``.
        row_counts: ``[J] int64``.
    """
    return TreeJobs(
        block_tables=block_table[requests],
        context_lens=context_lens,
        row_starts=row_starts,
        row_counts=row_counts,
        node_starts=row_starts,
        node_counts=row_counts,
    )
