"""Structured output with trees: the grammar's state follows each path of a tree.

The grammars live in the scheduler's process, the trees in the workers. Trees of structured requests come along with
their drafts (`DraftTrees`); the scheduler strikes out what the grammar forbids and gives every row the mask of the
state that its node stands for. vLLM's own manager of grammars only knows chains, so it is asked about a tree path by
path, which leaves reasoning, termination and the backends to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds

#: A draft token that is never accepted.
STRUCK = -1


@dataclass
class DraftTrees(DraftTokenIds):
    """A step's drafts, with the topology where a grammar needs it.

    Attributes:
        parents: by request: the parent of each draft token, as its place among them; -1 for children of the root.
    """

    parents: dict[str, list[int]] = field(default_factory=dict)


class JakiroScheduler(Scheduler):
    """vLLM's scheduler, which knows which drafts of a structured request hang under which."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parents: dict[str, list[int]] = {}

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """As vLLM's; a tree keeps its branches, and loses the nodes that the grammar forbids."""
        parents = draft_token_ids.parents if isinstance(draft_token_ids, DraftTrees) else {}
        self._parents = {name: own for name, own in self._parents.items() if name in self.requests} | parents
        drafts = dict(zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True))
        plain = {name: tokens for name, tokens in drafts.items() if name not in parents}
        super().update_draft_token_ids(DraftTokenIds(list(plain), list(plain.values())))
        for name, own in parents.items():
            request = self.requests.get(name)
            if request is None or request.is_finished():
                continue
            request.spec_token_ids = [] if request.is_prefill_chunk else self._permitted(request, drafts[name], own)

    def _permitted(self, request: Any, tokens: Sequence[int], parents: Sequence[int]) -> list[int]:
        """The drafts, where those that the grammar forbids, and all below them, are struck out."""
        permitted: list[int] = []
        for node, token in enumerate(tokens):
            parent = parents[node]
            alive = token != STRUCK and (parent < 0 or permitted[parent] != STRUCK)
            if alive:
                path = path_of(node, tokens, parents)
                alive = len(self.structured_output_manager.validate_tokens(request, path)) == len(path)
            permitted.append(token if alive else STRUCK)
        return permitted if any(token != STRUCK for token in permitted) else []

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """As vLLM's; the rows of a tree have the masks of the states that their paths lead to."""
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        trees = {name: tokens for name, tokens in scheduled.items() if name in self._parents}
        if not trees:
            return super().get_grammar_bitmask(scheduler_output)
        # vLLM masks a tree's root, and leaves room for the other rows where its workers look for them.
        hidden = {name: [STRUCK] * len(tokens) for name, tokens in trees.items()}
        found = super().get_grammar_bitmask(
            replace(scheduler_output, scheduled_spec_decode_tokens={**scheduled, **hidden})
        )
        if found is None:
            return None
        masks = found.grammar_bitmask.copy()  # vLLM lends its buffer, which the paths are about to use
        names = found.structured_output_request_ids
        counts = [1 + len(scheduled.get(name, ())) for name in names]
        for name, first in zip(names, first_rows(counts, len(masks)), strict=True):
            for path in paths(trees[name], self._parents[name]) if name in trees else ():
                own = [trees[name][node] for node in path]
                chain = self.structured_output_manager.grammar_bitmask(self.requests, [name], {name: own})
                masks[[first + 1 + node for node in path]] = chain[1 : 1 + len(path)]
        return replace(found, grammar_bitmask=masks)


def first_rows(counts: Sequence[int], rows: int) -> list[int]:
    """Where each request's masks begin: one after the other in vLLM 0.32, in blocks of equal size in 0.33.

    Args:
        counts: masks that each request needs.
        rows: of the whole.
    """
    if rows == sum(counts):
        return [0, *accumulate(counts[:-1])]
    return [i * (rows // len(counts)) for i in range(len(counts))]


def path_of(node: int, tokens: Sequence[int], parents: Sequence[int]) -> list[int]:
    """The tokens from below the root to a node."""
    return [tokens[place] for place in _upwards(node, parents)][::-1]


def paths(tokens: Sequence[int], parents: Sequence[int]) -> Iterator[list[int]]:
    """Paths of places from below the root downwards that together visit every node that is not struck out."""
    alive = [node for node, token in enumerate(tokens) if token != STRUCK]
    inner = {parents[node] for node in alive}
    for node in alive:
        if node not in inner:
            yield list(_upwards(node, parents))[::-1]


def _upwards(node: int, parents: Sequence[int]) -> Iterator[int]:
    while node >= 0:
        yield node
        node = parents[node]
