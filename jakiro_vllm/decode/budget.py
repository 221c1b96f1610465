"""How much to draft: what a step costs, what its nodes will win, and the trees that make most tokens per second.

A verification of more rows takes longer, a draft of more levels too, and what a node wins is the probability that the
target's samples reach it. The more requests share a step, the sooner rows cost more than they win: so the best trees
are large at a low load, narrow at a higher one, and none at all beyond. Three estimates, refined at every step, decide:

* `RowTimes`: seconds of the target's forward, and of one of the draft head, by rows; and `HostTimes`, of all else;
* `Calibration`: how often nodes were accepted that the head gave a certain probability, by their kind;
* the latest trees of the full shape: what levels and candidates hold how much of that probability.

Before a draft, `decide` chooses its shape, and which requests are better served by what their own text suggests (see
``lookup``), which takes no forward; after it, `select` keeps the nodes, of all requests together, whose probabilities
are worth their rows. Nothing here changes what is emitted: a tree is verified exactly, whatever its size.

B requests, N nodes of a tree (root included), W tokens of a continuation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jakiro_vllm.decode.calibration import Calibration
from jakiro_vllm.decode.costs import Bools, Floats, HostTimes, Integers, RowTimes, Source, about
from jakiro_vllm.decode.drafter import DraftShape

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


def _spaced(cost: float) -> int:
    """Steps between probes that cost so many steps each."""
    fewest, most = PROBE_STEPS
    return min(max(fewest, math.ceil(cost / PROBE_SHARE)), most)


@dataclass(frozen=True)
class _Plan:
    """The head's best draft for a load, what each of its trees wins and takes, and until which step that holds."""

    until: int
    shape: DraftShape | None
    steps_between_probes: int
    steps_between_plain: int
    tokens: float
    nodes: float


@dataclass(frozen=True)
class Decision:
    """What the next step verifies.

    Attributes:
        shape: of the head's draft; None for none.
        drafting: the head drafts for the first so many of the requests that do not repeat themselves.
        repeated: ``[B] int64`` tokens that each request takes of its text's continuation, 0 for none.
    """

    shape: DraftShape | None
    drafting: int
    repeated: Integers

    @property
    def source(self) -> Source:
        """Where the drafts come from; a mixture counts as the head's."""
        if self.shape is not None:
            return Source.HEAD
        return Source.TEXT if self.repeated.any() else Source.NONE


class BudgetController:
    """Chooses how much to draft, step by step."""

    def __init__(self, full: DraftShape, forwards: Callable[[int], int], verify: RowTimes, draft: RowTimes) -> None:
        """Starts from measurements.

        Args:
            full: the configured shape: no draft goes further.
            forwards: of the head, by levels.
            verify: seconds of the target's forward, logits included, by rows.
            draft: seconds of one forward of the head, by rows.
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
        self.host = HostTimes()
        #: Of greedy requests and of those that sample, whose trees are as different as their chances.
        self._trees: tuple[deque[_Remembered], ...] = (deque(maxlen=REMEMBERED_TREES), deque(maxlen=REMEMBERED_TREES))
        self._plans: dict[tuple[int, int, int], _Plan] = {}
        self._steps = self._since_probe = self._since_plain = 0
        self._plain = FIRST_PLAIN
        #: Whether what was planned last is there to teach.
        self.probing = False
        self._settled = False

    # What is learnt

    def learn_verify(self, rows: int, seconds: float) -> None:
        """Takes the time of the target's forward in a step whose rows were all roots and nodes."""
        self.verify.learn(rows, seconds)

    def learn_draft(self, shape: DraftShape, batch: int, seconds: float) -> None:
        """Takes the time of a draft of so many trees."""
        self.draft.learn(batch * shape.width, seconds / self.forwards(shape.levels))

    def learn_host(self, source: Source, requests: int, seconds: float) -> None:
        """Takes the time of a step outside the target's forward and the draft, from one decision to the next."""
        self.host.learn(source, requests, seconds)

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

    def decide(self, random: Bools, others: int = 0, chances: Floats | None = None) -> Decision:
        """What the next step verifies.

        Args:
            random: ``[B]`` whether the requests that could have a tree sample.
            others: rows of other requests in the next step.
            chances: ``[B, W]`` that the target reaches each token of a request's continuation; None if none is known.
        """
        drafting = len(random)
        shape, count = self.plan(drafting, others, int(random.sum()))
        nothing = np.zeros(drafting, dtype=np.int64)
        if chances is None or not self._settled or not chances.any():
            return Decision(shape, count, nothing)
        rows = drafting + others
        repeated, wins, rate = self._best_repeats(chances, others)
        if shape is None:
            least = LEAST_GAIN * self._rate(rows, rows, rows, 0.0, Source.NONE)
            return Decision(None, 0, repeated if rate > least else nothing)
        plan = self._planned((int((~random).sum()), int(random.sum())), others)
        best, highest = Decision(shape, count, nothing), self._head_rate(plan, drafting, rows, 0.0, 0)
        if rate > highest:
            best, highest = Decision(None, 0, repeated), rate
        # And some by the head: those whose continuations promise less than its trees do.
        less = wins < plan.tokens
        fewer = int(less.sum())
        if 0 < fewer < drafting:
            plan = self._planned((int((less & ~random).sum()), int((less & random).sum())), rows - fewer)
            left = np.where(less, 0, repeated)
            if self._head_rate(plan, fewer, rows, float(wins[~less].sum()), int(left.sum())) > highest:
                best = Decision(plan.shape, fewer, left)
        return best

    def plan(self, drafting: int, others: int = 0, random: int = 0) -> tuple[DraftShape | None, int]:
        """The shape of the head's next draft, if all drafts are the head's.

        Args:
            drafting: requests that could have a tree.
            others: rows of other requests in the next step.
            random: how many of those that could have a tree sample.

        Returns:
            ``(shape or None for no draft, how many of the requests draft)``.
        """
        self.probing = self._settled = False
        kinds = drafting - random, random
        if any(count and len(trees) < FIRST_TREES for count, trees in zip(kinds, self._trees, strict=True)):
            return self.full, drafting if all(kinds) else min(drafting, FIRST_TREES)
        if self._plain:
            self._plain -= 1
            return None, 0
        plan = self._planned(kinds, others)
        self._steps += 1
        self._since_probe += 1
        self._since_plain += 1
        if plan.shape is not None and self._since_plain >= plan.steps_between_plain:
            self._since_plain = 0
            self.probing = True
            return None, 0
        if plan.shape != self.full and self._since_probe >= plan.steps_between_probes:
            self._since_probe = 0
            self.probing = True
            return self.full, 1 if plan.shape is None else drafting
        self._settled = True
        return plan.shape, drafting if plan.shape else 0

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
        best, _ = self._best_count(ordered, np.ones(len(ordered)), batch, others, seconds, Source.HEAD)
        if self._steps % HALF_STEPS == HALF_STEPS // 2:
            best //= 2
        kept = np.zeros(chances.size, dtype=bool)
        kept[order[:best]] = True
        if self.probing:
            kept[: chances.shape[1]] = np.isfinite(scores[0, 1:])
        return kept.reshape(chances.shape).sum(axis=1)

    # How

    def _planned(self, kinds: tuple[int, int], others: int) -> _Plan:
        """The plan for so many greedy requests and so many that sample, which holds for some steps.

        Loads that hardly differ share one, since finding it takes as long as a step of a small target: they do if a few
        other requests share their steps, too.
        """
        drafting = sum(kinds)
        load = about(drafting), about(others) if 2 * others >= drafting else 0, about(kinds[1])
        plan = self._plans.get(load)
        if plan is None or plan.until <= self._steps:
            shape, gain, nodes, tokens = self._best_shape(kinds, others)
            probes = self._steps_between_probes(shape, drafting, others)
            each = tokens / drafting, nodes / drafting
            plan = self._plans[load] = _Plan(self._steps + PLAN_STEPS, shape, probes, _spaced(1 - 1 / gain), *each)
        return plan

    def _best_repeats(self, chances: Floats, others: int) -> tuple[Integers, Floats, float]:
        """``(tokens of each continuation [B], what they win [B], tokens per second)`` if the head drafts nothing."""
        order = np.argsort(-chances, axis=None, kind="stable")
        ordered = chances.ravel()[order]
        best, rate = self._best_count(ordered, np.ones(len(ordered)), len(chances), others, 0.0, Source.TEXT)
        if self._steps % HALF_STEPS == HALF_STEPS // 2:
            best = -(-best // 2)
        chosen = np.zeros(chances.size, dtype=bool)
        chosen[order[:best]] = True
        kept = (chosen & (chances.ravel() > 0)).reshape(chances.shape)
        return kept.sum(axis=1), np.where(kept, chances, 0.0).sum(axis=1), rate

    def _head_rate(self, plan: _Plan, drafting: int, requests: int, tokens: float, nodes: int) -> float:
        """Tokens per second if the head drafts so, beside other drafts of so many nodes that win so many tokens."""
        if plan.shape is None:
            return 0.0
        won, rows = requests + tokens + drafting * plan.tokens, requests + nodes + drafting * plan.nodes
        return self._rate(won, rows, requests, self._draft_seconds(plan.shape, drafting), Source.HEAD)

    def _rate(self, tokens: float, rows: float, requests: int, draft: float, source: Source) -> float:
        return tokens / (float(self.verify(rows)) + draft + self.host(source, requests))

    def _steps_between_probes(self, shape: DraftShape | None, drafting: int, others: int) -> int:
        """So many that what probes take beyond what is planned stays within their share of the time."""
        probed = 1 if shape is None else drafting
        nodes = max(len(tree.scores) for trees in self._trees for tree in trees)
        source = Source.NONE if shape is None else Source.HEAD
        planned = float(self.verify(drafting + others)) + self.host(source, drafting + others)
        drafted = 0.0 if shape is None else self._draft_seconds(shape, drafting)
        more = self._draft_seconds(self.full, probed) - drafted
        more += float(self.verify(drafting + others + nodes) - self.verify(drafting + others))
        return _spaced(more / (planned + drafted))

    def _draft_seconds(self, shape: DraftShape, batch: int) -> float:
        return self.forwards(shape.levels) * float(self.draft(batch * shape.width))

    def _best_count(
        self, chances: Floats, weights: Floats, batch: int, others: int, draft: float, source: Source
    ) -> tuple[int, float]:
        """``(nodes, tokens per second)`` where the rate is highest.

        Args:
            chances: ``[M]`` of nodes, descending.
            weights: ``[M]`` nodes of the next step that each of them stands for.
            batch: requests that draft.
            others: rows beside theirs.
            draft: seconds of the draft.
            source: of the drafts.
        """
        counts = np.concatenate([[0.0], weights.cumsum()])
        tokens = batch + others + np.concatenate([[0.0], (chances * weights).cumsum()])
        rates = tokens / (self.verify(batch + others + counts) + draft + self.host(source, batch + others))
        best = int(rates.argmax())
        return best, float(rates[best])

    def _best_shape(self, kinds: tuple[int, int], others: int) -> tuple[DraftShape | None, float, float, float]:
        """For so many greedy requests and so many that sample.

        Returns:
            ``(shape, how many times the rate without a draft it makes, its trees' nodes, the tokens that they win)``.
        """
        drafting = sum(kinds)
        rows = drafting + others
        plain = self._rate(rows, rows, rows, 0.0, Source.NONE)
        best: tuple[DraftShape | None, float, float] = (None, 0.0, 0.0)
        highest = LEAST_GAIN * plain
        trees = [tree for count, some in zip(kinds, self._trees, strict=True) if count for tree in some]
        each = [count / len(some) for count, some in zip(kinds, self._trees, strict=True) if count for _ in some]
        scores, depths, breadths, sorts = (
            np.concatenate([getattr(tree, name) for tree in trees])
            for name in ("scores", "depths", "breadths", "kinds")
        )
        weights = np.repeat(each, [len(tree.scores) for tree in trees])
        chances = self.calibration(scores, sorts)
        least = float(self.verify(rows)) + self.host(Source.HEAD, rows)
        for shape in self.shapes:
            inside = (depths <= shape.levels) & (breadths < shape.width)
            seconds = self._draft_seconds(shape, drafting)
            if rows + float(chances[inside] @ weights[inside]) <= highest * (least + seconds):
                continue  # not even if its nodes were free
            wins = self._last_level_wins(shape, chances * weights, depths)
            won = chances[inside] * np.where(depths[inside] == shape.levels, wins, 1.0)
            order = np.argsort(-won)
            won, weighs = won[order], weights[inside][order]
            count, rate = self._best_count(won, weighs, drafting, others, seconds, Source.HEAD)
            if count and rate > highest:
                highest = rate
                best = shape, float(weighs[:count].sum()), float((won * weighs)[:count].sum())
        chosen, nodes, tokens = best
        return chosen, highest / plain, nodes, tokens

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
