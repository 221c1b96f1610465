"""The model runner's mixin: a thin adapter between vLLM's runner V1 and one round of tree decoding.

A step: rows of trees get the position of their depth, the attention metadata gets the trees, the target
runs, the walk follows the target's own samples, accepted rows are compacted, and the head grows the next trees
from the committed rows. What depends on the platform is in ``cpu_runner`` and ``gpu_runner``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.outputs import DraftTokenIds, LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata

from jakiro_vllm.cache.commit import CommittedRows, committed_rows
from jakiro_vllm.config import MAX_NODES
from jakiro_vllm.decode.backlog import Backlog
from jakiro_vllm.decode.costs import Bools, Integers
from jakiro_vllm.decode.drafter import DraftShape, HeadCache, Roots, RoundInput
from jakiro_vllm.decode.store import TreeStore
from jakiro_vllm.integration.layers import check_layers
from jakiro_vllm.integration.pacing import Pacer
from jakiro_vllm.integration.proposer import HEAD_LAYER, JakiroProposer
from jakiro_vllm.integration.sampling import GREEDY_BELOW, processors_after
from jakiro_vllm.integration.scheduler import DraftTrees
from jakiro_vllm.transfer import upload
from jakiro_vllm.tree.batch import TreeBatch, row_topology
from jakiro_vllm.tree.walk import Accepted, walk


@dataclass
class Step:
    """One scheduler step, between its stages. B requests in batch order, T rows.

    What the host knows stays on the host, and what depends on a sampled token stays on the device.

    Attributes:
        trees: on the device: what is verified; requests without drafts have the root only.
        base: ``[B] int64`` on the host: computed tokens before the step.
        row_starts: ``[B] int64`` on the host.
        row_counts: ``[B] int64`` on the host.
        prefix_lens: ``[B] int64`` on the host: rows before the root.
        has_tree: ``[B] bool`` on the host: whether all rows of the request are a tree.
        any_tree: whether one of them has a tree.
        branches: ``[B] bool`` on the host: which of the trees may branch; rows of a chain are those of a plain text.
        any_prefix: whether one of them has rows before its root.
        tree_starts: ``[B] int64`` on the device: the root's row.
        logit_starts: ``[B] int64`` on the device: the root's row among the logits.
        ancestors: ``[T] int64`` on the device: ancestor words, 0 for rows that are in no tree that may branch; None if
            there is none.
        depths: ``[T] int64`` on the device: positions after the request's context; None likewise.
        metadata: per layer, once built.
        accepted: on the device, once verified.
    """

    trees: TreeBatch
    base: Tensor
    row_starts: Tensor
    row_counts: Tensor
    prefix_lens: Tensor
    has_tree: Tensor
    any_tree: bool
    branches: Tensor
    any_prefix: bool
    tree_starts: Tensor
    logit_starts: Tensor
    ancestors: Tensor | None = None
    depths: Tensor | None = None
    metadata: dict[str, Any] | None = None
    accepted: Accepted | None = None


class JakiroRunnerMixin:
    """Adds trees to a runner V1; comes before the runner class among the bases."""

    drafter: JakiroProposer
    device: torch.device
    input_batch: Any
    requests: dict[str, Any]
    #: The platform's attention backend.
    tree_backend: type[AttentionBackend]
    #: Whether every request gets the same number of draft tokens, padded with -1.
    uniform_drafts = False
    _step: Step | None = None
    _store: TreeStore | None = None
    #: Adapts the trees to the load; None where they are as configured.
    pacer: Pacer | None = None
    #: What the head has yet to read; always empty where trees do not adapt.
    backlog: Backlog

    # What a platform brings

    @abstractmethod
    def _attach_trees(self, step: Step | None, per_layer: dict[str, Any]) -> None:
        """Hands the step's trees to every layer's metadata; ``step`` is None in dummy runs."""

    @abstractmethod
    def _compact(self, step: Step) -> None:
        """Moves the accepted rows' KV into the slots of their positions, in every layer of the target."""

    @abstractmethod
    def _head_cache(self, metadata: Any, requests: Tensor, context_lens: Tensor, slots: Tensor) -> HeadCache:
        """The head's pages; see ``head_cache``.

        Args:
            metadata: of the head's attention layer.
            requests: ``[J] int64`` on the device: those that draft.
            context_lens: ``[J] int64`` on the device: their committed tokens, this step's included.
            slots: ``[T] int64`` on the device: where the committed rows of all requests belong.
        """

    def _verify(self, step: Step, logits: Tensor) -> tuple[Accepted, LogprobsTensors | None]:
        """Walks every tree along the target's samples."""
        return self._walk_by_levels(step, logits)

    def _grow(self, roots: Roots, cache: HeadCache, shape: DraftShape) -> TreeBatch:
        """Grows the next trees."""
        return self.drafter.drafter.grow(roots, cache, shape)

    # Set-up

    @property
    def tree_store(self) -> TreeStore:
        """Trees that wait for their verification."""
        if self._store is None:
            self._store = TreeStore(self.drafter.tree_config.num_nodes, self.device, self.uniform_drafts)
        return self._store

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; then every layer is checked, and budgets are told that logits have one row per request."""
        super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        self.backlog = Backlog()
        check_layers(self.vllm_config, self.drafter.tree_config.depth, self.tree_backend)  # type: ignore[attr-defined]
        holder = self.input_batch.thinking_budget_state_holder
        if holder is not None:
            holder.in_spec_mode = False

    def shutdown(self) -> None:
        """As vLLM's, which frees the target's memory for who goes on in this process; the head's too."""
        self._step = self._store = self.pacer = None
        self.drafter.release()
        super().shutdown()  # type: ignore[misc]

    # Inputs

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; the target's forward ends here."""
        output = super().execute_model(*args, **kwargs)  # type: ignore[misc]
        if self.pacer is not None:
            self.pacer.forward_ends()
        return output

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        """Moves tree rows to the positions of their depths; slots stay where vLLM computed them."""
        result = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]
        total = scheduler_output.total_num_scheduled_tokens
        if scheduler_output.scheduled_spec_decode_tokens:
            # Placeholder drafts (-1) that pad a request are computed like any token and never accepted.
            self.input_ids.gpu[:total].clamp_(min=0)  # type: ignore[attr-defined]
        self._step = step = self._plan_step(scheduler_output, num_scheduled_tokens)
        if step.branches.any():
            requests = self.req_indices.gpu[:total]  # type: ignore[attr-defined]
            offsets = self.query_pos.gpu[:total]  # type: ignore[attr-defined]
            branches = upload(step.branches, self.device)
            step.ancestors, step.depths = row_topology(step.trees, branches, requests, offsets)
            base = self.num_computed_tokens[requests]  # type: ignore[attr-defined]
            torch.add(step.depths, base, out=self.positions[:total])  # type: ignore[attr-defined]
        return result

    def _plan_step(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Step:
        names = self.input_batch.req_ids
        drafts = scheduler_output.scheduled_spec_decode_tokens
        scheduled: list[Sequence[int]] = [drafts.get(name, ()) for name in names]
        # NumPy, because on these few numbers PyTorch takes several times as long.
        row_counts = num_scheduled_tokens.astype(np.int64)
        nodes = np.array([len(tokens) + 1 for tokens in scheduled], dtype=np.int64)
        prefix_lens = row_counts - nodes
        # A tree hangs under a request's last token; behind other tokens its drafts would not be a tree of
        # the rows, so they are computed as a chain and rejected.
        for i in prefix_lens.nonzero()[0].tolist():
            scheduled[i] = ()
        has_tree = (nodes > 1) & (prefix_lens == 0)
        branches = np.array([self.tree_store.may_branch(name) for name in names], dtype=np.bool_) & has_tree
        row_starts = row_counts.cumsum() - row_counts
        starts = np.concatenate([row_starts + prefix_lens, nodes.cumsum() - nodes])
        tree_starts, logit_starts = upload(torch.from_numpy(starts), self.device).view(2, -1)
        return Step(
            trees=self.tree_store.gather(names, scheduled),
            base=torch.from_numpy(self.input_batch.num_computed_tokens_cpu[: len(names)].astype(np.int64)),
            row_starts=torch.from_numpy(row_starts),
            row_counts=torch.from_numpy(row_counts),
            prefix_lens=torch.from_numpy(prefix_lens),
            has_tree=torch.from_numpy(has_tree),
            any_tree=bool(has_tree.any()),
            branches=torch.from_numpy(branches),
            any_prefix=bool(prefix_lens.any()),
            tree_starts=tree_starts,
            logit_starts=logit_starts,
        )

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Attaches the step's trees to every layer's metadata."""
        per_layer, common = super()._build_attention_metadata(*args, **kwargs)  # type: ignore[misc]
        if self._step is not None:
            self._step.metadata = per_layer
        self._attach_trees(self._step, per_layer)
        if self.pacer is not None:
            self.pacer.forward_begins()
        return per_layer, common

    # Verification

    def _sample(self, logits: Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        """Walks every tree along the target's samples, then compacts the KV cache."""
        step = self._step
        assert step is not None
        step.accepted, logprobs = self._verify(step, logits)
        self._compact(step)
        return SamplerOutput(sampled_token_ids=step.accepted.tokens.to(torch.int32), logprobs_tensors=logprobs)

    def _levels(self, step: Step) -> int:
        """Upper bound of the depths in a step."""
        return self.drafter.tree_config.levels if step.any_tree else 0

    def _walk_by_levels(self, step: Step, logits: Tensor) -> tuple[Accepted, LogprobsTensors | None]:
        """Samples one token per request and level, each as plain decoding would have it there."""
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

        accepted = walk(step.trees, sample, self._levels(step))
        return accepted, _join_logprobs([s.logprobs_tensors for s in steps])

    def _metadata_at(self, metadata: SamplingMetadata, emitted: list[Tensor], active: Tensor) -> SamplingMetadata:
        """Sampling metadata for the next token of the walk, as plain decoding would have it there.

        Only active requests may advance their generators, and a prompt chunk's sample is discarded, so it
        draws nothing. Penalties, bad words and minimum lengths see the tokens emitted on the way.
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
            logitsprocs=processors_after(metadata.logitsprocs, len(emitted)),
            spec_token_ids=None,
            thinking_budget_state_holder=None,  # a request with a budget has no drafts
        )

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
        assert step is not None and step.metadata is not None
        names = self.input_batch.req_ids
        drafts: list[list[int]] = [[] for _ in names]
        drafting, shape = self._plan_draft(step, names, sampled_token_ids, drafts)
        paged = step.metadata[HEAD_LAYER]
        waits = not drafting and self.pacer is not None and self.backlog.takes(names)
        if waits and all(sampled_token_ids) and not step.any_prefix:
            self._leave_for_later(step, names, sampled_token_ids, hidden_states, paged.slot_mapping)
            return drafts
        self.catch_up(paged)
        rows = self._committed(step, sampled_token_ids)
        next_tokens, positions = self._read(step, rows)
        chosen = torch.tensor(drafting, dtype=torch.int64)
        last = rows.last[chosen]
        per_tree = torch.stack([chosen, last, step.base[chosen] + rows.offsets[last] + 1])
        requests, last, context_lens = upload(per_tree, self.device)
        cache = self._head_cache(paged, requests, context_lens, paged.slot_mapping[rows.destinations])
        drafter = self.drafter.drafter
        x = drafter.observe(RoundInput(hidden_states[rows.sources], next_tokens, positions), cache)
        if drafting:
            roots = Roots(x[last], next_tokens[last], positions[last])
            growing = [names[i] for i in drafting]
            if self.pacer is None:
                trees = self._grow(roots, cache, shape)
            else:
                random, others = self._random(growing), len(names) - len(growing)
                trees = self.pacer.grow(growing, shape, random, others, lambda: self._grow(roots, cache, shape))
            trees = first_ranks(trees)
            for i, tokens in zip(drafting, self.tree_store.put(growing, trees), strict=True):
                drafts[i] = tokens
        return drafts

    def _read(self, step: Step, rows: CommittedRows) -> tuple[Tensor, Tensor]:
        """``(next_tokens [T], positions [T]) int64`` of the committed rows, on the device."""
        positions = step.base[rows.requests] + rows.offsets
        next_tokens = self.input_batch.token_ids_cpu_tensor[rows.requests, positions + 1].long()
        next_tokens, positions = upload(torch.stack([next_tokens, positions]), self.device)
        return next_tokens, positions

    def _leave_for_later(
        self,
        step: Step,
        names: Sequence[str],
        sampled_token_ids: list[list[int]],
        hidden_states: Tensor,
        slots: Tensor,
    ) -> None:
        """Keeps a step's committed rows until the head is asked for a draft."""
        if not step.any_tree:  # one row of each request, in their order
            next_tokens = torch.tensor([tokens[0] for tokens in sampled_token_ids], dtype=torch.int64)
            features, slots = hidden_states[: len(names)].clone(), slots[: len(names)].clone()
            read = RoundInput(features, next_tokens, step.base)
        else:
            rows = self._committed(step, sampled_token_ids)
            read, slots = RoundInput(hidden_states[rows.sources], *self._read(step, rows)), slots[rows.destinations]
        self.backlog.add(names, read, slots)

    def catch_up(self, paged: Any) -> None:
        """Lets the head read what waits for it.

        Args:
            paged: any step's metadata of the head's attention layer.
        """
        if len(self.backlog):
            rows, slots = self.backlog.take()
            nobody = slots[:0]
            self.drafter.drafter.observe(rows, self._head_cache(paged, nobody, nobody, slots))

    def _plan_draft(
        self, step: Step, names: Sequence[str], sampled_token_ids: list[list[int]], drafts: list[list[int]]
    ) -> tuple[list[int], DraftShape]:
        """Which requests the head drafts for, and trees of which shape; puts the others' continuations into drafts."""
        drafting = [i for i, tokens in enumerate(sampled_token_ids) if tokens and self._may_draft(names[i])]
        full = self.drafter.drafter.full
        if self.pacer is None:
            return drafting, full
        assert step.accepted is not None
        rows = None if step.any_prefix else int(step.row_counts.sum())
        self.pacer.verified(names, step.trees, step.has_tree, rows, step.accepted)
        random = self._random(names)
        self.pacer.followed(names, sampled_token_ids, random)
        if not drafting:
            return drafting, full
        wanted = [names[i] for i in drafting]
        chosen = torch.tensor(drafting)
        lengths = (
            step.base[chosen] + step.prefix_lens[chosen] + torch.tensor([len(sampled_token_ids[i]) for i in drafting])
        )
        decision, found = self.pacer.decide(
            wanted,
            random[drafting],
            len(names) - len(drafting),
            self._room(wanted),
            self.input_batch.token_ids_cpu_tensor,
            chosen,
            lengths + 1,
        )
        repeats = decision.repeated > 0
        if found is not None:
            places = repeats.nonzero()[0].tolist()
            chains = found.select(torch.tensor(places))
            kept = self.tree_store.put([wanted[place] for place in places], chains, branch=False)
            for place, tokens in zip(places, kept, strict=True):
                drafts[drafting[place]] = tokens
        left = [i for i, repeated in zip(drafting, repeats.tolist(), strict=True) if not repeated]
        return left[: decision.drafting], decision.shape or full

    def _random(self, names: Sequence[str]) -> Bools:
        """``[B]`` whether the requests sample."""
        params = [self.requests[name].sampling_params for name in names]
        return np.array([p is not None and p.temperature >= GREEDY_BELOW for p in params])

    def _room(self, names: Sequence[str]) -> Integers:
        """``[B] int64`` draft tokens that the requests could still use; a step emits one more."""
        states = [self.requests[name] for name in names]
        limits = [(s.sampling_params.max_tokens, len(s.output_token_ids)) for s in states]
        return np.array([limit - done - 1 if limit is not None else MAX_NODES for limit, done in limits])

    def _committed(self, step: Step, sampled_token_ids: list[list[int]]) -> CommittedRows:
        """The rows that stay; a request whose sample was discarded keeps its prompt chunk."""
        assert step.accepted is not None
        accepted = torch.tensor([max(len(tokens) - 1, 0) for tokens in sampled_token_ids], dtype=torch.int64)
        return committed_rows(step.row_starts, step.prefix_lens, accepted, step.accepted.path)

    def _may_draft(self, name: str) -> bool:
        """Whether drafts could be verified for this request; otherwise it is served plainly."""
        state = self.requests[name]
        params = state.sampling_params
        produced = len(state.output_token_ids)
        return (
            params is not None
            and params.thinking_token_budget is None  # the budget's state does not follow a path yet
            and (params.max_tokens is None or params.max_tokens - produced > 1)
        )

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """As vLLM's, but None without drafts; the scheduler needs the topology where a grammar's state follows it."""
        drafts = super().take_draft_token_ids()  # type: ignore[misc]
        if drafts is None or not any(drafts.draft_token_ids):
            return None
        parents = {
            name: self.tree_store.parents(name)
            for name, tokens in zip(drafts.req_ids, drafts.draft_token_ids, strict=True)
            if tokens and self.requests[name].sampling_params.structured_outputs is not None
        }
        return DraftTrees(drafts.req_ids, drafts.draft_token_ids, parents) if parents else drafts

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        """Always: the scheduler cuts each tree at the model's maximum length, request by request."""
        return common_attn_metadata is not None

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        super()._on_request_state_removed(req_id, req_state)  # type: ignore[misc]
        self.tree_store.discard(req_id)
        if self.pacer is not None:
            self.pacer.forget(req_id)

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


def first_ranks(trees: TreeBatch) -> TreeBatch:
    """The trees of the first tensor-parallel rank, on every rank.

    The scheduler knows the first rank's only, and a step's rows must be the same everywhere. The target's samples are,
    as in vLLM, because every rank has all logits and the same generators. But trees also follow from what each rank
    computes for itself, which another number of threads, another tuning of kernels, or another order in which
    a sum is taken may round differently.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return trees
    width = trees.width
    counts = trees.num_nodes.unsqueeze(1)
    packed = torch.cat([trees.tokens, trees.parents, trees.depths, trees.ancestors, counts], dim=1)
    group.broadcast(packed)
    tokens, parents, depths, ancestors, counts = packed.split([width, width, width, width, 1], dim=1)
    return TreeBatch(tokens, parents, depths, ancestors, counts.squeeze(1))


def _join_logprobs(steps: list[LogprobsTensors | None]) -> LogprobsTensors | None:
    """``S`` tensors of B rows as one of B * S rows, request by request."""
    present = [s for s in steps if s is not None]
    if not present:
        return None
    if len(present) == 1:
        return present[0]
    return LogprobsTensors(*(torch.stack([s[i] for s in present], dim=1).flatten(0, 1) for i in range(3)))
