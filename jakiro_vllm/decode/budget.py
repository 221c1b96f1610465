"""How much to draft: what a step costs, what its nodes will win, and the trees that make most tokens per second.

A verification of more rows takes longer, a draft of more levels too, and what a node wins is the probability that the
target's samples reach it. The more requests share a step, the sooner rows cost more than they win: so the best trees
are large at a low load, narrow at a higher one, and none at all beyond. Three estimates, refined at every step, decide:

* `RowTimes`: seconds of a verification, and of a forward of the draft head, by rows;
* `Calibration`: how often nodes were accepted that the head gave a certain probability, by their kind;
* the latest trees of the full shape: what levels and candidates hold how much of that probability.

Before a draft, `plan` chooses its shape; after it, `select` keeps the nodes, of all requests together, whose
probabilities are worth their rows. Nothing here changes what is emitted: a tree is verified exactly, whatever its size.

B requests, N nodes of a tree (root included), K knots of a table.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jakiro_vllm.decode.drafter import DraftShape

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]

#: What each kind of probe may take of the time, and the fewest and most steps between them: drafts of the full shape
#: where less is planned, of which one tree is verified whole, so that its worth stays known; and steps without a draft
#: where one is planned, so that their cost does, the more often the less a draft gains.
PROBE_SHARE, PROBE_STEPS = 0.01, (8, 512)
#: Steps between those that verify only half of what seems best: around a best number of rows rates hardly differ, and
#: it is found only if times on both sides of it are known.
HALF_STEPS = 32
#: Depths among which a plan chooses, up to the configured one: neighbours hardly differ where trees are deep.
LEVELS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14)
#: Steps for which a plan holds.
PLAN_STEPS = 32
#: Trees whose nodes stand for those of the next draft.
REMEMBERED_TREES = 24
#: Trees without which nothing is planned.
FIRST_TREES = 24
#: What a draft must promise of the rate without one: estimates err, and a plain step is what none would do.
LEAST_GAIN = 1.05
#: Steps without a draft before the first plan, so that their cost is known.
FIRST_PLAIN = 3


class RowTimes:
    """Seconds that a computation takes, by rows: lines between knots, and beyond the last one its proportion."""

    #: How far one measurement moves the table towards itself, and the factor in rows at which 1/e of that is left.
    RATE, REACH = 0.15, 5.0
    #: A measurement further from the estimate than this factor counts as if it were this far: machines stall.
    FURTHEST = 2.0

    def __init__(self, rows: Sequence[int], seconds: Sequence[float]) -> None:
        """Takes measurements.

        Args:
            rows: ``[K]`` ascending, at least one.
            seconds: ``[K]`` positive.
        """
        self.rows = np.asarray(rows, dtype=np.float64)
        self._log_rows = np.log(self.rows)
        self._logs = np.log(np.asarray(seconds, dtype=np.float64))
        self._seconds: Floats | None = None

    @property
    def seconds(self) -> Floats:
        """``[K]`` at the knots: what is nearest to the measurements and never falls (isotonic regression)."""
        if self._seconds is None:
            self._seconds = np.exp(_rising(self._logs.tolist()))
        return self._seconds

    def __call__(self, rows: ArrayLike) -> Floats:
        """Seconds for any numbers of rows."""
        numbers = np.asarray(rows, dtype=np.float64)
        return np.interp(numbers, self.rows, self.seconds) * np.maximum(numbers / self.rows[-1], 1.0)

    def learn(self, rows: int, seconds: float) -> None:
        """Moves the table towards a measurement."""
        off = min(max(seconds / float(self(rows)), 1 / self.FURTHEST), self.FURTHEST)
        distance = np.abs(math.log(max(rows, 1)) - self._log_rows) / math.log(self.REACH)
        self._logs += self.RATE * math.log(off) * np.exp(-distance)
        self._seconds = None


def _rising(values: list[float]) -> list[float]:
    """The numbers that never fall and are nearest to the given ones, in squares: neighbours that fall are averaged."""
    blocks: list[tuple[float, int]] = []  # mean, how many
    for value in values:
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            before, more = blocks.pop()
            mean, count = (before * more + mean * count) / (more + count), more + count
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]


class Calibration:
    """How often a node is accepted, by the log-probability that the head gave its path; its kinds apart.

    A greedy target takes its best token for certain, so a head's 0.6 may come true nine times of ten; a head may be too
    sure of itself; and the level that it foresees without a forward is less certain than its word.
    """

    CENTERS = -np.array([0.002, 0.01, 0.03, 0.08, 0.15, 0.25, 0.4, 0.6, 0.9, 1.3, 1.8, 2.4, 3.2, 4.2, 5.5, 7.5, 10.0])
    #: Of a request that samples; of a level without a forward of its own. Kinds are sums of these.
    RANDOM, FORESEEN, KINDS = 1, 2, 4
    #: What the head's own word counts for, in nodes.
    PRIOR = 2.0
    #: Of the counts, what one step leaves.
    FADE = 0.998

    def __init__(self) -> None:
        self._seen = np.full((self.KINDS, len(self.CENTERS)), self.PRIOR)
        self._accepted = self.PRIOR * np.exp(np.broadcast_to(self.CENTERS, self._seen.shape))
        self._edges = (self.CENTERS[1:] + self.CENTERS[:-1]) / 2
        self._rates: Floats | None = None

    def learn(self, scores: Floats, accepted: Bools, kinds: Integers) -> None:
        """Counts verified nodes.

        Args:
            scores: ``[M]`` log-probabilities of their paths.
            accepted: ``[M]``.
            kinds: ``[M]``.
        """
        places = kinds, np.searchsorted(-self._edges, -scores)
        prior = self.PRIOR * np.exp(self.CENTERS)
        self._seen += (1 - self.FADE) * (self.PRIOR - self._seen)
        self._accepted += (1 - self.FADE) * (prior - self._accepted)
        np.add.at(self._seen, places, 1.0)
        np.add.at(self._accepted, places, accepted.astype(np.float64))
        self._rates = None

    def __call__(self, scores: Floats, kinds: Integers) -> Floats:
        """Probabilities of acceptance, never higher for a lower score.

        Args:
            scores: any shape, -inf for what is no node.
            kinds: of a shape that broadcasts to it.
        """
        if self._rates is None:
            self._rates = np.minimum.accumulate(self._accepted / self._seen, axis=1)  # centers descend
        found = [np.interp(-scores, -self.CENTERS, rates) for rates in self._rates]
        return np.where(np.isneginf(scores), 0.0, np.choose(kinds, found))


@dataclass(frozen=True)
class _Remembered:
    """One tree of the full shape: its draft nodes' log-probabilities, depths, parents and kinds."""

    scores: Floats
    depths: Integers
    parents: Integers
    kinds: Integers

    @cached_property
    def breadths(self) -> Integers:
        """The highest rank among siblings on each node's path: a draft of width w has the nodes below w."""
        ranks = np.tril(self.parents[:, None] == self.parents, -1).sum(axis=1)
        breadths = ranks.copy()
        for node in range(1, len(ranks)):  # parents come first
            if self.parents[node] > 0:
                breadths[node] = max(ranks[node], breadths[self.parents[node] - 1])
        return breadths


def _about(count: int) -> int:
    """The count, or beyond 8 the one of four numbers per octave that is next below."""
    step = 1 << max(0, count.bit_length() - 3)
    return count // step * step if count > 8 else count


def _spaced(cost: float) -> int:
    """Steps between probes that cost so many steps each."""
    fewest, most = PROBE_STEPS
    return min(max(fewest, math.ceil(cost / PROBE_SHARE)), most)


@dataclass(frozen=True)
class _Plan:
    """What was found best for a load, and until which step that holds."""

    until: int
    shape: DraftShape | None
    steps_between_probes: int
    steps_between_plain: int


class BudgetController:
    """Chooses how much to draft, step by step."""

    def __init__(
        self, full: DraftShape, forwards: Callable[[int], int], verify: RowTimes, draft: RowTimes, other: float = 0.0
    ) -> None:
        """Starts from measurements.

        Args:
            full: the configured shape: no draft goes further.
            forwards: of the head, by levels.
            verify: seconds of a step up to its samples, by rows.
            draft: seconds of one forward of the head, by rows.
            other: seconds of the rest of a step.
        """
        self.full = full
        self.forwards = forwards
        self.verify = verify
        self.draft = draft
        self.calibration = Calibration()
        widths = sorted({1, full.width // 2 or 1, full.width})
        # One level more that takes no more forwards costs nothing, and its nodes need not be kept.
        cheapest = (levels for levels in LEVELS if levels < full.levels and forwards(levels) < forwards(levels + 1))
        depths = sorted({*cheapest, full.levels})
        #: In the order in which a tie is decided: the less, the earlier.
        self.shapes = [DraftShape(levels, width) for width in widths for levels in depths]
        #: Of steps without a draft, and with one.
        self._others: tuple[deque[float], ...] = (deque([other], maxlen=33), deque([other], maxlen=33))
        #: Of greedy requests and of those that sample, whose trees are as different as their chances.
        self._trees: tuple[deque[_Remembered], ...] = (deque(maxlen=REMEMBERED_TREES), deque(maxlen=REMEMBERED_TREES))
        self._plans: dict[tuple[int, int, int], _Plan] = {}
        self._steps = self._since_probe = self._since_plain = 0
        self._plain = FIRST_PLAIN
        #: Whether what was planned last is there to teach.
        self.probing = False

    # What is learnt

    def learn_verify(self, rows: int, seconds: float) -> None:
        """Takes the time of a step whose rows were all roots and nodes, up to its samples."""
        self.verify.learn(rows, seconds)

    def learn_draft(self, shape: DraftShape, batch: int, seconds: float) -> None:
        """Takes the time of a draft of so many trees."""
        self.draft.learn(batch * shape.width, seconds / self.forwards(shape.levels))

    def learn_other(self, seconds: float, drafted: bool) -> None:
        """Takes the time of a step outside verification and draft; the median counts, since servers wait."""
        self._others[drafted].append(seconds)

    def learn_trees(self, scores: Floats, accepted: Bools, kinds: Integers) -> None:
        """Takes the outcome of a verification; see ``Calibration.learn``."""
        if len(scores):
            self.calibration.learn(scores, accepted, kinds)

    def kinds(self, shape: DraftShape, depths: Integers, random: Bools) -> Integers:
        """The kinds of nodes, see ``Calibration``.

        Args:
            shape: of their draft.
            depths: any shape.
            random: of a shape that broadcasts to it: whether their requests sample.
        """
        foreseen = (depths == shape.levels) & self._foresees(shape)
        return Calibration.RANDOM * random + Calibration.FORESEEN * foreseen

    def _foresees(self, shape: DraftShape) -> bool:
        """Whether the last level of a draft takes no forward of its own."""
        return self.forwards(shape.levels) < shape.levels

    # What is decided

    def plan(self, drafting: int, others: int = 0, random: int = 0) -> tuple[DraftShape | None, int]:
        """The shape of the next draft.

        Args:
            drafting: requests that could have a tree.
            others: rows of other requests in the next step.
            random: how many of those that could have a tree sample.

        Returns:
            ``(shape or None for no draft, how many of the requests draft)``.
        """
        self.probing = False
        kinds = drafting - random, random
        if any(count and len(trees) < FIRST_TREES for count, trees in zip(kinds, self._trees, strict=True)):
            return self.full, drafting if all(kinds) else min(drafting, FIRST_TREES)
        if self._plain:
            self._plain -= 1
            return None, 0
        # Loads that hardly differ share a plan: finding one takes as long as a step of a small target.
        load = _about(drafting), _about(others), _about(random)
        plan = self._plans.get(load)
        if plan is None or plan.until <= self._steps:
            shape, gain = self._best_shape(kinds, others)
            probes = self._steps_between_probes(shape, drafting, others)
            plan = self._plans[load] = _Plan(self._steps + PLAN_STEPS, shape, probes, _spaced(1 - 1 / gain))
        shape = plan.shape
        self._steps += 1
        self._since_probe += 1
        self._since_plain += 1
        if shape is not None and self._since_plain >= plan.steps_between_plain:
            self._since_plain = 0
            self.probing = True
            return None, 0
        if shape != self.full and self._since_probe >= plan.steps_between_probes:
            self._since_probe = 0
            self.probing = True
            return self.full, 1 if shape is None else drafting
        return shape, drafting if shape else 0

    def select(
        self, shape: DraftShape, scores: Floats, depths: Integers, parents: Integers, random: Bools, others: int = 0
    ) -> Integers:
        """How many nodes each tree keeps, its best ones; B trees, all requests that are about to be verified.

        Args:
            shape: of their draft.
            scores: ``[B, N]`` log-probabilities of the nodes' paths, descending, 0 for the root and -inf for padding.
            depths: ``[B, N]``.
            parents: ``[B, N]``, -1 for the root.
            random: ``[B]`` whether the request samples.
            others: rows of other requests in the next step.

        Returns:
            ``[B]`` draft nodes to keep, roots not counted.
        """
        kinds = self.kinds(shape, depths, random[:, None])
        if shape == self.full:
            self._remember(scores, depths, parents, kinds)
        batch = len(scores)
        chances = self.calibration(scores[:, 1:], kinds[:, 1:])
        order = np.argsort(-chances, axis=None, kind="stable")
        order = order[chances.ravel()[order] > 0]
        ordered, seconds = chances.ravel()[order], self._draft_seconds(shape, batch)
        best, _ = self._best_count(ordered, np.ones(len(ordered)), batch, others, seconds)
        if self._steps % HALF_STEPS == HALF_STEPS // 2:
            best //= 2
        kept = np.zeros(chances.size, dtype=bool)
        kept[order[:best]] = True
        if self.probing:
            kept[: chances.shape[1]] = np.isfinite(scores[0, 1:])
        return kept.reshape(chances.shape).sum(axis=1)

    # How

    def other(self, drafted: bool) -> float:
        """Seconds of a step outside verification and draft; a draft has to be kept and handed over, too."""
        return statistics.median(self._others[drafted])

    def _steps_between_probes(self, shape: DraftShape | None, drafting: int, others: int) -> int:
        """So many that what probes take beyond what is planned stays within their share of the time."""
        probed = 1 if shape is None else drafting
        nodes = max(len(tree.scores) for trees in self._trees for tree in trees)
        planned = float(self.verify(drafting + others)) + self.other(drafted=shape is not None)
        drafted = 0.0 if shape is None else self._draft_seconds(shape, drafting)
        more = self._draft_seconds(self.full, probed) - drafted
        more += float(self.verify(drafting + others + nodes) - self.verify(drafting + others))
        return _spaced(more / (planned + drafted))

    def _draft_seconds(self, shape: DraftShape, batch: int) -> float:
        return self.forwards(shape.levels) * float(self.draft(batch * shape.width))

    def _best_count(self, chances: Floats, weights: Floats, batch: int, others: int, draft: float) -> tuple[int, float]:
        """``(nodes, tokens per second)`` where the rate is highest.

        Args:
            chances: ``[M]`` of nodes, descending.
            weights: ``[M]`` nodes of the next step that each of them stands for.
            batch: requests that draft.
            others: rows beside theirs.
            draft: seconds of the draft.
        """
        counts = np.concatenate([[0.0], weights.cumsum()])
        tokens = batch + others + np.concatenate([[0.0], (chances * weights).cumsum()])
        rates = tokens / (self.verify(batch + others + counts) + draft + self.other(drafted=True))
        best = int(rates.argmax())
        return best, float(rates[best])

    def _best_shape(self, kinds: tuple[int, int], others: int) -> tuple[DraftShape | None, float]:
        """For so many greedy requests and so many that sample, and how many times the rate without a draft it makes."""
        drafting = sum(kinds)
        rows = drafting + others
        plain = float(rows / (self.verify(rows) + self.other(drafted=False)))
        best, highest = None, LEAST_GAIN * plain
        trees = [tree for count, some in zip(kinds, self._trees, strict=True) if count for tree in some]
        each = [count / len(some) for count, some in zip(kinds, self._trees, strict=True) if count for _ in some]
        scores, depths, breadths, sorts = (
            np.concatenate([getattr(tree, name) for tree in trees])
            for name in ("scores", "depths", "breadths", "kinds")
        )
        weights = np.repeat(each, [len(tree.scores) for tree in trees])
        chances = self.calibration(scores, sorts)
        for shape in self.shapes:
            inside = (depths <= shape.levels) & (breadths < shape.width)
            wins = self._last_level_wins(shape, chances * weights, depths)
            won = chances[inside] * np.where(depths[inside] == shape.levels, wins, 1.0)
            order = np.argsort(-won)
            seconds = self._draft_seconds(shape, drafting)
            count, rate = self._best_count(won[order], weights[inside][order], drafting, others, seconds)
            if count and rate > highest:
                best, highest = shape, rate
        return best, highest / plain

    def _last_level_wins(self, shape: DraftShape, chances: Floats, depths: Integers) -> float:
        """What a draft's last level wins of what the same level does in a full draft.

        Where both take no forward of their own it is of the full draft's last level that we know how much of the level
        above goes on; a shallower draft's is as weak.
        """
        if shape.levels == self.full.levels or not self._foresees(shape) or not self._foresees(self.full):
            return 1.0
        sums = np.bincount(depths, chances, minlength=self.full.levels + 1)
        goes_on = sums[self.full.levels] / max(sums[self.full.levels - 1], 1e-9)
        return float(min(1.0, goes_on * sums[shape.levels - 1] / max(sums[shape.levels], 1e-9)))

    def _remember(self, scores: Floats, depths: Integers, parents: Integers, kinds: Integers) -> None:
        """Keeps a few trees of a draft of the full shape, of each kind of request."""
        random = kinds[:, 0] & Calibration.RANDOM
        for kind, trees in enumerate(self._trees):
            rows = np.roll((random == kind).nonzero()[0], -self._steps)  # not always of the same requests
            for row in rows[: max(2, len(scores) // 2)]:
                nodes = slice(1, int(np.isfinite(scores[row]).sum()))
                trees.append(
                    _Remembered(scores[row, nodes], depths[row, nodes], parents[row, nodes], kinds[row, nodes])
                )
