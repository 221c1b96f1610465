"""Between the runner and the budget: the clock, and what is known of the trees that a step verified."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger

from jakiro_vllm.decode.budget import BudgetController, Floats, Integers, RowTimes
from jakiro_vllm.decode.drafter import DraftShape, TreeDrafter
from jakiro_vllm.tree.batch import TreeBatch
from jakiro_vllm.tree.walk import Accepted

logger = init_logger("vllm.plugins.jakiro.pacing")

#: Runs of which the fastest counts, and seconds of a run beyond which no larger one is timed.
RUNS, LONGEST = 3, 0.5


#: Steps that all teach, and of the later ones every so many beside the probes, since learning takes time, too. It
#: shares no factor with the intervals of the other experiments, which might otherwise always fall between.
FIRST_STEPS, LEARN_STEPS = 256, 5


class Pacer:
    """Times the steps of a runner on a platform where a call returns when its work is done."""

    def __init__(self, controller: BudgetController) -> None:
        self.controller = controller
        #: Of the latest tree of each request: log-probabilities and kinds of its nodes.
        self._drafts: dict[str, tuple[Floats, Integers]] = {}
        self._began = self._verified = time.perf_counter()
        self._drafted = 0.0
        self._steps = 0

    def begin(self) -> None:
        """A step begins."""
        now = time.perf_counter()
        self.controller.learn_other(now - self._verified - self._drafted, drafted=self._drafted > 0)
        self._began, self._drafted = now, 0.0
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
            names: of the B requests.
            trees: that were verified.
            has_tree: ``[B] bool``.
            rows: of the step, if all of them were roots and nodes; None otherwise.
            accepted: paths.
        """
        self._verified = time.perf_counter()
        if not self._learns:
            return
        if rows is not None:
            self.controller.learn_verify(rows, self._verified - self._began)
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

    def plan(self, drafting: int, others: int, random: int) -> tuple[DraftShape | None, int]:
        """As ``BudgetController.plan``; the first rank's on every rank, since all must launch the same."""
        shape, count = self.controller.plan(drafting, others, random)
        planned = [shape.levels, shape.width, count] if shape else [0, 0, 0]
        levels, width, count = map(int, first_ranks_numbers(planned))
        return DraftShape(levels, width) if levels else None, count

    def grow(
        self, names: Sequence[str], shape: DraftShape, random: Tensor, others: int, draft: Callable[[], TreeBatch]
    ) -> TreeBatch:
        """Times a draft, and keeps of its trees what is worth verifying."""
        started = time.perf_counter()
        trees = draft()
        self._drafted = time.perf_counter() - started
        if self._learns:
            self.controller.learn_draft(shape, trees.batch_size, self._drafted)
        assert trees.scores is not None
        scores, depths = trees.scores.numpy().astype(np.float64), trees.depths.numpy()
        kept = self.controller.select(shape, scores, depths, trees.parents.numpy(), random.numpy(), others)
        kinds = self.controller.kinds(shape, depths, random.numpy()[:, None])
        self._drafts.update(zip(names, zip(scores, kinds, strict=True), strict=True))
        return replace(trees, num_nodes=torch.from_numpy(kept) + 1)

    def forget(self, name: str) -> None:
        """A request has ended."""
        self._drafts.pop(name, None)


def first_ranks_numbers(numbers: Sequence[float]) -> list[float]:
    """The first tensor-parallel rank's, on every rank."""
    group = get_tp_group()
    if group.world_size == 1:
        return list(numbers)
    packed = torch.tensor(numbers, dtype=torch.float64)
    group.broadcast(packed)
    found: list[float] = packed.tolist()
    return found


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
    for what, times in (("a verification", verify), ("a forward of the head", draft)):
        table = ", ".join(f"{r:.0f}: {1e3 * s:.2f}" for r, s in zip(times.rows, times.seconds, strict=True))
        logger.info("Milliseconds of %s by rows: %s", what, table)
    return Pacer(BudgetController(drafter.full, drafter.forwards, verify, draft))
