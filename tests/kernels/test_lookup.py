"""Prompt lookup against a search that spells its definition out: the compiled kernel and the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from jakiro_vllm.kernels import lookup, native
from jakiro_vllm.kernels.lookup import look_up
from jakiro_vllm.kernels.lookup import native as compiled
from jakiro_vllm.kernels.lookup.reference import look_up_reference

#: Replaced by the kernel under test.
search: Callable[..., tuple[Tensor, Tensor]] = look_up_reference


@pytest.fixture(autouse=True, params=["reference", "native"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernel is compared."""
    if request.param == "native":
        library = native.library()
        if library is None:
            pytest.skip("needs a C++ compiler")
        monkeypatch.setitem(globals(), "search", partial(compiled.look_up, library))
    return request.param


def by_definition(text: list[int], width: int, longest: int) -> tuple[list[int], int]:
    """Tries every place and every length."""
    n, best, place = len(text), 0, -1
    for p in range(n - 1):
        for m in range(1, min(longest, p + 1) + 1):
            if text[p - m + 1 : p + 1] == text[n - m :] and m >= best:
                best, place = m, p
    if not best:
        return [-1] * width, 0
    extended = list(text)
    for j in range(width):
        extended.append(extended[place + 1 + j])
    return extended[n:], best


def one(text: list[int], width: int = 4, longest: int = 8) -> tuple[list[int], int]:
    texts = torch.tensor([text], dtype=torch.int32)
    tokens, repeated = search(texts, torch.tensor([0]), torch.tensor([len(text)]), width, longest)
    return tokens[0].tolist(), int(repeated)


def test_what_followed_the_longest_repeat_is_the_draft() -> None:
    #              v here the last three were said before, and v here the last one only
    assert one([7, 1, 2, 3, 40, 41, 42, 43, 9, 3, 50, 1, 2, 3]) == ([40, 41, 42, 43], 3)


def test_of_equal_repeats_the_latest_counts() -> None:
    assert one([1, 2, 30, 31, 1, 2, 40, 41, 9, 9, 1, 2]) == ([40, 41, 9, 9], 2)


def test_a_loop_goes_on() -> None:
    assert one([5, 1, 2, 3, 1, 2, 3, 1], width=8) == ([2, 3, 1, 2, 3, 1, 2, 3], 4)
    assert one([6, 6], width=3) == ([6, 6, 6], 1)


def test_a_long_enough_repeat_ends_the_search() -> None:
    assert one([1, 2, 3, 30, 0, 2, 3, 40, 1, 2, 3], longest=2) == ([40, 1, 2, 3], 2)


@pytest.mark.parametrize("text", [[1], [1, 2], [1, 2, 3, 4]])
def test_what_was_never_said_has_no_draft(text: list[int]) -> None:
    assert one(text) == ([-1] * 4, 0)


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 8])
@pytest.mark.parametrize("longest", [1, 3, 64])
def test_as_defined(vocabulary: int, longest: int) -> None:
    """Texts of all lengths, in any order, of rows with other things behind their end."""
    generator = torch.Generator().manual_seed(vocabulary)
    texts = torch.randint(vocabulary, (40, 60), dtype=torch.int32, generator=generator)
    rows = torch.randperm(40, generator=generator)
    lengths = torch.randint(1, 61, (40,), generator=generator)
    tokens, repeated = search(texts, rows, lengths, 7, longest)
    for row, length, found, count in zip(rows, lengths, tokens, repeated, strict=True):
        assert (found.tolist(), int(count)) == by_definition(texts[row, :length].tolist(), 7, longest)


def test_texts_may_lie_apart() -> None:
    whole = torch.arange(60, dtype=torch.int32).view(3, 20) % 5
    tokens, repeated = search(whole[:, :12], torch.tensor([2, 0]), torch.tensor([12, 9]), 3, 8)
    for found, count, text in zip(tokens, repeated, (whole[2, :12], whole[0, :9]), strict=True):
        assert (found.tolist(), int(count)) == by_definition(text.tolist(), 3, 8)


def test_no_texts_no_drafts() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    tokens, repeated = search(torch.zeros(1, 4, dtype=torch.int32), none, none, 3, 8)
    assert tokens.shape == (0, 3)
    assert repeated.shape == (0,)


@pytest.mark.parametrize(("row", "length"), [(-1, 2), (2, 2), (0, 0), (0, 5)])
def test_what_lies_outside_is_refused(row: int, length: int) -> None:
    with pytest.raises(IndexError, match="rows and lengths must lie in texts"):
        search(torch.zeros(2, 4, dtype=torch.int32), torch.tensor([row]), torch.tensor([length]), 3, 8)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"texts": torch.zeros(2, 4)}, "texts must be"),
        ({"texts": torch.zeros(4, 2, dtype=torch.int32).T}, "texts must be"),
        ({"rows": torch.zeros(1, dtype=torch.int32)}, "rows must be"),
        ({"lengths": torch.ones(2, dtype=torch.int64)}, "lengths must be"),
        ({"width": 0}, "at least 1"),
        ({"longest": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], sentence: str) -> None:
    given = {
        "texts": torch.zeros(2, 4, dtype=torch.int32),
        "rows": torch.zeros(1, dtype=torch.int64),
        "lengths": torch.ones(1, dtype=torch.int64),
        "width": 3,
        "longest": 8,
    }
    with pytest.raises(ValueError, match=sentence):
        look_up(**(given | change))


def test_without_a_compiler_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "compiled", lambda *tensors: None)
    texts = torch.tensor([[1, 2, 3, 1, 2]], dtype=torch.int32)
    tokens, repeated = look_up(texts, torch.tensor([0]), torch.tensor([5]), 2, 8)
    assert tokens.tolist() == [[3, 1]]
    assert repeated.tolist() == [2]
