"""Trees on the GPU runner: shapes and courses that the host knows beforehand, so that it never waits for a value.

The target replays vLLM's CUDA graphs over persistent buffers, and the draft its own. The host waits where vLLM's
runner V1 does: for the emitted tokens, and for the drafts that the scheduler wants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.distributed.parallel_state import graph_capture
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from jakiro_vllm.decode.drafter import DraftShape, Roots
from jakiro_vllm.decode.graphs import BATCH_SIZES, CUDARecorder, DraftGraphs, DraftInput, Recorder
from jakiro_vllm.integration.gpu_attention import TreeTritonAttentionBackend
from jakiro_vllm.integration.head_cache import GPUHeadCache, NoPages
from jakiro_vllm.integration.proposer import HEAD_LAYER
from jakiro_vllm.integration.runner import JakiroRunnerMixin, Step, first_ranks
from jakiro_vllm.integration.sampling import Draws, independent_of_path, random_sampling, sample_rows
from jakiro_vllm.kernels.batch_attention import BatchRows
from jakiro_vllm.kernels.compaction import LayerPages, compact
from jakiro_vllm.transfer import upload
from jakiro_vllm.tree.batch import TreeBatch, chains
from jakiro_vllm.tree.walk import Accepted, walk_sampled

#: Context for which kernels are tuned.
TYPICAL_CONTEXT = 2048
#: Rows of a request, one for each height of block that attention has, whatever the heads.
WARM_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 600)
#: Bytes that the driver takes for a recorded graph, besides its memory pool.
GRAPH_OVERHEAD = 1 << 20
#: Requests of a launch: so few that the context is split, and so many that it is not.
WARM_REQUESTS = (1, 3, 64)


def warm_shapes(max_tokens: int, max_requests: int) -> list[tuple[int, int, int]]:
    """Attention launches that stand for all that serving makes: ``(requests, rows of the longest, rows in all)``.

    Args:
        max_tokens: rows of a step, at most.
        max_requests: of a step, at most.
    """
    shapes = set()
    # With few KV heads only a full batch leaves a context whole.
    for requests in {min(requests, max_requests) for requests in (*WARM_REQUESTS, max_requests)}:
        for rows in {min(rows, max_tokens - requests + 1) for rows in WARM_ROWS}:
            # All of them as long as the longest, and one long one beside requests that decode.
            shapes |= {(requests, rows, min(requests * rows, max_tokens)), (requests, rows, rows + requests - 1)}
    return sorted(shapes)


class GPUTreesMixin(JakiroRunnerMixin):
    """Adds trees to a runner whose KV pages the Triton backend reads."""

    tree_backend = TreeTritonAttentionBackend
    # Equal row counts let a batch of decoding requests replay a full graph.
    uniform_drafts = True
    compilation_config: Any
    kv_cache_config: Any
    _graphs: DraftGraphs | None = None
    #: Ancestor words and depths of all rows of a step, ``[2, T]``.
    _rows: Tensor | None = None
    #: What seeded requests drew in this step.
    _draws: Mapping[int, Draws] = MappingProxyType({})
    _pages: list[tuple[str, LayerPages]] | None = None

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, which calls it a first time to measure graphs; the buffers that graphs read are made once."""
        super().initialize_kv_cache(*args, **kwargs)
        self._pages = self._graphs = None  # of the new cache
        # vLLM launches attention before it captures graphs, too, and kernels are tuned at their first launch.
        self.num_computed_tokens.fill_(self._typical_context())  # type: ignore[attr-defined]
        if self._rows is None:
            shape = 2, self.max_num_tokens  # type: ignore[attr-defined]
            self._rows = torch.zeros(shape, dtype=torch.int64, device=self.device)

    def shutdown(self) -> None:
        """See the base class."""
        self._pages = self._graphs = None
        super().shutdown()

    # Attention

    def _attach_trees(self, step: Step | None, per_layer: dict[str, Any]) -> None:
        assert self._rows is not None
        ancestors, depths = self._rows
        if step is None:
            ancestors.zero_()
        else:
            rows = int(step.row_counts.sum())
            if step.ancestors is None or step.depths is None:
                ancestors[:rows].zero_()
                depths[:rows].copy_(self.query_pos.gpu[:rows])  # type: ignore[attr-defined]
            else:
                ancestors[:rows].copy_(step.ancestors)
                depths[:rows].copy_(step.depths)
        for metadata in {id(m): m for m in per_layer.values()}.values():
            requests, rows = metadata.query_start_loc.shape[0] - 1, metadata.num_actual_tokens
            metadata.trees = BatchRows(
                block_tables=metadata.block_table,
                row_starts=metadata.query_start_loc,
                context_lens=self.num_computed_tokens[:requests],  # type: ignore[attr-defined]
                ancestors=ancestors[:rows],
                depths=depths[:rows],
                max_rows=metadata.max_query_len,
            )

    def _compact(self, step: Step) -> None:
        assert step.accepted is not None and step.metadata is not None
        if not step.any_tree:
            return
        for layer, pages in self._layer_pages():
            slots = step.metadata[layer].slot_mapping
            compact(pages, slots, step.tree_starts, step.accepted.path, step.accepted.num_accepted)

    def _layer_pages(self) -> list[tuple[str, LayerPages]]:
        if self._pages is None:
            self._pages = list(self._collect_pages())
        return self._pages

    def _collect_pages(self) -> Iterator[tuple[str, LayerPages]]:
        """Per KV group and element size, the name of one layer and the pages of all; the head writes its own."""
        layers = self.compilation_config.static_forward_context
        for group in self.kv_cache_config.kv_cache_groups:
            by_size: dict[int, list[str]] = {}
            for name in group.layer_names:
                if name != HEAD_LAYER:
                    by_size.setdefault(layers[name].kv_cache.element_size(), []).append(name)
            for names in by_size.values():
                yield names[0], LayerPages.of([layers[name].kv_cache for name in names])

    # Verification

    def _verify(self, step: Step, logits: Tensor) -> tuple[Accepted, LogprobsTensors | None]:
        """Samples every row at once and walks on the device, unless a request's path matters to its next token."""
        metadata = self.input_batch.sampling_metadata
        if not independent_of_path(metadata):
            return self._walk_by_levels(step, logits)
        levels = self._levels(step)
        counts = step.row_counts - step.prefix_lens
        ends = counts.cumsum(0)
        requests = torch.repeat_interleave(counts)
        nodes = torch.arange(requests.shape[0]) - (ends - counts)[requests]
        requests, nodes = upload(torch.stack([requests, nodes]), self.device)
        discarded = self.discard_request_mask.np  # type: ignore[attr-defined]
        tokens, self._draws = sample_rows(
            self.sampler,  # type: ignore[attr-defined]
            logits,
            metadata,
            requests,
            step.trees.depths[requests, nodes].clamp(max=levels),
            {i: g for i, g in metadata.generators.items() if not discarded[i]},
            counts.tolist(),
            levels + 1,
        )
        columns = torch.arange(step.trees.width, device=self.device)
        # Beyond a tree's own rows come another's, which the walk never looks at.
        index = (step.logit_starts.unsqueeze(1) + columns).clamp(max=tokens.shape[0] - 1)
        return walk_sampled(step.trees, tokens[index], levels), None

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; then generators are rewound to what their requests emitted."""
        result = super()._bookkeeping_sync(*args, **kwargs)
        emitted = result[3]
        for request, draws in self._draws.items():
            draws.keep(len(emitted[request]))
        self._draws = MappingProxyType({})
        return result

    # Drafting

    def _head_cache(self, metadata: Any, requests: Tensor, context_lens: Tensor, slots: Tensor) -> GPUHeadCache:
        return GPUHeadCache(self.drafter.attention, metadata.block_table[requests], context_lens.int(), slots)

    def _grow(self, roots: Roots, cache: Any, shape: DraftShape) -> TreeBatch:
        given = DraftInput(roots, cache.block_tables, cache.context_lens)
        if self._graphs is not None and self._graphs.fits(roots.x.shape[0]):
            return self._graphs(given)
        return self._draft(given)

    def _draft(self, given: DraftInput) -> TreeBatch:
        cache = GPUHeadCache(self.drafter.attention, given.block_tables, given.context_lens)
        return self.drafter.drafter.grow(given.roots, cache)

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; then the largest verification and draft, whose memory must not go to the KV cache."""
        super().profile_run(*args, **kwargs)  # type: ignore[misc]
        self._profile_verification()
        # Ranks connect for their first broadcast, which takes memory too.
        first_ranks(self._draft_without_pages(self.max_num_reqs))  # type: ignore[attr-defined]
        self._sync_device()  # type: ignore[attr-defined]

    @torch.inference_mode()
    def _profile_verification(self) -> None:
        """Logits of as many tree rows as a step may have; vLLM's own run takes one row per request."""
        nodes = self.drafter.tree_config.num_nodes
        requests = max(1, min(self.max_num_reqs, self.max_num_tokens // nodes))  # type: ignore[attr-defined]
        head = self.drafter.drafter.head
        hidden = torch.rand(requests * nodes, head.spec.hidden_size, dtype=head.fc.weight.dtype, device=self.device)
        logits = self.model.compute_logits(hidden)  # type: ignore[attr-defined]
        batch = random_sampling(requests, logits)
        generators = {i: torch.Generator(self.device).manual_seed(0) for i in range(requests)}
        rows = torch.arange(requests * nodes, device=self.device)
        levels = self.drafter.tree_config.depth + 1
        sample_rows(
            self.sampler,  # type: ignore[attr-defined]
            logits,
            batch,
            rows // nodes,
            rows % nodes % levels,
            generators,
            [nodes] * requests,
            levels,
        )

    @torch.inference_mode()
    def _draft_without_pages(self, batch: int) -> TreeBatch:
        return self.drafter.drafter.grow(self._empty_input(batch).roots, NoPages())

    def profile_cudagraph_memory(self) -> int:
        """As vLLM's, and the draft's graphs: the largest is recorded once, without pages, and dropped."""
        taken = super().profile_cudagraph_memory()  # type: ignore[misc]
        if self.compilation_config.cudagraph_mode == CUDAGraphMode.NONE:
            return taken
        sizes = self._draft_sizes()
        torch.accelerator.synchronize()
        before = torch.accelerator.get_memory_info()[0]
        recorded = self._recorder()(lambda: self._draft_without_pages(sizes[-1]))
        torch.accelerator.synchronize()
        first = before - torch.accelerator.get_memory_info()[0]
        del recorded
        return taken + first + (len(sizes) - 1) * GRAPH_OVERHEAD

    def capture_model(self) -> int:
        """As vLLM's; then the draft's graphs.

        Kernels are compiled and tuned here, so the dummy requests get a context as long as real ones have.
        """
        self.num_computed_tokens.fill_(self._typical_context())  # type: ignore[attr-defined]
        self._warm_attention(warm_shapes(self.max_num_tokens, self.max_num_reqs))  # type: ignore[attr-defined]
        self._warm_verification()
        taken = super().capture_model()  # type: ignore[misc]
        self.num_computed_tokens.zero_()  # type: ignore[attr-defined]
        if self.compilation_config.cudagraph_mode == CUDAGraphMode.NONE:
            return taken
        before = torch.accelerator.get_memory_info()[0]
        self._record_drafts(self._recorder())
        return taken + before - torch.accelerator.get_memory_info()[0]

    @torch.inference_mode()
    def _warm_attention(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        """Launches attention in these shapes, for each kind of layer: vLLM's own warm-up leaves most of them out."""
        layers = self.compilation_config.static_forward_context
        kinds = {}
        for number, group in enumerate(self.kv_cache_config.kv_cache_groups):
            # As wide as in service: how often a context is split follows from it.
            pages = self.input_batch.block_table[number].get_device_tensor(1).shape[1]
            for layer in (layers[name] for name in group.layer_names):
                impl = layer.impl
                shape = impl.num_heads, impl.num_kv_heads, impl.head_size
                kinds[*shape, impl.window, impl.logits_soft_cap, impl.quantized, pages] = layer, pages
        context = self._typical_context()
        for layer, width in kinds.values():
            impl, page_size = layer.impl, layer.kv_cache.shape[2]
            for requests, longest, total in shapes:
                # The longest comes first; what is left is shared out, at most as many rows to each.
                each = (total - longest) // max(1, requests - 1)
                lengths = torch.tensor([longest] + [each] * (requests - 1), dtype=torch.int32)
                starts = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)])
                rows = int(starts[-1])
                pages = max(width, -(-(context + longest) // page_size))
                integers = torch.zeros(2, rows, dtype=torch.int64, device=self.device)
                seen = BatchRows(
                    block_tables=torch.zeros(requests, pages, dtype=torch.int32, device=self.device),
                    row_starts=starts.to(self.device),
                    context_lens=torch.full((requests,), context, dtype=torch.int32, device=self.device),
                    ancestors=integers[0],
                    depths=integers[1],
                    max_rows=longest,
                )
                dtype = self.vllm_config.model_config.dtype  # type: ignore[attr-defined]
                query = torch.zeros(rows, impl.num_heads, impl.head_size, dtype=dtype, device=self.device)
                impl.attend(layer, query, layer.kv_cache, seen, torch.empty_like(query))

    def _recorder(self) -> CUDARecorder:
        # vLLM's custom sum over the ranks exchanges the addresses that a graph will read, once it is recorded.
        return CUDARecorder(lambda: graph_capture(self.device))

    @torch.inference_mode()
    def _record_drafts(self, record: Recorder) -> None:
        sizes = self._draft_sizes()
        buffers = self._empty_input(sizes[-1])
        buffers.context_lens.fill_(self._typical_context())
        self._graphs = DraftGraphs(self._draft, buffers, sizes, record)

    def _draft_sizes(self) -> list[int]:
        return [size for size in BATCH_SIZES if size <= self.max_num_reqs]  # type: ignore[attr-defined]

    @torch.inference_mode()
    def _warm_verification(self) -> None:
        """Compiles the walk, compaction and the head's cache write; rows of no slot, so that nothing is written."""
        config = self.drafter.tree_config
        tokens = torch.full((1, config.num_nodes), -1, dtype=torch.int64, device=self.device)
        for levels in (0, config.depth):  # of a step without trees, and of one with
            accepted = walk_sampled(chains(tokens, torch.ones_like(tokens[:, 0])), tokens, levels)
            slots = torch.full_like(tokens[0], -1)
            for _, pages in self._layer_pages():
                compact(pages, slots, torch.zeros_like(slots[:1]), accepted.path, accepted.num_accepted)
        head = self.drafter.drafter.head
        x = torch.zeros(config.num_nodes, head.spec.hidden_size, dtype=head.fc.weight.dtype, device=self.device)
        keys, values = head.keys_values(x, slots.clamp(min=0))
        self.drafter.attention.impl.write_rows(self.drafter.attention, keys, values, slots)

    def _typical_context(self) -> int:
        """Tokens of a request that is being served; its pages are all page 0 while nothing is."""
        # Graphs are captured with up to this many rows in one request, which need room in its block table too.
        rows = max(self.drafter.tree_config.num_nodes, self.compilation_config.max_cudagraph_capture_size or 0)
        return max(0, min(TYPICAL_CONTEXT, self.max_model_len - rows))  # type: ignore[attr-defined]

    def _empty_input(self, batch: int) -> DraftInput:
        head = self.drafter.drafter.head
        pages = self.input_batch.block_table[self._head_group()].get_device_tensor(1).shape[1]
        dtype = head.fc.weight.dtype
        return DraftInput.empty(batch, head.spec.hidden_size, dtype, pages, self.device)

    def _head_group(self) -> int:
        """Index of the KV group that the head's pages belong to; 0 before there are groups."""
        config = getattr(self, "kv_cache_config", None)
        groups = config.kv_cache_groups if config is not None else []
        return next((i for i, group in enumerate(groups) if HEAD_LAYER in group.layer_names), 0)


class JakiroGPUModelRunner(GPUTreesMixin, GPUModelRunner):
    """vLLM's GPU runner V1 with trees."""
