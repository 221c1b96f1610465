"""What the pacer learns of verified trees."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from jakiro_vllm.decode.budget import HALF_STEPS, BudgetController, Decision
from jakiro_vllm.decode.calibration import Calibration
from jakiro_vllm.decode.costs import RowTimes, Source
from jakiro_vllm.decode.drafter import DraftShape
from jakiro_vllm.decode.lookup import Lookup
from jakiro_vllm.integration import pacing
from jakiro_vllm.integration.pacing import FIRST_STEPS, LEARN_STEPS, Pacer
from jakiro_vllm.tree.batch import TreeBatch, chains
from jakiro_vllm.tree.walk import Accepted

SHAPE = DraftShape(2, 2)


class Recorder(BudgetController):
    """Keeps every node of every draft, and what it is told of them."""

    def __init__(self) -> None:
        times = RowTimes([1, 64], [1.0, 1.0])
        super().__init__(SHAPE, lambda levels: max(1, levels - 1), times, times)
        self.told: list[tuple[list[float], list[bool], list[int]]] = []

    def learn_trees(self, scores: Any, accepted: Any, kinds: Any) -> None:
        self.told.append((scores.tolist(), accepted.tolist(), kinds.tolist()))


def tree_of(scores: list[list[float]]) -> TreeBatch:
    """Two children of the root and a child of the first, as one draft per row of scores."""
    batch = len(scores)
    parents = torch.tensor([-1, 0, 0, 1]).expand(batch, 4)
    depths = torch.tensor([0, 1, 1, 2]).expand(batch, 4)
    words = torch.tensor([1, 3, 5, 11]).expand(batch, 4)
    tokens = torch.tensor([9, 10, 11, 12]).expand(batch, 4).clone()
    return TreeBatch(tokens, parents, depths, words, torch.full((batch,), 4), torch.tensor(scores))


@pytest.fixture
def drafted() -> tuple[Pacer, Recorder, TreeBatch]:
    """Two requests with a tree each: ``a`` is greedy and ``b`` samples."""
    recorder = Recorder()
    pacer = Pacer(recorder)
    trees = tree_of([[0.0, -0.1, -2.0, -3.0], [0.0, -0.5, -0.7, -0.9]])
    kept = pacer.grow(["a", "b"], SHAPE, np.array([False, True]), 0, lambda: trees)
    assert kept.num_nodes.tolist() == [4, 4]
    return pacer, recorder, kept


def verify(pacer: Pacer, trees: TreeBatch, path: list[list[int]], counts: list[int]) -> None:
    accepted = Accepted(torch.tensor(path), torch.tensor(path), torch.tensor(counts))
    has_tree = trees.num_nodes > 1
    pacer.verified(["a", "b"], trees, has_tree, None, accepted)


def test_verified_nodes_are_told_with_their_scores_outcomes_and_kinds(
    drafted: tuple[Pacer, Recorder, TreeBatch],
) -> None:
    pacer, recorder, trees = drafted
    verify(pacer, trees, [[0, 1, 3], [0, 2, 0]], [2, 1])
    scores, hits, kinds = recorder.told[-1]
    assert scores == pytest.approx([-0.1, -2.0, -3.0, -0.5, -0.7, -0.9])
    assert hits == [True, False, True, False, True, False]
    greedy, random, foreseen = 0, Calibration.RANDOM, Calibration.FORESEEN
    assert kinds == [greedy, greedy, greedy + foreseen, random, random, random + foreseen]


def test_what_lies_behind_the_end_of_a_path_was_not_accepted(drafted: tuple[Pacer, Recorder, TreeBatch]) -> None:
    pacer, recorder, trees = drafted
    verify(pacer, trees, [[0, 1, 3], [0, 2, 3]], [0, 0])
    assert not any(recorder.told[-1][1])


def test_struck_nodes_and_those_that_were_not_scheduled_tell_nothing(
    drafted: tuple[Pacer, Recorder, TreeBatch],
) -> None:
    pacer, recorder, trees = drafted
    tokens = trees.tokens.clone()
    tokens[0, 2] = -1
    cut = TreeBatch(tokens, trees.parents, trees.depths, trees.ancestors, torch.tensor([4, 2]))
    verify(pacer, cut, [[0, 1, 3], [0, 0, 0]], [2, 0])
    assert recorder.told[-1][0] == pytest.approx([-0.1, -3.0, -0.5])


def test_drafts_that_vllm_makes_up_for_a_resumed_request_tell_nothing(
    drafted: tuple[Pacer, Recorder, TreeBatch],
) -> None:
    """A request that is resumed still has the scores of its last tree, which may be smaller than what vLLM pads."""
    pacer, recorder, _ = drafted
    for width in (4, 8):
        padded = chains(torch.full((2, width), -1), torch.tensor([width, 1]))
        verify(pacer, padded, [[0], [0]], [0, 0])
        assert recorder.told[-1] == ([], [], [])


def test_a_request_that_has_ended_is_forgotten(drafted: tuple[Pacer, Recorder, TreeBatch]) -> None:
    pacer, recorder, trees = drafted
    pacer.forget("a")
    pacer.forget("never seen")
    verify(pacer, trees, [[0, 1, 3], [0, 2, 0]], [2, 1])
    assert recorder.told[-1][0] == pytest.approx([-0.5, -0.7, -0.9])


def test_a_step_counts_as_a_verification_only_if_its_rows_are_known(
    drafted: tuple[Pacer, Recorder, TreeBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    pacer, recorder, trees = drafted
    rows: list[int] = []
    monkeypatch.setattr(recorder, "learn_verify", lambda count, seconds: rows.append(count))
    accepted = Accepted(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    for known in (None, 8):
        pacer.verified(["a", "b"], trees, trees.num_nodes > 1, known, accepted)
    assert rows == [8]


def test_later_steps_teach_now_and_then(drafted: tuple[Pacer, Recorder, TreeBatch]) -> None:
    pacer, recorder, trees = drafted
    for _ in range(FIRST_STEPS + 4 * LEARN_STEPS):
        pacer.forward_ends()
        verify(pacer, trees, [[0, 1, 3], [0, 2, 0]], [2, 1])
    assert len(recorder.told) == FIRST_STEPS + 4


def test_a_probe_teaches_whenever_it_comes(drafted: tuple[Pacer, Recorder, TreeBatch]) -> None:
    pacer, recorder, trees = drafted
    for _ in range(FIRST_STEPS + 1):
        pacer.forward_ends()
    assert pacer._steps % LEARN_STEPS
    for probing in (False, True):
        recorder.probing = probing
        verify(pacer, trees, [[0, 1, 3], [0, 2, 0]], [2, 1])
        assert len(recorder.told) == probing


def test_steps_with_half_the_nodes_teach_too() -> None:
    """Whatever step they begin at, some of them fall on one that teaches."""
    assert math.gcd(HALF_STEPS, LEARN_STEPS) == 1


# Decisions


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "get_tp_group", lambda: SimpleNamespace(world_size=1))


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(pacing, "time", found)
    return found


#: Of two requests, the first of which is in a loop.
TEXTS = torch.tensor([[1, 2, 1, 2, 1], [1, 2, 3, 4, 5]], dtype=torch.int32)


def decide(pacer: Pacer, room: int = 9) -> tuple[Decision, TreeBatch | None]:
    sizes = torch.full((2,), 5)
    return pacer.decide(["a", "b"], np.zeros(2, bool), 0, np.full(2, room), TEXTS, torch.arange(2), sizes)


def text_only(pacer: Pacer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens with any chance, and no head."""

    def everything(random: Any, others: int, chances: Any) -> Decision:
        return Decision(None, 0, (chances > 0).sum(axis=1))

    monkeypatch.setattr(pacer.controller, "decide", everything)


def test_continuations_become_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    pacer = Pacer(Recorder(), Lookup(4))
    text_only(pacer, monkeypatch)
    decision, found = decide(pacer)
    assert decision.source is Source.TEXT
    assert found is not None
    assert found.num_nodes.tolist() == [5, 1]
    assert found.tokens[0, 1:].tolist() == [2, 1, 2, 1]
    assert found.parents[0].tolist() == [-1, 0, 1, 2, 3]


@pytest.mark.parametrize("room", [0, 1, 3])
def test_nobody_drafts_beyond_a_requests_last_token(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    pacer = Pacer(Recorder(), Lookup(4))
    text_only(pacer, monkeypatch)
    decision, found = decide(pacer, room)
    assert decision.repeated.tolist() == [room, 0]
    assert (found is None) == (room == 0)


def test_without_lookup_there_are_no_continuations(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    told: list[Any] = []
    nothing = Decision(None, 0, np.zeros(2, dtype=np.int64))
    monkeypatch.setattr(recorder, "decide", lambda random, others, chances: told.append(chances) or nothing)
    pacer = Pacer(recorder)
    decision, found = decide(pacer)
    assert (decision.shape, decision.drafting, decision.repeated.tolist(), found) == (None, 0, [0, 0], None)
    assert told == [None]
    pacer.followed(["a"], [[1]], np.zeros(1, bool))


def test_a_continuation_is_not_taken_for_the_heads_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head drafts, then the text does: what is verified then says nothing of the head."""
    recorder = Recorder()
    pacer = Pacer(recorder, Lookup(3))
    trees = tree_of([[0.0, -0.1, -2.0, -3.0], [0.0, -0.5, -0.7, -0.9]])
    pacer.grow(["a", "b"], SHAPE, np.array([False, True]), 0, lambda: trees)
    text_only(pacer, monkeypatch)
    _, found = decide(pacer)
    assert found is not None
    verify(pacer, found, [[0, 1, 2, 3], [0, 0, 0, 0]], [3, 0])
    assert recorder.told[-1] == ([], [], [])


def test_what_a_decision_costs_is_timed_from_it_to_the_next(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the forward and the draft; a step with a prompt in it does not count, nor two steps together."""
    recorder = Recorder()
    pacer = Pacer(recorder, Lookup(3))
    text_only(pacer, monkeypatch)
    told: list[tuple[Source, int, float]] = []
    monkeypatch.setattr(recorder, "learn_host", lambda *what: told.append(what))
    accepted = Accepted(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    bare = chains(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
    for rows, decides in ((2, True), (2, True), (None, True), (2, True), (2, False), (2, True), (2, True)):
        clock.now += 0.25
        pacer.forward_begins()
        clock.now += 3.0
        pacer.forward_ends()
        clock.now += 0.5
        pacer.verified(["a", "b"], bare, bare.num_nodes > 1, rows, accepted)
        if decides:
            decide(pacer)
    assert told == [(Source.TEXT, 2, 0.75)] * 3


@pytest.mark.parametrize("shape", [None, DraftShape(3, 2)])
def test_all_ranks_decide_as_the_first(monkeypatch: pytest.MonkeyPatch, shape: DraftShape | None) -> None:
    """Whatever their clocks say."""
    first = Decision(shape, 2 if shape else 0, np.array([3, 0, 0]), 2.25)
    sent: list[torch.Tensor] = []

    def broadcast(numbers: torch.Tensor) -> None:
        if sent:
            numbers.copy_(sent[0])
        else:
            sent.append(numbers.clone())

    group = SimpleNamespace(world_size=2, broadcast=broadcast)
    monkeypatch.setattr(pacing, "get_tp_group", lambda: group)
    for decision in (first, Decision(SHAPE, 1, np.array([0, 5, 1]))):
        found = pacing.first_ranks_decision(decision)
        assert (found.shape, found.drafting, found.wins) == (first.shape, first.drafting, 2.25)
        assert found.repeated.tolist() == [3, 0, 0]
