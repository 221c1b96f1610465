"""The model runner's mixin: a thin adapter between vLLM's runner V1 and one round of tree decoding.

A step: rows of trees get the position of their depth, the attention metadata gets the trees, the target
runs, the walk samples along the tree with vLLM's own sampler, accepted rows are compacted, and the head
grows the next trees from the committed rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata

from jakiro_vllm.cache.commit import CommittedRows, committed_rows
from jakiro_vllm.decode.drafter import RoundInput
from jakiro_vllm.decode.store import TreeStore
from jakiro_vllm.integration.cpu_attention import TreeRows, make_tree_jobs
from jakiro_vllm.integration.head_cache import PagedHeadCache
from jakiro_vllm.integration.layers import check_layers
from jakiro_vllm.integration.proposer import HEAD_LAYER, JakiroProposer
from jakiro_vllm.tree.batch import TreeBatch
from jakiro_vllm.tree.walk import walk


@dataclass
class Step:
    """One scheduler step, between its stages. B requests in batch order.

    Attributes:
        trees: what is verified; requests without drafts have the root only.
        tree_requests: ``[J] int64`` requests whose rows are a tree.
        base: ``[B] int64`` computed tokens before the step.
        row_starts: ``[B] int64``.
        row_counts: ``[B] int64``.
        prefix_lens: ``[B] int64`` rows before the root.
        logit_starts: ``[B] int64`` logits row of the root.
        metadata: per layer, once built.
        committed: once verified.
    """

    trees: TreeBatch
    tree_requests: Tensor
    base: Tensor
    row_starts: Tensor
    row_counts: Tensor
    prefix_lens: Tensor
    logit_starts: Tensor
    metadata: dict[str, Any] | None = None
    committed: CommittedRows | None = None

    @cached_property
    def tree_row_index(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(rows [N], requests [N], nodes [N])`` of all tree rows."""
        counts = self.row_counts[self.tree_requests]
        job = torch.repeat_interleave(counts)
        nodes = torch.arange(job.shape[0]) - (counts.cumsum(0) - counts)[job]
        requests = self.tree_requests[job]
        return self.row_starts[requests] + nodes, requests, nodes


class JakiroRunnerMixin:
    """Adds trees to a runner V1; comes before the runner class among the bases."""

    drafter: JakiroProposer
    input_batch: Any
    requests: dict[str, Any]
    _step: Step | None = None
    _store: TreeStore | None = None

    @property
    def tree_store(self) -> TreeStore:
        """Trees that wait for their verification."""
        if self._store is None:
            self._store = TreeStore(self.drafter.tree_config.num_nodes, self.device)  # type: ignore[attr-defined]
        return self._store

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; then every layer is checked, and budgets are told that logits have one row per request."""
        super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        check_layers(self.vllm_config, self.drafter.tree_config.depth)  # type: ignore[attr-defined]
        holder = self.input_batch.thinking_budget_state_holder
        if holder is not None:
            holder.in_spec_mode = False

    # Inputs

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        """Moves tree rows to the positions of their depths; slots stay where vLLM computed them."""
        result = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]
        # Placeholder drafts (-1) that pad a request are computed like any token and never accepted.
        self.input_ids.gpu[: scheduler_output.total_num_scheduled_tokens].clamp_(min=0)  # type: ignore[attr-defined]
        self._step = step = self._plan_step(scheduler_output, num_scheduled_tokens)
        if step.tree_requests.numel():
            rows, requests, nodes = step.tree_row_index
            self.positions[rows] = step.base[requests] + step.trees.depths[requests, nodes]  # type: ignore[attr-defined]
        return result

    def _plan_step(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Step:
        names = self.input_batch.req_ids
        drafts = scheduler_output.scheduled_spec_decode_tokens
        scheduled = [drafts.get(name, ()) for name in names]
        row_counts = torch.from_numpy(num_scheduled_tokens.astype(np.int64))
        nodes = torch.tensor([len(tokens) + 1 for tokens in scheduled], dtype=torch.int64)
        prefix_lens = row_counts - nodes
        trees = self.tree_store.gather(names, scheduled)
        # A tree hangs under a request's last token; behind other tokens its drafts would not be a tree of
        # the rows, so they are computed as a chain and rejected.
        trees = trees.truncate(torch.where(prefix_lens == 0, nodes, 1))
        return Step(
            trees=trees,
            tree_requests=((nodes > 1) & (prefix_lens == 0)).nonzero().squeeze(1),
            base=torch.from_numpy(self.input_batch.num_computed_tokens_cpu[: len(names)].astype(np.int64)),
            row_starts=row_counts.cumsum(0) - row_counts,
            row_counts=row_counts,
            prefix_lens=prefix_lens,
            logit_starts=nodes.cumsum(0) - nodes,
        )

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Attaches the step's trees to every layer's metadata."""
        per_layer, common = super()._build_attention_metadata(*args, **kwargs)  # type: ignore[misc]
        step = self._step
        if step is not None:
            step.metadata = per_layer
            if step.tree_requests.numel():
                self._attach_trees(step, per_layer)
        return per_layer, common

    def _attach_trees(self, step: Step, per_layer: dict[str, Any]) -> None:
        rows, requests, nodes = step.tree_row_index
        ancestors = torch.zeros(int(step.row_counts.sum()), dtype=torch.int64)
        depths = torch.zeros_like(ancestors)
        ancestors[rows] = step.trees.ancestors[requests, nodes]
        depths[rows] = step.trees.depths[requests, nodes]
        only_trees = step.tree_requests.numel() == step.row_counts.numel()
        chosen = step.tree_requests
        for metadata in {id(m): m for m in per_layer.values()}.values():
            jobs = make_tree_jobs(
                metadata.block_table, chosen, step.base[chosen], step.row_starts[chosen], step.row_counts[chosen]
            )
            metadata.trees = TreeRows(jobs, rows, ancestors, depths, only_trees)

    # Verification

    def _sample(self, logits: Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        """Walks every tree along the target's samples, then compacts the KV cache."""
        step = self._step
        assert step is not None
        metadata = self.input_batch.sampling_metadata
        steps: list[SamplerOutput] = []

        def sample(index: int, nodes: Tensor, active: Tensor) -> Tensor:
            emitted = [s.sampled_token_ids for s in steps]
            output = self.sampler(  # type: ignore[attr-defined]
                logits=logits[step.logit_starts + nodes],
                sampling_metadata=self._metadata_at(metadata, emitted, active),
            )
            steps.append(output)
            return output.sampled_token_ids.squeeze(1).long()

        accepted = walk(step.trees, sample, self.drafter.tree_config.depth)
        step.committed = committed_rows(step.row_starts, step.prefix_lens, accepted)
        self._compact(step)
        return SamplerOutput(
            sampled_token_ids=accepted.tokens.to(torch.int32),
            logprobs_tensors=_join_logprobs([s.logprobs_tensors for s in steps]),
        )

    def _metadata_at(self, metadata: SamplingMetadata, emitted: list[Tensor], active: Tensor) -> SamplingMetadata:
        """Sampling metadata for the next token of the walk, as plain decoding would have it there.

        Only active requests may advance their generators, and a prompt chunk's sample is discarded, so it
        draws nothing. Penalties and bad words see the tokens emitted on the way.
        """
        discarded = self.discard_request_mask.np  # type: ignore[attr-defined]
        live = active.tolist()
        generators = {i: g for i, g in metadata.generators.items() if live[i] and not discarded[i]}
        if not emitted:
            return replace(metadata, generators=generators, spec_token_ids=None)
        outputs = metadata.output_token_ids
        if outputs:
            taken = torch.cat(emitted, dim=1).tolist()
            outputs = [old + new if go else old for old, new, go in zip(outputs, taken, live, strict=True)]
        return replace(
            metadata,
            generators=generators,
            output_token_ids=outputs,
            spec_token_ids=None,
            thinking_budget_state_holder=None,  # a request with a budget has no drafts
        )

    def _compact(self, step: Step) -> None:
        """Moves the accepted rows' KV into the slots of their positions, in every layer of the target."""
        assert step.committed is not None and step.metadata is not None
        sources, destinations = step.committed.moves()
        if not sources.numel():
            return
        layers = self.compilation_config.static_forward_context  # type: ignore[attr-defined]
        for name, metadata in step.metadata.items():
            if metadata.trees is not None and name in metadata.trees.kept:
                layer = layers[name]
                layer.impl.move_rows(layer, metadata.trees, sources, metadata.slot_mapping[destinations])

    # Drafting

    def propose_draft_token_ids(
        self,
        scheduler_output: Any,
        sampled_token_ids: list[list[int]],
        sampling_metadata: SamplingMetadata,
        hidden_states: Tensor,
        *unused: Any,
        **kwargs: Any,
    ) -> list[list[int]]:
        """Feeds the committed rows to the head and grows the next trees."""
        step, self._step = self._step, None
        assert step is not None and step.committed is not None and step.metadata is not None
        rows = step.committed
        names = self.input_batch.req_ids
        positions = step.base[rows.requests] + rows.destinations - step.row_starts[rows.requests]
        next_tokens = self.input_batch.token_ids_cpu_tensor[rows.requests, positions + 1].long()
        drafting = [i for i, (name, tokens) in enumerate(zip(names, sampled_token_ids, strict=True)) if tokens]
        drafting = [i for i in drafting if self._may_draft(names[i])]
        chosen = torch.tensor(drafting, dtype=torch.int64)
        paged = step.metadata[HEAD_LAYER]
        cache = PagedHeadCache(
            layer=self.drafter.attention,
            block_tables=paged.block_table[chosen],
            context_lens=(step.base + rows.counts)[chosen],
            slots=paged.slot_mapping[rows.destinations],
        )
        inputs = RoundInput(hidden_states[rows.sources], next_tokens, positions, rows.last[chosen])
        drafts: list[list[int]] = [[] for _ in names]
        drafter = self.drafter.drafter
        if not drafting:
            drafter.observe(inputs, cache)
            return drafts
        trees = drafter.draft(inputs, cache)
        for i, tokens in zip(drafting, self.tree_store.put([names[i] for i in drafting], trees), strict=True):
            drafts[i] = tokens
        return drafts

    def _may_draft(self, name: str) -> bool:
        """Whether drafts could be verified for this request; otherwise it is served plainly."""
        state = self.requests[name]
        params = state.sampling_params
        produced = len(state.output_token_ids)
        return (
            params is not None
            and params.structured_outputs is None  # the grammar's state does not follow a path yet
            and params.thinking_token_budget is None  # nor does the budget's
            and produced >= params.min_tokens  # whose ban ends at a position, not at a node
            and (params.max_tokens is None or params.max_tokens - produced > 1)
        )

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        """Always: the scheduler cuts each tree at the model's maximum length, request by request."""
        return common_attn_metadata is not None

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        super()._on_request_state_removed(req_id, req_state)  # type: ignore[misc]
        self.tree_store.discard(req_id)

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, which would rewind the generators of discarded samples; here they drew nothing.

        vLLM 0.32 rewinds by offset, which CPU generators do not have: a seeded request with a chunked
        prompt ends the plain CPU engine.
        """
        with self._without_discarded_generators():
            return super()._bookkeeping_sync(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _without_discarded_generators(self) -> Iterator[None]:
        generators = self.input_batch.generators
        discarded = self.discard_request_mask.np  # type: ignore[attr-defined]
        aside = {i: generators.pop(i) for i in list(generators) if discarded[i]}
        try:
            yield
        finally:
            generators.update(aside)


def _join_logprobs(steps: list[LogprobsTensors | None]) -> LogprobsTensors | None:
    """``S`` tensors of B rows as one of B * S rows, request by request."""
    present = [s for s in steps if s is not None]
    if not present:
        return None
    if len(present) == 1:
        return present[0]
    return LogprobsTensors(*(torch.stack([s[i] for s in present], dim=1).flatten(0, 1) for i in range(3)))
