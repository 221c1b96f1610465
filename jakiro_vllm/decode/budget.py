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

#: What each kind of probe may lose of the time, and the fewest and most steps between them: drafts of the full shape
#: where another is best, of which one tree is verified whole, so that its worth stays known; and steps without a draft
#: where the head's is best, so that their cost does, the more often the less a draft gains.
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


@dataclass(frozen=True)
class _Plan:
    """The head's best draft for a load, what each of its trees takes and wins, and until which step that holds."""

    until: int
    shape: DraftShape | None
    nodes: float
    tokens: float


@dataclass(frozen=True)
class Decision:
    """What the next step verifies.

    Attributes:
        shape: of the head's draft; None for none.
        drafting: the head drafts for the first so many of the requests that do not repeat themselves.
        repeated: ``[B] int64`` tokens that each request takes of its text's continuation, 0 for none.
        wins: tokens that the continuations are expected to win.
    """

    shape: DraftShape | None
    drafting: int
    repeated: Integers
    wins: float = 0.0

    @property
    def source(self) -> Source:
        """Where the drafts come from; a mixture counts as the head's."""
        if self.shape is not None:
            return Source.HEAD
        return Source.TEXT if self.repeated.any() else Source.NONE


@dataclass(frozen=True)
class _Choice:
    """A decision, and what its step is expected to emit and to take."""

    decision: Decision
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


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
        self._steps = self._since_full = self._since_plain = 0
        self._plain = FIRST_PLAIN
        #: Whether what was planned last is there to teach.
        self.probing = False

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
        self.probing = False
        drafting, sampling = len(random), int(random.sum())
        kinds, nothing = (drafting - sampling, sampling), np.zeros(drafting, dtype=np.int64)
        if any(count and len(trees) < FIRST_TREES for count, trees in zip(kinds, self._trees, strict=True)):
            return Decision(self.full, drafting if all(kinds) else min(drafting, FIRST_TREES), nothing)
        if self._plain:
            self._plain -= 1
            return Decision(None, 0, nothing)
        self._steps += 1
        best = self._best(random, kinds, others, chances)
        probe = self._probe(best, drafting + others)
        self.probing = probe is not None
        return probe or best.decision

    def select(
        self,
        shape: DraftShape,
        scores: Floats,
        depths: Integers,
        parents: Integers,
        random: Bools,
        others: int = 0,
        beside: tuple[int, float] = (0, 0.0),
    ) -> Integers:
        """How many nodes each tree keeps, its best ones; B trees, all requests that are about to be verified.

        Args:
            shape: of their draft.
            scores: ``[B, N]`` log-probabilities of the nodes' paths, descending, 0 for the root and -inf for padding.
            depths: ``[B, N]``.
            parents: ``[B, N]``, -1 for the root.
            random: ``[B]`` whether the request samples.
            others: rows of other requests in the next step, drafts not counted.
            beside: how many drafts those have, and the tokens that they are expected to win.

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
        best, _ = self._best_count(ordered, np.ones(len(ordered)), batch + others, seconds, Source.HEAD, beside)
        if self._steps % HALF_STEPS == HALF_STEPS // 2:
            best //= 2
        kept = np.zeros(chances.size, dtype=bool)
        kept[order[:best]] = True
        if self.probing:
            kept[: chances.shape[1]] = np.isfinite(scores[0, 1:])
        return kept.reshape(chances.shape).sum(axis=1)

    # How

    def _best(self, random: Bools, kinds: tuple[int, int], others: int, chances: Floats | None) -> _Choice:
        """What makes most tokens per second, if it is enough more than a step without drafts does."""
        drafting = len(random)
        requests, nothing = drafting + others, np.zeros(drafting, dtype=np.int64)
        plain = _Choice(Decision(None, 0, nothing), requests, self._plain_seconds(requests))
        choices = [plain]
        plan = self._planned(kinds, others)
        if plan.shape is not None:
            choices.append(self._by_head(plan, drafting, requests, nothing, 0.0))
        if chances is not None and chances.any():
            text, wins = self._by_text(chances, requests)
            choices.append(text)
            # Where the head is worth its while: it for those whose continuations promise less than its trees do.
            less = wins < plan.tokens
            fewer = int(less.sum())
            if 0 < fewer < drafting:
                some = self._planned((int((less & ~random).sum()), int((less & random).sum())), requests - fewer)
                if some.shape is not None:
                    left = np.where(less, 0, text.decision.repeated)
                    choices.append(self._by_head(some, fewer, requests, left, float(wins[~less].sum())))
        best = max(choices, key=lambda choice: choice.rate)
        return best if best.rate > LEAST_GAIN * plain.rate else plain

    def _plain_seconds(self, requests: int) -> float:
        return float(self.verify(requests)) + self.host(Source.NONE, requests)

    def _by_head(self, plan: _Plan, drafting: int, requests: int, repeated: Integers, wins: float) -> _Choice:
        """The head drafts so for some, and continuations of the others win so many tokens."""
        assert plan.shape is not None
        rows = requests + int(repeated.sum()) + drafting * plan.nodes
        seconds = float(self.verify(rows)) + self._draft_seconds(plan.shape, drafting)
        tokens = requests + wins + drafting * plan.tokens
        decision = Decision(plan.shape, drafting, repeated, wins)
        return _Choice(decision, tokens, seconds + self.host(Source.HEAD, requests))

    def _by_text(self, chances: Floats, requests: int) -> tuple[_Choice, Floats]:
        """The best continuations alone, and what each of them wins ``[B]``."""
        order = np.argsort(-chances, axis=None, kind="stable")
        ordered = chances.ravel()[order]
        best, _ = self._best_count(ordered, np.ones(len(ordered)), requests, 0.0, Source.TEXT)
        if self._steps % HALF_STEPS == HALF_STEPS // 2:
            best = -(-best // 2)
        chosen = np.zeros(chances.size, dtype=bool)
        chosen[order[:best]] = True
        kept = chosen.reshape(chances.shape)
        repeated, wins = kept.sum(axis=1), np.where(kept, chances, 0.0).sum(axis=1)
        won = float(wins.sum())
        seconds = float(self.verify(requests + int(repeated.sum()))) + self.host(Source.TEXT, requests)
        return _Choice(Decision(None, 0, repeated, won), requests + won, seconds), wins

    def _probe(self, best: _Choice, requests: int) -> Decision | None:
        """What is tried instead of what is best, if it is time for that."""
        decision = best.decision
        self._since_plain = 0 if decision.source is Source.NONE else self._since_plain + 1
        self._since_full = 0 if decision.shape == self.full else self._since_full + 1
        # Where a continuation is best, a step without drafts is no rival.
        if decision.source is Source.HEAD and self._since_plain >= PROBE_STEPS[0]:
            lost = self._plain_seconds(requests) - requests / best.rate
            if self._since_plain >= self._spaced(lost / best.seconds):
                self._since_plain = 0
                return Decision(None, 0, np.zeros_like(decision.repeated))
        if self._since_full >= PROBE_STEPS[0]:
            repeated, count = decision.repeated.copy(), decision.drafting
            lost = 0.0
            if decision.shape is None:  # of one request, which its continuation must go without
                one, count = int(repeated.argmin()), 1
                lost += float(repeated[one]) / best.rate
                repeated[one] = 0
            else:
                lost -= self._draft_seconds(decision.shape, count)
            nodes = max(len(tree.scores) for trees in self._trees for tree in trees)
            lost += self._draft_seconds(self.full, count)
            lost += float(self.verify(requests + nodes) - self.verify(requests))
            if self._since_full >= self._spaced(lost / best.seconds):
                self._since_full = 0
                return Decision(self.full, count, repeated, decision.wins)
        return None

    def _spaced(self, lost: float) -> int:
        """Steps between probes that lose so many steps each."""
        fewest, most = PROBE_STEPS
        return min(max(fewest, math.ceil(lost / PROBE_SHARE)), most)

    def _planned(self, kinds: tuple[int, int], others: int) -> _Plan:
        """The plan for so many greedy requests and so many that sample, which holds for some steps.

        Loads that hardly differ share one, since finding it takes as long as a step of a small target: they do if a few
        other requests share their steps, too.
        """
        drafting = sum(kinds)
        load = about(drafting), about(others) if 2 * others >= drafting else 0, about(kinds[1])
        plan = self._plans.get(load)
        if plan is None or plan.until <= self._steps:
            shape, nodes, tokens = self._best_shape(kinds, others)
            plan = _Plan(self._steps + PLAN_STEPS, shape, nodes / drafting, tokens / drafting)
            self._plans[load] = plan
        return plan

    def _draft_seconds(self, shape: DraftShape, batch: int) -> float:
        return self.forwards(shape.levels) * float(self.draft(batch * shape.width))

    def _best_count(
        self,
        chances: Floats,
        weights: Floats,
        requests: int,
        draft: float,
        source: Source,
        beside: tuple[int, float] = (0, 0.0),
    ) -> tuple[int, float]:
        """``(nodes, tokens per second)`` where the rate is highest.

        Args:
            chances: ``[M]`` of nodes, descending.
            weights: ``[M]`` nodes of the next step that each of them stands for.
            requests: in the next step.
            draft: seconds of the draft.
            source: of the drafts.
            beside: other drafts in the next step, and the tokens that they win.
        """
        counts = np.concatenate([[0.0], weights.cumsum()])
        tokens = requests + beside[1] + np.concatenate([[0.0], (chances * weights).cumsum()])
        rates = tokens / (self.verify(requests + beside[0] + counts) + draft + self.host(source, requests))
        best = int(rates.argmax())
        return best, float(rates[best])

    def _best_shape(self, kinds: tuple[int, int], others: int) -> tuple[DraftShape | None, float, float]:
        """``(shape, its nodes, the tokens that they win)`` for so many greedy requests and so many that sample."""
        drafting = sum(kinds)
        requests = drafting + others
        best: tuple[DraftShape | None, float, float] = (None, 0.0, 0.0)
        highest = LEAST_GAIN * requests / self._plain_seconds(requests)
        trees = [tree for count, some in zip(kinds, self._trees, strict=True) if count for tree in some]
        each = [count / len(some) for count, some in zip(kinds, self._trees, strict=True) if count for _ in some]
        scores, depths, breadths, sorts = (
            np.concatenate([getattr(tree, name) for tree in trees])
            for name in ("scores", "depths", "breadths", "kinds")
        )
        weights = np.repeat(each, [len(tree.scores) for tree in trees])
        chances = self.calibration(scores, sorts)
        least = float(self.verify(requests)) + self.host(Source.HEAD, requests)
        for shape in self.shapes:
            inside = (depths <= shape.levels) & (breadths < shape.width)
            seconds = self._draft_seconds(shape, drafting)
            if requests + float(chances[inside] @ weights[inside]) <= highest * (least + seconds):
                continue  # not even if its nodes were free
            wins = self._last_level_wins(shape, chances * weights, depths)
            won = chances[inside] * np.where(depths[inside] == shape.levels, wins, 1.0)
            order = np.argsort(-won)
            won, weighs = won[order], weights[inside][order]
            count, rate = self._best_count(won, weighs, requests, seconds, Source.HEAD)
            if count and rate > highest:
                highest = rate
                best = shape, float(weighs[:count].sum()), float((won * weighs)[:count].sum())
        return best

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
