"""Between the runner and the budget: the clock, and what is known of the drafts that a step verified.

B requests, W tokens of a continuation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger

from jakiro_vllm.decode.budget import BudgetController, Decision
from jakiro_vllm.decode.costs import Bools, Floats, Integers, RowTimes
from jakiro_vllm.decode.drafter import DraftShape, TreeDrafter
from jakiro_vllm.decode.lookup import Lookup
from jakiro_vllm.tree.batch import TreeBatch, chains
from jakiro_vllm.tree.walk import Accepted

logger = init_logger("vllm.plugins.jakiro.pacing")

#: Runs of which the fastest counts, and seconds of a run beyond which no larger one is timed.
RUNS, LONGEST = 3, 0.5


#: Steps that all teach, and of the later ones every so many beside the probes, since learning takes time, too. It
#: shares no factor with the intervals of the other experiments, which might otherwise always fall between.
FIRST_STEPS, LEARN_STEPS = 256, 5


class Pacer:
    """Times the steps of a runner on a platform where a call returns when its work is done.

    What is neither the target's forward nor a draft counts from one decision to the next: that much a decision costs.
    """

    def __init__(self, controller: BudgetController, lookup: Lookup | None = None) -> None:
        """Starts its clock.

        Args:
            controller: decides.
            lookup: finds what a request's own text suggests; None if that is not wanted.
        """
        self.controller = controller
        self.lookup = lookup
        #: Of the latest tree of each request: log-probabilities and kinds of its nodes.
        self._drafts: dict[str, tuple[Floats, Integers]] = {}
        self._began = self._decided = time.perf_counter()
        self._forward = self._drafted = 0.0
        self._steps = 0
        #: The decision that the next step follows, and its requests; that which the last step followed, if all rows of
        #: that step were roots and nodes.
        self._next: tuple[Decision, int] | None = None
        self._before: tuple[Decision, int] | None = None

    def forward_begins(self) -> None:
        """The attention metadata is there, the last of the forward's inputs that takes long."""
        self._began = time.perf_counter()

    def forward_ends(self) -> None:
        """The logits are there."""
        self._forward = time.perf_counter() - self._began
        self._steps += 1

    @property
    def _learns(self) -> bool:
        """Whether this step teaches; what a probe planned teaches when it is verified."""
        return self.controller.probing or self._steps <= FIRST_STEPS or self._steps % LEARN_STEPS == 0

    def verified(
        self,
        names: Sequence[str],
        trees: TreeBatch,
        has_tree: Tensor,
        rows: int | None,
        accepted: Accepted,
    ) -> None:
        """The step's samples are there.

        Args:
            names: of the requests.
            trees: that were verified.
            has_tree: ``[B] bool``.
            rows: of the step, if all of them were roots and nodes; None otherwise.
            accepted: paths.
        """
        self._before, self._next = self._next if rows is not None else None, None
        if not self._learns:
            return
        if rows is not None:
            self.controller.learn_verify(rows, self._forward)
        if not has_tree.any():
            return
        sizes = trees.num_nodes.numpy()
        scores = np.full((len(names), trees.width), np.nan)
        kinds = np.zeros(scores.shape, dtype=np.int64)
        for i in has_tree.nonzero().flatten().tolist():
            # vLLM gives a request that it resumes drafts of its own, all of them -1, which are no tree of ours.
            held = self._drafts.get(names[i])
            if held is not None and len(held[0]) >= sizes[i]:
                nodes = slice(1, sizes[i])
                scores[i, nodes], kinds[i, nodes] = held[0][nodes], held[1][nodes]
        hits = np.zeros(scores.shape, dtype=bool)
        on_path = np.arange(accepted.path.shape[1]) <= accepted.num_accepted.numpy()[:, None]
        hits[on_path.nonzero()[0], accepted.path.numpy()[on_path]] = True
        offered = ~np.isnan(scores) & (trees.tokens.numpy() >= 0)  # a grammar may have struck some
        self.controller.learn_trees(scores[offered], hits[offered], kinds[offered])

    def decide(
        self,
        names: Sequence[str],
        random: Bools,
        others: int,
        room: Integers,
        texts: Tensor,
        rows: Tensor,
        lengths: Tensor,
    ) -> tuple[Decision, TreeBatch | None]:
        """What the next step verifies.

        Args:
            names: of the B requests that could have a tree.
            random: ``[B]`` whether they sample.
            others: rows of other requests in the next step.
            room: ``[B]`` draft tokens beyond which no more are wanted.
            texts: ``[R, L] int32`` token ids.
            rows: ``[B] int64`` of each request's text.
            lengths: ``[B] int64`` its tokens.

        Returns:
            ``(decision, the continuations' chains [B, 1 + W], None if none is to be verified)``; the first rank's on
            every rank, since all must launch the same.
        """
        now = time.perf_counter()
        if self._before is not None:
            decision, requests = self._before
            seconds = now - self._decided - self._forward - self._drafted
            self.controller.learn_host(decision.source, requests, max(seconds, 0.0))
        self._decided, self._drafted = now, 0.0
        chances = tokens = None
        if self.lookup is not None:
            tokens, repeated = self.lookup.find(names, texts, rows, lengths)
            chances = self.lookup.chances(repeated, random)
            chances[np.arange(chances.shape[1]) >= room[:, None]] = 0.0
        decision = first_ranks_decision(self.controller.decide(random, others, chances))
        self._next = decision, len(names) + others
        for row in decision.repeated.nonzero()[0].tolist():
            self._drafts.pop(names[row], None)  # the head's latest tree is no longer what will be verified
        if tokens is None or not decision.repeated.any():
            return decision, None
        roots = tokens.new_full((len(tokens), 1), -1)
        return decision, chains(torch.cat([roots, tokens], dim=1), torch.from_numpy(decision.repeated) + 1)

    def followed(self, names: Sequence[str], emitted: Sequence[Sequence[int]], random: Bools) -> None:
        """As ``Lookup.followed``."""
        if self.lookup is not None:
            self.lookup.followed(names, emitted, random)

    def grow(
        self, names: Sequence[str], shape: DraftShape, random: Bools, others: int, draft: Callable[[], TreeBatch]
    ) -> TreeBatch:
        """Times a draft, and keeps of its trees what is worth verifying.

        Args:
            names: of the B requests that the head drafts for.
            shape: of the draft.
            random: ``[B]`` whether they sample.
            others: other requests in the next step.
            draft: grows the trees.
        """
        started = time.perf_counter()
        trees = draft()
        self._drafted = time.perf_counter() - started
        if self._learns:
            self.controller.learn_draft(shape, trees.batch_size, self._drafted)
        assert trees.scores is not None
        scores, depths = trees.scores.numpy().astype(np.float64), trees.depths.numpy()
        beside = (int(self._next[0].repeated.sum()), self._next[0].wins) if self._next else (0, 0.0)
        kept = self.controller.select(shape, scores, depths, trees.parents.numpy(), random, others, beside)
        kinds = self.controller.kinds(shape, depths, random[:, None])
        self._drafts.update(zip(names, zip(scores, kinds, strict=True), strict=True))
        return replace(trees, num_nodes=torch.from_numpy(kept) + 1)

    def forget(self, name: str) -> None:
        """A request has ended."""
        self._drafts.pop(name, None)
        if self.lookup is not None:
            self.lookup.forget(name)


def first_ranks_numbers(numbers: list[float]) -> list[float]:
    """The first tensor-parallel rank's, on every rank."""
    group = get_tp_group()
    if group.world_size == 1:
        return numbers
    packed = torch.tensor(numbers, dtype=torch.float64)
    group.broadcast(packed)
    found: list[float] = packed.tolist()
    return found


def first_ranks_decision(decision: Decision) -> Decision:
    """The first tensor-parallel rank's, on every rank: each knows how many requests there are."""
    levels, width = (decision.shape.levels, decision.shape.width) if decision.shape else (0, 0)
    found = first_ranks_numbers([levels, width, decision.drafting, decision.wins, *decision.repeated.tolist()])
    (levels, width, drafting), wins, repeated = map(int, found[:3]), found[3], np.array(found[4:], dtype=np.int64)
    return Decision(DraftShape(levels, width) if levels else None, drafting, repeated, wins)


def fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs; the first one, which may set things up, does not count."""
    run()
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    # Ranks run the same computations together, so all must stop after the same one.
    return first_ranks_numbers([min(seconds)])[0]


def time_rows(run: Callable[[int], object], most: int) -> RowTimes:
    """Times a computation at 1, 2, 4, ... rows up to ``most``, and stops where it takes long."""
    rows, seconds = [1], [fastest(lambda: run(1))]
    while rows[-1] < most and seconds[-1] < LONGEST:
        rows.append(min(2 * rows[-1], most))
        seconds.append(fastest(lambda: run(rows[-1])))
    return RowTimes(rows, seconds)


def make_pacer(drafter: TreeDrafter, verify: RowTimes, draft: RowTimes) -> Pacer:
    """A pacer that starts from what was timed, and says so in the log."""
    config = drafter.config
    for what, times in (("a verification", verify), ("a forward of the head", draft)):
        table = ", ".join(f"{r:.0f}: {1e3 * s:.2f}" for r, s in zip(times.rows, times.seconds, strict=True))
        logger.info("Milliseconds of %s by rows: %s", what, table)
    controller = BudgetController(drafter.full, drafter.forwards, verify, draft)
    return Pacer(controller, Lookup(config.node_budget) if config.lookup else None)
