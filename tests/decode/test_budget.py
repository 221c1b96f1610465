"""The budget against brute force, and in a simulated engine whose costs and acceptance are known."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from jakiro_vllm.decode.budget import (
    FIRST_PLAIN,
    FIRST_TREES,
    HALF_STEPS,
    LEAST_GAIN,
    PLAN_STEPS,
    PROBE_SHARE,
    PROBE_STEPS,
    BudgetController,
    Decision,
)
from jakiro_vllm.decode.calibration import Calibration
from jakiro_vllm.decode.costs import HostTimes, RowTimes, Source
from jakiro_vllm.decode.drafter import DraftShape

FULL = DraftShape(levels=5, width=3)
BUDGET = 16
#: Different trees in the simulated engine.
POOL = 48


def forwards(levels: int) -> int:
    return max(1, levels - 1)


def doubling(most: int, seconds: Callable[[float], float]) -> RowTimes:
    rows = [1 << i for i in range(most.bit_length())]
    return RowTimes(rows, [seconds(row) for row in rows])


# Times


def test_times_lie_on_lines_between_measurements_and_in_proportion_beyond() -> None:
    times = RowTimes([1, 2, 4], [1.0, 2.0, 8.0])
    assert times([0.5, 1, 1.5, 3, 4, 8]).tolist() == pytest.approx([1.0, 1.0, 1.5, 5.0, 8.0, 16.0])


def test_more_rows_never_take_less() -> None:
    assert RowTimes([1, 2, 4], [1.0, 3.0, 2.0])([1, 2, 3, 4]).tolist() == pytest.approx([1.0, 6**0.5, 6**0.5, 6**0.5])


def test_times_are_learnt(rng: np.random.Generator) -> None:
    """Twice as slow everywhere, and rows dearer than measured."""
    times = doubling(64, lambda rows: 1 + 0.01 * rows)
    for _ in range(2000):
        rows = int(rng.integers(1, 65))
        times.learn(rows, (2 + 0.1 * rows) * rng.uniform(0.95, 1.05))
    for rows in (1, 3, 10, 40, 64):
        assert float(times(rows)) == pytest.approx(2 + 0.1 * rows, rel=0.05)


def test_like_sizes_follow_a_measurement_and_others_do_not() -> None:
    times = doubling(256, lambda rows: 1 + 0.1 * rows)
    before = times([4, 8, 16, 256])
    for _ in range(300):
        times.learn(8, 3.6)
    moved = times([4, 8, 16, 256]) / before
    assert moved[1] == pytest.approx(2.0, rel=0.02)
    assert 1.3 < moved[0] < 1.7
    assert 1.3 < moved[2] < 1.7
    assert moved[3] < 1.1


def test_a_stall_moves_a_table_little() -> None:
    times = doubling(64, lambda rows: 1 + 0.1 * rows)
    before = float(times(8))
    times.learn(8, 1000.0)
    assert before < float(times(8)) < 1.3 * before


def test_host_times_are_medians_by_source_and_load() -> None:
    host = HostTimes()
    assert host(Source.HEAD, 3) == 0.0
    for seconds in (2.0, 2.1, 500.0):  # the server waited for a request
        host.learn(Source.NONE, 4, seconds)
    for seconds in (5.0, 6.0, 7.0):
        host.learn(Source.HEAD, 4, seconds)
        host.learn(Source.HEAD, 32, 10 * seconds)
    assert host(Source.NONE, 4) == 2.1
    assert host(Source.HEAD, 4) == 6.0
    assert host(Source.HEAD, 47) == 60.0  # 32 to 47 are one load


def test_what_was_never_timed_takes_as_long_as_what_is_most_like_it() -> None:
    host = HostTimes()
    host.learn(Source.NONE, 1, 1.0)
    assert host(Source.TEXT, 1) == 1.0
    host.learn(Source.HEAD, 1, 3.0)
    host.learn(Source.HEAD, 8, 4.0)
    assert host(Source.TEXT, 1) == 3.0
    assert host(Source.TEXT, 100) == 4.0
    assert host(Source.NONE, 2) == 1.0


def test_a_distant_load_is_no_guide() -> None:
    """After a burst of requests, what one of them alone takes is unknown, and is not what many took."""
    host = HostTimes()
    host.learn(Source.TEXT, 32, 6.0)
    host.learn(Source.NONE, 1, 0.2)
    assert host(Source.TEXT, 1) == 0.2
    assert host(Source.TEXT, 16) == 6.0


def test_what_was_not_timed_lately_is_forgotten() -> None:
    host = HostTimes()
    host.learn(Source.TEXT, 1, 9.0)  # the machine was busy
    for _ in range(HostTimes.LATELY - 1):
        host.learn(Source.HEAD, 1, 1.0)
    assert host(Source.TEXT, 1) == 9.0
    host.learn(Source.HEAD, 1, 1.0)
    assert host(Source.TEXT, 1) == 1.0


# Probabilities


def test_at_first_the_heads_word_counts() -> None:
    scores = np.log(np.array([0.9, 0.5, 0.1]))
    assert Calibration()(scores, np.zeros(3, dtype=int)).tolist() == pytest.approx([0.9, 0.5, 0.1], abs=0.03)


def test_probabilities_are_learnt_for_greedy_and_random_apart(rng: np.random.Generator) -> None:
    """The greedy target follows the head more often than it says, the random one as it says."""
    calibration = Calibration()
    for _ in range(200):
        said = rng.uniform(0.05, 0.95, 40)
        random = rng.uniform(size=40) < 0.5
        accepted = rng.uniform(size=40) < np.where(random, said, np.sqrt(said))
        calibration.learn(np.log(said), accepted, random * Calibration.RANDOM)
    said = np.array([0.2, 0.5, 0.8])
    found = [calibration(np.log(said), np.full(3, kind)) for kind in (0, Calibration.RANDOM)]
    assert found[0].tolist() == pytest.approx(np.sqrt(said).tolist(), abs=0.07)
    assert found[1].tolist() == pytest.approx(said.tolist(), abs=0.07)


def test_a_better_score_is_never_less_probable(rng: np.random.Generator) -> None:
    calibration = Calibration()
    for _ in range(50):
        calibration.learn(-rng.exponential(2.0, 30), rng.uniform(size=30) < 0.5, np.zeros(30, dtype=int))
    found = calibration(np.linspace(0.0, -20.0, 300), np.zeros(300, dtype=int))
    assert (np.diff(found) <= 0).all()


def test_what_is_no_node_has_no_chance() -> None:
    assert Calibration()(np.array([-np.inf]), np.array([1])).tolist() == [0.0]


# Nodes


@dataclass
class Trees:
    """Trees of a draft, as the drafter returns them."""

    scores: np.ndarray
    depths: np.ndarray
    parents: np.ndarray
    #: Log-probabilities that are true, whatever the head says.
    truth: np.ndarray

    def arguments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.scores, self.depths, self.parents, np.ones(len(self.scores), dtype=bool)


@functools.cache
def pool(sharpness: float, last: float, shape: DraftShape) -> Trees:
    return grow(sharpness, POOL, shape, np.random.default_rng(3), last)


def grow(sharpness: float, batch: int, shape: DraftShape, rng: np.random.Generator, last: float = 1.0) -> Trees:
    """Trees of a head that knows the target's probabilities: of a node's children the first has ``sharpness``.

    Of the last level only a share ``last`` comes true.
    """
    width = 1 + min(BUDGET, shape.width + (shape.levels - 1) * shape.width**2)
    scores, depths, parents = (
        np.full((batch, width), -np.inf),
        np.ones((batch, width), int),
        np.zeros((batch, width), int),
    )
    for row in range(batch):
        beam, found = [(0.0, 0, -1)], [(0.0, 0, -1)]
        for depth in range(1, shape.levels + 1):
            level = []
            for score, _, index in beam:
                at = 0 if index < 0 else index
                first = rng.uniform(max(0.0, 2 * sharpness - 1), min(1.0, 2 * sharpness))
                chances = first * (1 - first) ** np.arange(shape.width)
                level += [(score + float(np.log(max(c, 1e-9))), depth, at) for c in chances]
            level.sort(key=lambda node: -node[0])
            beam = [(score, d, len(found) + i) for i, (score, d, _) in enumerate(level[: shape.width])]
            found += level
        order = sorted(range(len(found)), key=lambda i: -found[i][0])[:width]
        place = {old: new for new, old in enumerate(order)}
        for new, old in enumerate(order):
            score, depth, parent = found[old]
            scores[row, new], depths[row, new], parents[row, new] = score, depth, place.get(parent, -1)
    return Trees(scores, depths, parents, scores + np.log(last) * (depths == shape.levels))


def walk(trees: Trees, kept: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws paths: which nodes of all trees are accepted."""
    accepted = []
    for row, count in enumerate(kept):
        hit, node = np.zeros(count + 1, dtype=bool), 0
        while True:
            children = [n for n in range(1, count + 1) if trees.parents[row, n] == node]
            draw, chance = rng.uniform(), 0.0
            for child in children:
                chance += np.exp(trees.truth[row, child] - trees.truth[row, node])
                if draw < chance:
                    hit[child], node = True, child
                    break
            else:
                break
        accepted.append(hit[1:])
    return np.concatenate(accepted)


def make(per_row: float, per_forward_row: float, fixed: float = 1.0) -> BudgetController:
    return BudgetController(
        FULL,
        forwards,
        doubling(1024, lambda rows: fixed + per_row * rows),
        doubling(256, lambda rows: 0.01 + per_forward_row * rows),
    )


def plan(controller: BudgetController, drafting: int, random: int = 0) -> tuple[DraftShape | None, int]:
    """``(shape, how many draft)`` of requests of which nobody repeats itself, and the last so many sample."""
    found = controller.decide(np.arange(drafting) >= drafting - random)
    assert not found.repeated.any()
    return found.shape, found.drafting


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("per_row", [0.001, 0.03, 0.2])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_chosen_nodes_make_most_tokens_per_second(per_row: float, batch: int, rng: np.random.Generator) -> None:
    """No other numbers of nodes per tree have a higher rate; tried one more and one less in each, and all at once."""
    controller, trees = make(per_row, 0.001), grow(0.6, batch, FULL, rng)
    kept = controller.select(FULL, *trees.arguments())
    chances = controller.calibration(trees.scores[:, 1:], np.ones((batch, 1), dtype=int))
    draft = forwards(FULL.levels) * float(controller.draft(batch * FULL.width))

    def rate(counts: np.ndarray) -> float:
        won = batch + sum(chances[row, :count].sum() for row, count in enumerate(counts))
        return float(won / (controller.verify(batch + counts.sum()) + draft))

    best = rate(kept)
    changes = itertools.product((-1, 0, 1), repeat=batch) if batch < 5 else np.eye(batch, dtype=int).tolist()
    for change in [*changes, *([n] * batch for n in range(-BUDGET, BUDGET))]:
        other = np.clip(kept + np.array(change), 0, BUDGET)
        assert rate(other) <= best + 1e-9


def test_nodes_go_where_they_win_most(rng: np.random.Generator) -> None:
    """One request's draft is sure of itself, the other's is not."""
    sure, unsure = grow(0.95, 1, FULL, rng), grow(0.1, 1, FULL, rng)
    trees = Trees(*(np.concatenate(pair) for pair in zip(vars(sure).values(), vars(unsure).values(), strict=True)))
    kept = make(0.1, 0.001).select(FULL, *trees.arguments())
    assert kept[0] > 2 * kept[1]


def test_padding_is_never_kept(rng: np.random.Generator) -> None:
    trees = grow(0.6, 2, FULL, rng)
    trees.scores[1, 3:] = -np.inf
    assert make(1e-6, 0.0).select(FULL, *trees.arguments()).tolist() == [BUDGET, 2]


# Shapes


def settled(controller: BudgetController, batch: int, rng: np.random.Generator, sharpness: float = 0.6) -> None:
    """Shows it what full trees look like."""
    for _ in range(30):
        controller.select(FULL, *grow(sharpness, batch, FULL, rng).arguments())
    assert [plan(controller, batch, random=batch) for _ in range(FIRST_PLAIN)] == [(None, 0)] * FIRST_PLAIN


def test_the_first_drafts_are_full_for_as_many_as_are_wanted() -> None:
    assert plan(make(10.0, 10.0), 4) == (FULL, 4)
    assert plan(make(10.0, 10.0), 500, random=500) == (FULL, FIRST_TREES)
    assert plan(make(10.0, 10.0), 500, random=499) == (FULL, 500)  # nobody says which ones are greedy


def test_cheap_rows_make_full_trees(rng: np.random.Generator) -> None:
    controller = make(1e-5, 1e-5)
    settled(controller, 1, rng)
    assert plan(controller, 1, random=1) == (FULL, 1)


def test_dear_rows_make_none_but_for_a_probe_now_and_then(rng: np.random.Generator) -> None:
    controller = make(1.0, 0.5, fixed=0.0)
    settled(controller, 8, rng)
    plans = [plan(controller, 8, random=8) for _ in range(4 * PROBE_STEPS[1])]
    assert set(plans) == {(None, 0), (FULL, 1)}
    assert 4 <= plans.count((FULL, 1)) <= 4 * PROBE_STEPS[1] / PROBE_STEPS[0]


@pytest.mark.parametrize(("per_row", "per_forward_row"), [(1.0, 0.5), (0.02, 0.01), (0.3, 0.001)])
@pytest.mark.parametrize("batch", [1, 8])
def test_probes_take_their_share_of_the_time(
    per_row: float, per_forward_row: float, batch: int, rng: np.random.Generator
) -> None:
    """Whether a draft is planned for all, or none, and a probe then for one."""
    controller = make(per_row, per_forward_row, fixed=0.2)
    settled(controller, batch, rng)
    fewest, most = PROBE_STEPS
    steps, probes, seconds, more, drafted = 8 * most + 100, 0, 0.0, 0.0, 0.0
    for _ in range(steps):
        shape, count = plan(controller, batch, random=batch)
        if controller.probing and shape is not None:
            probes += 1
            rows = float(controller.verify(batch + BUDGET) - controller.verify(batch))
            more += forwards(FULL.levels) * float(controller.draft(count * FULL.width)) + rows - drafted
        else:
            drafted = forwards(shape.levels) * float(controller.draft(count * shape.width)) if shape else 0.0
            seconds += float(controller.verify(batch)) + drafted
    assert more < 1.2 * PROBE_SHARE * seconds or probes <= steps / most, (more, seconds, probes)
    assert probes == 0 if shape == FULL else steps / most - 1 <= probes <= steps / fewest


def test_in_between_drafts_are_narrower_or_shallower(rng: np.random.Generator) -> None:
    controller = make(0.02, 0.01)
    settled(controller, 8, rng)
    shape, count = plan(controller, 8, random=8)
    assert count == 8
    assert shape is not None
    assert shape != FULL
    assert shape.levels <= FULL.levels
    assert shape.width <= FULL.width


def test_a_plan_follows_the_load(rng: np.random.Generator) -> None:
    controller = make(0.02, 0.005)
    settled(controller, 1, rng)
    shapes = [plan(controller, batch, random=batch)[0] for batch in (1, 64, 1)]
    assert shapes[0] == shapes[2] == FULL
    assert shapes[1] != FULL


def test_the_less_a_draft_gains_the_more_often_a_step_goes_without(rng: np.random.Generator) -> None:
    """Each time it teaches; and what is lost by it is little."""
    shares = []
    for per_row in (0.5, 0.001):
        controller = make(per_row, 0.001)
        settled(controller, 1, rng, sharpness=0.8)
        taught = 0
        for _ in range(512):
            shape, count = plan(controller, 1, random=1)
            assert (shape is None) == (count == 0)
            taught += controller.probing and shape is None
        shares.append(taught / 512)
    assert 0.13 > shares[0] > 1.5 * shares[1] > 0


def test_loads_that_hardly_differ_share_a_plan(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that comes back finds its plan, until that is due again."""
    controller, found = make(0.02, 0.005), []
    settled(controller, 8, rng)
    best = controller._best_shape
    monkeypatch.setattr(controller, "_best_shape", lambda kinds, others: found.append(kinds) or best(kinds, others))
    for batch in (64, 70, 1, 2, 79, 64, 1, 2):
        plan(controller, batch, random=batch)
    assert found == [(0, 64), (0, 1), (0, 2)]
    for _ in range(PLAN_STEPS):
        plan(controller, 64, random=64)
    assert found == [(0, 64), (0, 1), (0, 2), (0, 64)]


def test_steps_without_a_draft_cost_less_beside_it_too(rng: np.random.Generator) -> None:
    """A draft that would pay for itself does not pay for what has to be done with it."""
    shapes = []
    for plain in (3.0, 0.05):
        controller = make(0.01, 0.01)
        settled(controller, 4, rng, sharpness=0.5)
        for _ in range(33):
            controller.learn_host(Source.HEAD, 4, 3.0)
            controller.learn_host(Source.NONE, 4, plain)
        shapes.append(plan(controller, 4, random=4)[0])
    assert shapes[0] is not None
    assert shapes[1] is None


def test_greedy_requests_and_others_are_planned_for_apart(rng: np.random.Generator) -> None:
    """The head is sure of the greedy ones' texts and knows nothing of the others'."""
    controller = make(0.05, 0.01)
    for sharpness, sampled in ((0.95, False), (0.05, True)):
        for _ in range(30):
            trees = grow(sharpness, 2, FULL, rng)
            controller.select(FULL, trees.scores, trees.depths, trees.parents, np.full(2, sampled))
    assert [plan(controller, 8, random=4) for _ in range(FIRST_PLAIN)] == [(None, 0)] * FIRST_PLAIN
    greedy, mixed, random = (plan(controller, 8, random=count)[0] for count in (0, 4, 8))
    assert greedy is not None
    assert greedy.levels >= FULL.levels - 1
    assert random is None
    assert mixed is not None
    assert plan(controller, 8, random=8) == (None, 0)


def test_nothing_is_planned_for_a_kind_of_which_nothing_is_known(rng: np.random.Generator) -> None:
    controller = make(1.0, 0.5, fixed=0.0)
    settled(controller, 8, rng)
    assert plan(controller, 8, random=8)[0] is None
    assert plan(controller, 8, random=7) == (FULL, 8)


# Continuations


def decided(controller: BudgetController, chances: list[list[float]], others: int = 0) -> tuple[object, ...]:
    """``(shape, drafting, repeated)`` of a step of greedy or random requests, experiments aside."""
    random = np.ones(len(chances), dtype=bool)
    while True:
        found = controller.decide(random, others, np.array(chances))
        if not controller.probing and controller._steps % HALF_STEPS != HALF_STEPS // 2:
            return found.shape, found.drafting, found.repeated.tolist()


SURE, HOPELESS = [0.99] * 8, [0.05] + [0.0] * 7


def test_without_continuations_a_decision_is_the_plan(rng: np.random.Generator) -> None:
    controller = make(1e-5, 1e-5)
    settled(controller, 2, rng)
    for chances in (None, np.zeros((2, 4))):
        found = controller.decide(np.ones(2, dtype=bool), 0, chances)
        assert (found.shape, found.drafting, found.repeated.tolist()) == (FULL, 2, [0, 0])
        assert found.source is Source.HEAD


def test_a_sure_continuation_saves_the_draft(rng: np.random.Generator) -> None:
    controller = make(0.001, 0.05)
    settled(controller, 1, rng)
    assert decided(controller, [SURE]) == (None, 0, [8])
    assert decided(controller, [HOPELESS])[0] is not None


def test_where_the_head_does_not_pay_a_continuation_may(rng: np.random.Generator) -> None:
    controller = make(0.1, 5.0)
    settled(controller, 1, rng)
    assert plan(controller, 1, random=1) == (None, 0)
    assert decided(controller, [SURE]) == (None, 0, [8])
    assert decided(controller, [HOPELESS]) == (None, 0, [0])


def test_a_continuation_is_as_long_as_pays(rng: np.random.Generator) -> None:
    """Brute force over its length."""
    controller = make(0.1, 5.0, fixed=1.0)
    settled(controller, 1, rng)
    chances = [0.8**j for j in range(1, 9)]
    rates = [(1 + sum(chances[:n])) / float(controller.verify(1 + n)) for n in range(9)]
    assert 1 < int(np.argmax(rates)) < 8
    assert decided(controller, [chances]) == (None, 0, [int(np.argmax(rates))])


def test_little_gain_is_none(rng: np.random.Generator) -> None:
    for gain, kept in ((LEAST_GAIN - 0.01, 0), (LEAST_GAIN + 0.01, 1)):
        controller = make(1e-9, 5.0)
        settled(controller, 1, rng)
        assert decided(controller, [[gain - 1.0]]) == (None, 0, [kept])


def test_the_head_drafts_for_those_that_do_not_repeat_themselves(rng: np.random.Generator) -> None:
    controller = make(0.005, 0.02)
    settled(controller, 4, rng, sharpness=0.8)
    shape, drafting, repeated = decided(controller, [SURE, HOPELESS, SURE, HOPELESS])
    assert shape is not None
    assert drafting == 2
    assert repeated == [8, 0, 8, 0]
    # A mixture takes what a draft takes.
    assert Decision(shape, drafting, np.array(repeated)).source is Source.HEAD


def test_what_drafts_cost_beside_the_forwards_decides_too(rng: np.random.Generator) -> None:
    found = []
    for head, text in ((1.0, 50.0), (50.0, 1.0)):
        controller = make(0.001, 0.001)
        settled(controller, 1, rng)
        for source, seconds in ((Source.HEAD, head), (Source.TEXT, text), (Source.NONE, 1.0)):
            controller.learn_host(source, 1, seconds)
        found.append(decided(controller, [[0.9, 0.8, 0.7]])[0])
    assert found == [FULL, None]


@pytest.mark.parametrize("per_forward_row", [5.0, 0.05, 0.001], ids=["dear", "middling", "cheap"])
def test_a_text_in_a_loop_still_teaches_what_the_head_is_worth(
    per_forward_row: float, rng: np.random.Generator
) -> None:
    """Now and then, for one request, whatever the head's best shape; and steps without drafts are no rivals."""
    controller = make(0.1, per_forward_row)
    settled(controller, 3, rng)
    steps, probes = 2 * PROBE_STEPS[1] + 2, 0
    for _ in range(steps):
        found = controller.decide(np.ones(3, dtype=bool), 0, np.array([SURE] * 3))
        if controller.probing:
            probes += 1
            assert (found.shape, found.drafting) == (FULL, 1)
            assert sorted(found.repeated > 0) == [False, True, True]
        else:
            assert found.source is Source.TEXT
    assert 1 <= probes <= steps / PROBE_STEPS[0]


def test_probes_count_what_a_continuation_would_have_won(rng: np.random.Generator) -> None:
    """Of one request, in a loop: as many steps as the probe loses, by the share that it may take."""
    controller = make(0.05, 0.1)
    settled(controller, 1, rng, sharpness=0.3)
    steps = [controller.decide(np.ones(1, dtype=bool), 0, np.array([SURE])) and controller.probing for _ in range(900)]
    first, second, *_ = (step for step, probe in enumerate(steps) if probe)
    step = float(controller.verify(1 + len(SURE)))
    draft = forwards(FULL.levels) * float(controller.draft(FULL.width))
    lost = draft + float(controller.verify(1 + BUDGET) - controller.verify(1)) + len(SURE) * step / (1 + sum(SURE))
    assert second - first == math.ceil(lost / step / PROBE_SHARE)
    assert PROBE_STEPS[0] < second - first < PROBE_STEPS[1]


def test_nodes_beside_continuations_are_chosen_by_what_those_win(rng: np.random.Generator) -> None:
    """Brute force: rows of continuations are dear, whatever they win, and count as what they win."""
    controller, trees = make(0.03, 0.001), grow(0.6, 2, FULL, rng)
    chances = controller.calibration(trees.scores[:, 1:], np.ones((2, 1), dtype=int))
    ordered = np.sort(chances.ravel())[::-1]
    draft = forwards(FULL.levels) * float(controller.draft(2 * FULL.width))
    counts = []
    for wins in (0.5, 30.0):
        kept = controller.select(FULL, *trees.arguments(), others=1, beside=(32, wins))
        rates = [
            (3 + wins + ordered[:n].sum()) / (float(controller.verify(3 + 32 + n)) + draft)
            for n in range(len(ordered) + 1)
        ]
        assert kept.sum() == int(np.argmax(rates))
        counts.append(kept.sum())
    assert counts[0] > counts[1]


def test_half_a_continuation_is_tried_now_and_then(rng: np.random.Generator) -> None:
    controller = make(0.1, 5.0)
    settled(controller, 1, rng)
    found = [controller.decide(np.ones(1, dtype=bool), 0, np.array([SURE])).repeated[0] for _ in range(2 * HALF_STEPS)]
    assert found.count(4) == 2
    assert set(found) <= {0, 4, 8}


# All of it


@dataclass
class World:
    """What steps truly cost, which the controller has to find out."""

    per_row: float
    per_forward_row: float
    sharpness: float
    last: float = 1.0

    def seconds(self, rows: int, shape: DraftShape | None, batch: int) -> tuple[float, float]:
        draft = forwards(shape.levels) * (0.01 + self.per_forward_row * batch * shape.width) if shape else 0.0
        return 1.0 + self.per_row * max(0, rows - 16), draft

    def trees(self, shape: DraftShape, batch: int, step: int) -> Trees:
        """The same few in turn for every policy."""
        found, chosen = pool(self.sharpness, self.last, shape), (step * batch + np.arange(batch)) % POOL
        return Trees(*(part[chosen] for part in vars(found).values()))

    def rate(self, controller: BudgetController | DraftShape | None, batch: int, steps: int) -> float:
        """Expected tokens per second; of a fixed shape, all of whose nodes are verified, if no controller is given."""
        rng = np.random.default_rng(1)
        tokens, seconds, rows, trees, kept, shape, drafting = 0.0, 0.0, batch, None, None, None, 0
        for step in range(steps):
            offered = [] if trees is None else [slice(1, kept[b] + 1) for b in range(drafting)]
            emitted = batch + sum(float(np.exp(trees.truth[b, nodes]).sum()) for b, nodes in enumerate(offered))
            verified = self.seconds(rows, None, batch)[0]
            if isinstance(controller, BudgetController):
                controller.learn_verify(rows, verified * rng.uniform(0.9, 1.1))
                if trees is not None:
                    accepted = walk(trees, kept, rng)
                    kinds = controller.kinds(shape, trees.depths, np.ones((drafting, 1), dtype=bool))
                    told = [np.concatenate([x[b, n] for b, n in enumerate(offered)]) for x in (trees.scores, kinds)]
                    controller.learn_trees(told[0], accepted, told[1])
                shape, drafting = plan(controller, batch, random=batch)
            else:
                shape, drafting = controller, batch if controller else 0
            drafted = self.seconds(0, shape, drafting)[1]
            if step >= steps // 3:  # the first third is for learning
                tokens, seconds = tokens + emitted, seconds + verified + drafted
            trees = self.trees(shape, drafting, step) if shape and drafting else None
            rows = batch
            if trees is not None:
                kept = (np.isfinite(trees.scores).sum(axis=1) - 1).astype(int)
                if isinstance(controller, BudgetController):
                    controller.learn_draft(shape, drafting, drafted * rng.uniform(0.9, 1.1))
                    kept = controller.select(shape, *trees.arguments(), others=batch - drafting)
                rows += int(kept.sum())
        return tokens / seconds


def badly_measured(world: World, seed: int) -> BudgetController:
    """A controller whose first measurements come from a busy machine."""
    rng = np.random.default_rng(seed)
    return BudgetController(
        FULL,
        forwards,
        doubling(1024, lambda rows: world.seconds(rows, None, 1)[0] * rng.uniform(1.2, 1.8)),
        doubling(256, lambda rows: (0.01 + world.per_forward_row * rows) * rng.uniform(1.2, 1.8)),
    )


@pytest.mark.parametrize("batch", [1, 4, 12])
@pytest.mark.parametrize(
    "world",
    [
        World(0.002, 0.0005, 0.7),
        World(0.03, 0.004, 0.6),
        World(0.06, 0.03, 0.3),
        World(0.06, 0.002, 0.95),
        World(0.002, 0.01, 0.9, last=0.3),
    ],
    ids=["cheap", "middling", "hopeless", "sure", "weak last level"],
)
def test_no_fixed_policy_is_better(world: World, batch: int) -> None:
    """Within 6% in the mean of a few starts: probes, noise and learning have their price."""
    adaptive = [world.rate(badly_measured(world, seed), batch, 3 * 192) for seed in range(4)]
    fixed = {name: world.rate(shape, batch, 3 * 48) for name, shape in FIXED.items()}
    assert statistics.mean(adaptive) > 0.94 * max(fixed.values()), (adaptive, fixed)


FIXED = {"plain": None, "chain": DraftShape(FULL.levels, 1), "short chain": DraftShape(2, 1), "tree": FULL}


def test_control_no_fixed_policy_is_best_everywhere() -> None:
    """Else the test above could pass without adapting."""
    worlds = [(World(0.002, 0.0005, 0.7), 1), (World(0.06, 0.03, 0.3), 24), (World(0.06, 0.002, 0.95), 24)]
    best = {max(FIXED, key=lambda name: world.rate(FIXED[name], batch, 60)) for world, batch in worlds}
    assert len(best) > 1
