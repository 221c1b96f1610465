"""Measures how many tokens trees win, request by request, in an engine that runs in this process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from jakiro_vllm.config import TreeConfig
from jakiro_vllm.decode.drafter import TreeDrafter
from jakiro_vllm.draft.checkpoint import load_head


@dataclass
class Tally:
    """What one request was given.

    Attributes:
        trees: verified.
        tokens: emitted by those verifications, bonus tokens included.
        depths: how often each depth was accepted, from depth 1.
    """

    trees: int = 0
    tokens: int = 0
    depths: list[int] = field(default_factory=list)

    def add(self, emitted: int) -> None:
        """Counts one verification that emitted that many tokens."""
        self.trees += 1
        self.tokens += emitted
        self.depths += [0] * (emitted - 1 - len(self.depths))
        for depth in range(emitted - 1):
            self.depths[depth] += 1


@dataclass(frozen=True)
class Acceptance:
    """The tallies of a run, one per prompt in the order of the prompts."""

    tallies: Sequence[Tally]

    @property
    def trees(self) -> int:
        """Verified in all."""
        return sum(tally.trees for tally in self.tallies)

    @property
    def length(self) -> float:
        """Acceptance length: tokens per target forward, bonus token included; the true mean over all forwards."""
        return _length(self.tallies)

    def depth_rates(self, depth: int) -> list[float]:
        """Per depth from 1 to ``depth``, the share of trees in which it was accepted."""
        counts = [sum(t.depths[d] for t in self.tallies if len(t.depths) > d) for d in range(depth)]
        return [count / max(1, self.trees) for count in counts]

    def interval(self, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
        """95% bootstrap interval of ``length`` over prompts."""
        return _interval([[_length(self._again(chosen))] for chosen in _resampled(len(self.tallies), resamples, seed)])

    def ratio_interval(self, other: Acceptance, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
        """95% bootstrap interval of the ratio of lengths to another run on the same prompts, paired by prompt."""
        return _interval(
            [
                [_length(self._again(chosen)) / _length(other._again(chosen))]
                for chosen in _resampled(len(self.tallies), resamples, seed)
            ]
        )

    def _again(self, chosen: Sequence[int]) -> list[Tally]:
        return [self.tallies[i] for i in chosen]


def _length(tallies: Sequence[Tally]) -> float:
    trees = sum(tally.trees for tally in tallies)
    return sum(tally.tokens for tally in tallies) / max(1, trees)


def _resampled(count: int, resamples: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(count), k=count) for _ in range(resamples)]


def _interval(values: list[list[float]]) -> tuple[float, float]:
    low, high = torch.tensor(values).flatten().double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


class AcceptanceMeter:
    """Runs prompts through an engine with trees, with any head that fits its target."""

    def __init__(self, llm: Any) -> None:
        """Watches the engine's runner.

        Args:
            llm: ``vllm.LLM`` with method ``jakiro``, made with ``VLLM_ENABLE_V1_MULTIPROCESSING=0``.
        """
        self.llm = llm
        self.runner: Any = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self._tallies: dict[str, Tally] = {}
        propose = self.runner.propose_draft_token_ids

        def watched(scheduler_output: Any, sampled: Any, *args: Any, **kwargs: Any) -> Any:
            trees = self.runner._step.has_tree.tolist()
            for name, tokens, verified in zip(self.runner.input_batch.req_ids, sampled, trees, strict=True):
                if verified and tokens:
                    self._tallies.setdefault(name, Tally()).add(len(tokens))
            return propose(scheduler_output, sampled, *args, **kwargs)

        self.runner.propose_draft_token_ids = watched

    def use(self, head: str | Path, tree: TreeConfig) -> TreeDrafter:
        """Drafts with another head or other trees from now on.

        Args:
            head: a folder; of as many query heads as the engine's first head.
            tree: of at most as many nodes as the engine was made with; always of that size, whatever the load.
        """
        proposer = self.runner.drafter
        old: TreeDrafter = proposer.drafter
        new = load_head(head, old.head.fc.weight.dtype).to(self.runner.device)
        if new.spec.num_heads != old.head.spec.num_heads:
            raise ValueError(f"{head} has {new.spec.num_heads} query heads, the engine's {old.head.spec.num_heads}")
        new.rotary_table = old.head.rotary_table
        proposer.drafter = TreeDrafter(new, tree, old.embed, old.lm_head)
        proposer.tree_config = tree
        self.runner._store = self.runner.pacer = None
        self.llm.reset_prefix_cache()  # it holds the other head's keys
        return proposer.drafter

    def measure(self, prompts: Sequence[Sequence[int]], params: Any) -> Acceptance:
        """Completes the prompts.

        Args:
            prompts: token ids.
            params: ``vllm.SamplingParams``, one for all prompts or one for each.
        """
        self._tallies.clear()
        self.llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
        # vLLM numbers the requests of a call in their order, and appends a suffix.
        names = sorted(self._tallies, key=lambda name: int(name.split("-")[0]))
        return Acceptance([self._tallies[name] for name in names])
