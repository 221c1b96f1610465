"""Continuations, and how likely they are found to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jakiro_vllm.decode.lookup import CLASSES, LONGEST, Lookup

WIDTH = 6
GREEDY, SAMPLED = np.array([False]), np.array([True])


def find(lookup: Lookup, text: list[int], name: str = "a") -> tuple[list[int], int]:
    tokens, repeated = lookup.find(
        [name], torch.tensor([text], dtype=torch.int32), torch.tensor([0]), torch.tensor([len(text)])
    )
    return tokens[0].tolist(), int(repeated[0])


def chances(lookup: Lookup, repeated: int, random: np.ndarray = GREEDY) -> list[float]:
    return lookup.chances(np.array([repeated]), random)[0].tolist()


def applied(lookup: Lookup) -> None:
    """Lets it use what it has learnt."""
    for _ in range(Lookup.APPLY):
        lookup.followed([], [], np.zeros(0, dtype=bool))


def test_at_first_the_rule_of_succession_holds() -> None:
    """After m agreeing tokens, j more agree in m of m + j cases."""
    assert chances(Lookup(2), 3) == pytest.approx([3 / 4, 3 / 4 * 4 / 5])  # classes of one number each
    assert chances(Lookup(1), 1) == pytest.approx([1 / 2])


def test_what_was_never_said_has_no_chance() -> None:
    assert chances(Lookup(WIDTH), 0) == [0.0] * WIDTH
    assert find(Lookup(WIDTH), [1, 2, 3]) == ([-1] * WIDTH, 0)


@pytest.mark.parametrize("random", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_chances_fall_along_a_chain_and_rise_with_agreement(random: np.ndarray) -> None:
    lookup = Lookup(WIDTH)
    rows = np.array([chances(lookup, m, random) for m in range(1, LONGEST + 1)])
    assert (np.diff(rows, axis=1) < 0).all()
    assert (np.diff(rows, axis=0) >= 0).all()
    assert rows.max() < 1.0


def test_chances_are_learnt_for_greedy_and_sampled_apart() -> None:
    """A text of which each token is repeated with a known probability; verified or not does not matter."""
    rng = np.random.default_rng(0)
    lookup, truth = Lookup(WIDTH), {False: 0.9, True: 0.3}
    text = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]
    for _ in range(2000):
        for name, random in (("greedy", False), ("sampled", True)):
            tokens, repeated = find(lookup, text, name)
            assert (tokens[:3], repeated) == ([4, 5, 6], 3)
            agrees = rng.uniform(size=3) < truth[random]
            emitted = [token if good else 99 for token, good in zip(tokens, agrees, strict=False)]
            lookup.followed([name], [emitted], np.array([random]))
    applied(lookup)
    for random, chance in ((GREEDY, 0.9), (SAMPLED, 0.3)):
        found = chances(lookup, 3, random)
        assert found[:3] == pytest.approx([chance, chance**2, chance**3], abs=0.08)


def test_tokens_behind_a_disagreement_teach_nothing() -> None:
    lookup = Lookup(WIDTH)
    before = lookup._tried.copy()
    find(lookup, [1, 2, 3, 4, 5, 6, 7, 8, 9, 1])
    lookup.followed(["a"], [[2, 99, 4, 5]], GREEDY)
    tried = lookup._tried - before
    assert tried.sum() == 2
    assert tried[0, :2].tolist() == [1, 1]  # after one token of agreement, and after two


def test_each_continuation_teaches_once() -> None:
    """What a request says later belongs to a later one, even if none was found in between."""
    lookup = Lookup(WIDTH)
    find(lookup, [1, 2, 3, 1])
    lookup.followed(["a"], [[]], GREEDY)  # nothing came yet
    assert "a" in lookup._found
    lookup.followed(["a"], [[2]], GREEDY)
    tried = lookup._tried.sum()
    lookup.followed(["a"], [[2]], GREEDY)
    assert lookup._tried.sum() <= tried


def test_requests_without_a_continuation_teach_nothing() -> None:
    lookup = Lookup(WIDTH)
    before = lookup._tried.copy()
    find(lookup, [1, 2, 3])
    lookup.followed(["a", "unknown"], [[1], [2]], np.array([False, True]))
    assert (lookup._tried == before).all()
    find(lookup, [1, 1])
    lookup.forget("a")
    lookup.forget("a")
    lookup.followed(["a"], [[1]], GREEDY)
    assert (lookup._tried == before).all()


def test_old_experience_fades() -> None:
    lookup = Lookup(WIDTH)
    for _ in range(100):
        find(lookup, [1, 2, 1])
        lookup.followed(["a"], [[99]], GREEDY)
    applied(lookup)
    assert chances(lookup, 1)[0] < 0.1
    for _ in range(5000):
        lookup.followed([], [], np.zeros(0, dtype=bool))
    applied(lookup)
    assert chances(lookup, 1)[0] == pytest.approx(0.5, abs=0.01)


def test_agreement_without_end_is_one_class() -> None:
    assert CLASSES[-1] == LONGEST
    lookup = Lookup(WIDTH)
    assert find(lookup, [7] * 300) == ([7] * WIDTH, LONGEST)
    for _ in range(50):
        find(lookup, [7] * 300)
        lookup.followed(["a"], [[7] * 40], GREEDY)
    applied(lookup)
    assert chances(lookup, LONGEST)[-1] > 0.97
