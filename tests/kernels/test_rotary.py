"""The rotary embedding against complex rotation: the compiled kernel and the reference.

T rows, H query heads, G KV heads, D head size, B sequences, K nodes of each, P positions.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jakiro_vllm.kernels import native
from jakiro_vllm.kernels import rotary as wrapper
from jakiro_vllm.kernels.rotary import place, rotate

#: The result is rounded once.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
POSITIONS = 50
NAN = float("nan")


@pytest.fixture(autouse=True, params=["native", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The wrapper runs the compiled kernel, whose allocations hold NaN, or the reference."""
    chosen: str = request.param
    if chosen == "reference":
        monkeypatch.setattr(wrapper, "compiled", lambda *tensors: None)
    elif native.library() is None:
        pytest.skip("needs a C++ compiler")
    else:
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(NAN))
        for name in ("rotate_reference", "place_reference"):
            monkeypatch.setattr(wrapper, name, None)
    return chosen


def table_of(dim: int) -> Tensor:
    """``[P, D]``, a row of NaN behind the last."""
    angles = torch.arange(POSITIONS).unsqueeze(1) * 0.7 ** torch.arange(dim // 2)
    rows = torch.cat([angles.cos(), angles.sin()], dim=1)
    return torch.cat([rows, torch.full((1, dim), NAN)])[:POSITIONS]


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """By a product of complex numbers, in float64."""
    half = x.shape[-1] // 2
    angles = positions.unsqueeze(-1) * 0.7 ** torch.arange(half)
    numbers = torch.complex(x[..., :half].double(), x[..., half:].double())
    numbers = numbers * torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
    return torch.cat([numbers.real, numbers.imag], dim=-1)


def assert_near(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=8 * tolerance)


@DTYPES
@pytest.mark.parametrize(("rows", "heads", "dim"), [(1, 1, 2), (5, 3, 6), (4, 2, 64), (3, 1, 80), (0, 2, 4)], ids=str)
def test_rotate(rows: int, heads: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    wide = torch.randn(rows, heads * dim + 7, generator=generator).to(dtype)
    x = wide[:, 3 : 3 + heads * dim].view(rows, heads, dim) if rows else wide[:, 7:].view(rows, heads, dim)
    positions = torch.randint(0, POSITIONS, (rows,), generator=generator)
    found = rotate(x, positions, table_of(dim))
    assert found.dtype == dtype
    assert_near(found, turned(x, positions))


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 3, 6), (2, 1, 34)], ids=str)
@pytest.mark.parametrize(("batch", "nodes"), [(1, 1), (3, 4), (0, 4)], ids=str)
def test_place(
    batch: int, nodes: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    rows = batch * nodes
    projected = torch.randn(rows, (heads + 2 * kv_heads) * dim, generator=generator).to(dtype)
    positions = torch.randint(0, POSITIONS, (rows,), generator=generator)
    scratch = torch.full((2, batch, nodes + 5, kv_heads, dim), NAN, dtype=dtype)
    keys, values = scratch[:, :, 2 : 2 + nodes]
    query = place(projected, positions, table_of(dim), heads, keys, values)
    q, k, v = projected.view(rows, heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], dim=1)
    assert_near(query, turned(q, positions))
    assert_near(keys, turned(k, positions).view(keys.shape))
    assert torch.equal(values, v.reshape(values.shape))
    assert scratch[:, :, :2].isnan().all()
    assert scratch[:, :, 2 + nodes :].isnan().all()


def test_a_position_without_a_row_is_refused() -> None:
    with pytest.raises(IndexError):
        rotate(torch.zeros(1, 1, 4), torch.tensor([POSITIONS]), table_of(4))


@pytest.mark.parametrize("implementation", ["reference"], indirect=True)
def test_other_tensors_are_left_to_the_reference(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """More dimensions, float64, heads apart, and gradients."""
    monkeypatch.undo()
    positions, table = torch.tensor([[3, 4]]), table_of(4)
    x = torch.randn(1, 2, 3, 4, generator=generator)
    torch.testing.assert_close(rotate(x, positions, table).double(), turned(x, positions))
    x = x.squeeze(0)
    torch.testing.assert_close(rotate(x.double(), positions[0], table.double()), turned(x, positions[0]))
    apart = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(rotate(apart, positions[0], table).double(), turned(x, positions[0]))
    assert rotate(x.requires_grad_(), positions[0], table).requires_grad


def test_control_sines_of_another_sign_are_seen(generator: torch.Generator) -> None:
    """Negative control."""
    x, positions = torch.randn(3, 2, 8, generator=generator), torch.tensor([1, 2, 3])
    table = table_of(8)
    table[:, 4:] *= -1
    with pytest.raises(AssertionError):
        assert_near(rotate(x, positions, table), turned(x, positions))
