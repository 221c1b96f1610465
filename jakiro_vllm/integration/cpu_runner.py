"""Trees on the CPU runner: work on exactly the rows there are, since a host may look at any value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from jakiro_vllm.cache.commit import moved_rows
from jakiro_vllm.decode.drafter import DraftShape, Roots
from jakiro_vllm.integration.cpu_attention import TreeCPUAttentionBackend, TreeRows, make_tree_jobs
from jakiro_vllm.integration.head_cache import CPUHeadCache, NoPages
from jakiro_vllm.integration.pacing import make_pacer, time_rows
from jakiro_vllm.integration.runner import JakiroRunnerMixin, Step
from jakiro_vllm.integration.sampling import independent_of_path
from jakiro_vllm.tree.walk import Accepted, walk_highest


class JakiroCPUModelRunner(JakiroRunnerMixin, CPUModelRunner):
    """vLLM's CPU runner V1 with trees."""

    tree_backend = TreeCPUAttentionBackend

    @torch.inference_mode()
    def time_steps(self) -> None:
        """Times verification and draft by rows, where trees adapt to the load; takes a few seconds.

        Attention is left out: it follows the contexts, which steps will teach.
        """
        config, drafter = self.drafter.tree_config, self.drafter.drafter
        if not config.adaptive:
            return

        def verify(rows: int) -> None:
            hidden, _ = self._dummy_run(rows)
            self.model.compute_logits(hidden)

        def draft(rows: int) -> None:
            x = torch.zeros(rows, drafter.head.spec.hidden_size, dtype=drafter.head.fc.weight.dtype)
            zeros = torch.zeros(rows, dtype=torch.int64)
            drafter.grow(Roots(x, zeros, zeros), NoPages(), DraftShape(1, 1))

        requests = self.max_num_reqs
        self.pacer = make_pacer(
            drafter,
            time_rows(verify, min(self.max_num_tokens, requests * config.num_nodes)),
            time_rows(draft, requests * config.top_k),
        )

    def _attach_trees(self, step: Step | None, per_layer: dict[str, Any]) -> None:
        if step is None or step.ancestors is None or step.depths is None:
            return
        chosen = step.branches.nonzero().squeeze(1)
        rows = step.ancestors.nonzero().squeeze(1)  # a tree row sees at least itself
        only_trees = bool(step.branches.all())
        for metadata in {id(m): m for m in per_layer.values()}.values():
            jobs = make_tree_jobs(
                metadata.block_table, chosen, step.base[chosen], step.row_starts[chosen], step.row_counts[chosen]
            )
            metadata.trees = TreeRows(jobs, rows, step.ancestors, step.depths, only_trees)

    def _verify(self, step: Step, logits: Tensor) -> tuple[Accepted, LogprobsTensors | None]:
        """Walks at once where all requests are greedy and their logits are all that matters, as vLLM samples then."""
        if not step.any_tree:
            return self._sample_roots(step, logits)
        metadata = self.input_batch.sampling_metadata
        if not metadata.all_greedy or not independent_of_path(metadata):
            return self._walk_by_levels(step, logits)
        return walk_highest(step.trees, logits, step.logit_starts, self._levels(step)), None

    def _sample_roots(self, step: Step, logits: Tensor) -> tuple[Accepted, LogprobsTensors | None]:
        """A step without trees: one token for each request."""
        metadata, drafted = self.input_batch.sampling_metadata, len(logits) != len(step.row_counts)
        if metadata.generators or drafted:  # drafts that are no tree, or generators that must not all advance
            every = torch.ones(len(step.row_counts), dtype=torch.bool)
            metadata = self._metadata_at(metadata, [], every)
        output = self.sampler(logits=logits[step.logit_starts] if drafted else logits, sampling_metadata=metadata)
        tokens = output.sampled_token_ids.long()
        path = torch.zeros_like(tokens)
        return Accepted(path, tokens, path.squeeze(1)), output.logprobs_tensors

    def _compact(self, step: Step) -> None:
        if step.ancestors is None:
            return
        assert step.accepted is not None and step.metadata is not None
        sources, destinations = moved_rows(step.tree_starts, step.accepted)
        if not sources.numel():
            return
        layers = self.compilation_config.static_forward_context
        for name, metadata in step.metadata.items():
            if metadata.trees is not None and name in metadata.trees.kept:
                layer = layers[name]
                layer.impl.move_rows(layer, metadata.trees, sources, metadata.slot_mapping[destinations])

    def _head_cache(self, metadata: Any, requests: Tensor, context_lens: Tensor, slots: Tensor) -> CPUHeadCache:
        return CPUHeadCache(self.drafter.attention, metadata.block_table[requests], context_lens, slots)
