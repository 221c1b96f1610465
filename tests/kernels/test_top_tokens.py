"""The most probable tokens against sorting: the kernels, in Triton's interpreter and compiled, and the reference.

T rows, V vocabulary, W tokens per row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from jakiro_vllm.kernels import native
from jakiro_vllm.kernels import top_tokens as wrapper
from jakiro_vllm.kernels.top_tokens import native as compiled
from jakiro_vllm.kernels.top_tokens import top_tokens, triton_kernel
from jakiro_vllm.kernels.top_tokens.reference import top_tokens_reference
from jakiro_vllm.kernels.top_tokens.triton_kernel import launch_top_tokens

INF = float("inf")
NAN = float("nan")
#: Both sides see the same logits and compute in fp32, where they sum exponentials in another order; logits and
#: sums stay below 128 (7 bits of 24).
TOLERANCE = {"rtol": 0.0, "atol": 2**-16}
SPLIT = triton_kernel.TILE_ROWS * triton_kernel.TILE_COLUMNS
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
]


#: Replaced by the kernel under test.
launch: Callable[[Tensor, int], tuple[Tensor, Tensor]] = launch_top_tokens


@pytest.fixture(autouse=True, params=["triton", "native"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernel is compared."""
    if request.param == "native":
        library = native.library()
        if library is None:
            pytest.skip("needs a C++ compiler")
        monkeypatch.setitem(globals(), "launch", partial(compiled.top_tokens, library))
    return request.param


triton_only = pytest.mark.parametrize("kernel", ["triton"], indirect=True)
native_only = pytest.mark.parametrize("kernel", ["native"], indirect=True)


def expected(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """By sorting, in float64: the highest first, of equal ones the lower token."""
    values, tokens = logits.double().sort(dim=1, descending=True, stable=True)
    log_probs = values - logits.double().logsumexp(dim=1, keepdim=True)
    return tokens[:, :width], log_probs.masked_fill(values.isneginf(), -INF)[:, :width]


def check(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Compares the kernels with sorting, and the reference as far as ties do not matter."""
    found = tokens, log_probs = launch(logits, width)
    wanted_tokens, wanted = expected(logits, width)
    assert tokens.dtype == torch.int64
    assert log_probs.dtype == torch.float32
    assert torch.equal(tokens, wanted_tokens)
    torch.testing.assert_close(log_probs.double(), wanted, **TOLERANCE)

    tokens, log_probs = top_tokens_reference(logits, width)
    torch.testing.assert_close(log_probs.double(), wanted, **TOLERANCE)
    # Ties have equal log-probabilities, so values are compared where tokens may differ.
    assert torch.equal(logits.gather(1, tokens), logits.gather(1, wanted_tokens))
    assert all(row.unique().numel() == width for row in tokens)
    return found


@pytest.fixture(autouse=True)
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every allocation holds NaN, or the token that no vocabulary has."""
    empty = torch.empty

    def filled(*size: int, **options: object) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**31 - 1)

    monkeypatch.setattr(triton_kernel.torch, "empty", filled)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width"),
    [
        (1, 1, 1),
        (2, 5, 5),
        (3, 63, 63),
        (2, 300, 10),
        (5, SPLIT - 1, 4),
        (2, SPLIT, 1),
        (2, SPLIT + 1, 7),
        (3, 2 * SPLIT + 257, 10),
        (1, 32003, 63),
    ],
    ids=lambda value: str(value),
)
def test_random_logits(rows: int, vocabulary: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """In bf16 and fp16 many of them are equal."""
    check((torch.randn(rows, vocabulary, generator=generator) * 4).to(dtype), width)


def test_a_vocabulary_of_128k(generator: torch.Generator) -> None:
    check(torch.randn(2, 128_256, generator=generator, dtype=torch.bfloat16), 10)


def test_a_vocabulary_of_256k(generator: torch.Generator) -> None:
    check(torch.randn(1, 256_000, generator=generator), 10)


@pytest.mark.parametrize("step", [1, 256, 300, SPLIT], ids=["side by side", "one column", "spread", "other splits"])
def test_the_best_lie_together_or_apart(step: int, generator: torch.Generator) -> None:
    """All of the best tokens in one column of one split, or each in another split."""
    logits = torch.randn(3, 10 * SPLIT + 5, generator=generator)
    best = torch.arange(10) * step + 37
    logits[0, best] = 20.0 + torch.arange(10)
    logits[1, best] = 20.0 - torch.arange(10)
    logits[2, best] = 20.0
    tokens, _ = check(logits, 10)
    assert tokens.tolist() == [best.flip(0).tolist(), best.tolist(), best.tolist()]


def test_ties_keep_the_lower_token(generator: torch.Generator) -> None:
    check(torch.randint(0, 3, (4, 2 * SPLIT + 100), generator=generator).float(), 20)
    tokens, _ = check(torch.zeros(2, SPLIT + 9), 12)
    assert tokens.tolist() == [list(range(12))] * 2


@triton_only
def test_control_the_order_of_ties_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with candidates in the other order, the comparison fails."""

    def last_best(values: Any, index: Any) -> tuple[Any, Any]:
        best = tl.max(values, axis=0)
        return best, tl.max(tl.where(values == best, index, -1), axis=0)

    check(torch.zeros(1, 600), 5)
    monkeypatch.setattr(triton_kernel, "first_best", last_best)
    with pytest.raises(AssertionError):
        check(torch.zeros(1, 600), 5)


def test_both_zeros_are_one_number() -> None:
    logits = torch.tensor([[-0.0, 0.0, -0.0, -1.0, 0.0], [0.0, -0.0, 1.0, -0.0, -5.0]])
    tokens, _ = check(logits, 4)
    assert tokens.tolist() == [[0, 1, 2, 4], [2, 0, 1, 3]]


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, of the row without any
@pytest.mark.parametrize("left", [0, 1, 4, 9, 12])
def test_masked_tokens_come_last(left: int, generator: torch.Generator) -> None:
    """With fewer tokens than wanted, and in a row without any."""
    logits = torch.full((2, SPLIT + 50), -INF)
    kept = torch.randperm(SPLIT + 50, generator=generator)[:left]
    logits[:, kept] = torch.randn(2, left, generator=generator)
    _, log_probs = check(logits, 10)
    assert (log_probs.isneginf().sum(dim=1) == max(0, 10 - left)).all()


def test_a_split_without_candidates(generator: torch.Generator) -> None:
    logits = torch.randn(2, 3 * SPLIT, generator=generator)
    logits[:, SPLIT : 2 * SPLIT] = -INF
    logits[1, :SPLIT] = -INF
    check(logits, 10)


def test_large_logits_do_not_overflow(generator: torch.Generator) -> None:
    logits = torch.randn(3, SPLIT + 11, generator=generator)
    logits[0] += 3e4
    logits[1] -= 3e4
    logits[2] *= 1e4
    _, log_probs = launch(logits, 8)
    # A unit in the last place of the logits.
    torch.testing.assert_close(log_probs.double(), expected(logits, 8)[1], rtol=0.0, atol=2**-8)
    assert (log_probs <= 0).all()


def test_certainty_is_never_above_one() -> None:
    """A child must not be better than its parent, or re-ranking could lose the parent."""
    logits = torch.full((3, SPLIT + 3), -40.0)
    logits[:, 5] = torch.tensor([0.0, 17.3, 1e3])
    _, log_probs = check(logits, 3)
    assert log_probs[:, 0].tolist() == [0.0] * 3


@pytest.mark.parametrize("extra", [1, 64])
def test_memory_between_rows_is_not_read(extra: int, generator: torch.Generator) -> None:
    memory = torch.full((4, SPLIT + 7 + extra), float("nan"))
    memory[:, : SPLIT + 7] = torch.randn(4, SPLIT + 7, generator=generator)
    logits = memory[:, : SPLIT + 7]
    assert logits.stride() == (SPLIT + 7 + extra, 1)
    _, log_probs = check(logits, 10)
    assert not log_probs.isnan().any()


def test_nan_leads_to_no_token_beyond_the_vocabulary(generator: torch.Generator) -> None:
    logits = torch.randn(3, 700, generator=generator)
    logits[0] = float("nan")
    logits[1, ::2] = float("nan")
    logits[2] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # NaN with all bits set
    tokens, _ = launch(logits, 10)
    assert ((tokens >= 0) & (tokens < 700)).all()


@native_only
@pytest.mark.parametrize("values", [[1.0, NAN, 2.0, NAN], [NAN] * 4, [INF, 1.0, -INF, INF], [-INF] * 4], ids=str)
def test_what_is_no_number_is_as_in_the_reference(values: list[float]) -> None:
    """NaN first, and then nothing has a probability."""
    logits = torch.zeros(1, 40)
    logits[0, 5:9] = torch.tensor(values)
    tokens, log_probs = launch(logits, 12)
    wanted_tokens, wanted = top_tokens_reference(logits, 12)
    torch.testing.assert_close(log_probs, wanted, equal_nan=True)
    torch.testing.assert_close(logits.gather(1, tokens), logits.gather(1, wanted_tokens), equal_nan=True)
    assert tokens[0].unique().numel() == 12


@native_only
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads: int, generator: torch.Generator) -> None:
    logits = torch.randn(7, 40_000, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(logits, 5)
    finally:
        torch.set_num_threads(before)


@native_only
def test_control_a_best_token_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a kernel that leaves out the last token is found out."""
    logits = torch.arange(100.0).unsqueeze(0)
    whole = launch
    check(logits, 3)
    monkeypatch.setitem(globals(), "launch", lambda logits, width: whole(logits[:, :-1], width))
    with pytest.raises(AssertionError):
        check(logits, 3)


def test_no_rows() -> None:
    tokens, log_probs = launch(torch.empty(0, 100), 3)
    assert tokens.shape == log_probs.shape == (0, 3)


def test_control_a_column_keeps_more_than_its_best() -> None:
    """Negative control: without the second look into the columns, a column's second best token is lost."""
    logits = torch.zeros(1, SPLIT)
    logits[0, 5] = 3.0
    logits[0, 5 + triton_kernel.TILE_COLUMNS] = 2.0
    best = logits.view(triton_kernel.TILE_ROWS, -1).max(dim=0)
    by_column = best.values.topk(2).indices
    assert by_column.tolist() != [5, 5 + triton_kernel.TILE_COLUMNS]
    tokens, _ = check(logits, 2)
    assert tokens.tolist() == [[5, 5 + triton_kernel.TILE_COLUMNS]]


@triton_only
def test_the_wrapper_picks_by_device(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    logits = torch.randn(2, 100, generator=generator)
    launched = []

    def launch(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
        launched.append(width)
        return launch_top_tokens(logits, width)

    monkeypatch.setattr(triton_kernel, "launch_top_tokens", launch)
    on_cpu = top_tokens(logits, 4)
    assert launched == []
    monkeypatch.setattr(wrapper, "runs_triton", lambda tensor: True)
    assert torch.equal(top_tokens(logits, 4)[0], on_cpu[0])
    assert launched == [4]
    assert top_tokens(logits.double(), 4)[1].dtype == torch.float32
    assert launched == [4]


@pytest.mark.parametrize(
    ("logits", "width", "sentence"),
    [
        (torch.zeros(4), 1, r"must be \[T, V\], got shape \[4\]"),
        (torch.zeros(2, 4, dtype=torch.int64), 1, "must be float32, .*, got torch.int64"),
        (torch.zeros(2, 0), 1, "1 to 524288 tokens, got 0"),
        (torch.zeros(1, 1).expand(1, 2**19 + 1), 1, "1 to 524288 tokens, got 524289"),
        (torch.zeros(4, 2).T, 1, r"contiguous, got strides \(1, 2\)"),
        (torch.zeros(2, 100), 0, r"width must be in \[1, 63\], got 0"),
        (torch.zeros(2, 100), 64, r"width must be in \[1, 63\], got 64"),
        (torch.zeros(2, 5), 6, r"width must be in \[1, 5\], got 6"),
    ],
    ids=["shape", "dtype", "empty", "too many tokens", "strides", "no width", "too wide", "wider than V"],
)
def test_refused(logits: Tensor, width: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        top_tokens(logits, width)
