"""Products with packed weights, against ``F.linear``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jakiro_vllm.kernels import linear
from jakiro_vllm.kernels.linear import PackedProduct, PlainProduct, pack

#: Sums in another order; rounded once more where ``added`` is added by itself.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rows", [(1,), (5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("shape", [(48, 32), (33, 17)], ids=str)
def test_equals_linear(
    shape: tuple[int, int], rows: tuple[int, ...], bias: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    weight = torch.randn(shape, generator=generator).to(dtype)
    added_once = torch.randn(shape[0], generator=generator).to(dtype) if bias else None
    x = torch.randn(*rows, shape[1], generator=generator).to(dtype)
    added = torch.randn(*rows, shape[0], generator=generator).to(dtype)
    product = pack(weight, added_once)
    expected = F.linear(x, weight, added_once).float()
    allowed = TOLERANCES[dtype] * max(1.0, float(expected.abs().max())) if x.numel() else 0.0
    with torch.inference_mode():
        torch.testing.assert_close(product(x).float(), expected, rtol=0, atol=allowed)
        torch.testing.assert_close(product(x, added).float(), expected + added.float(), rtol=0, atol=2 * allowed)


def test_columns_of_a_wider_tensor(generator: torch.Generator) -> None:
    weight, wide = torch.randn(48, 32, generator=generator), torch.randn(5, 96, generator=generator)
    torch.testing.assert_close(pack(weight)(wide[:, 16:48]), F.linear(wide[:, 16:48], weight))


def test_float32_is_packed() -> None:
    assert isinstance(pack(torch.zeros(8, 8)), PackedProduct)


@pytest.mark.parametrize("broken", ["absent", "refusing", "wrong"])
def test_what_cannot_be_packed_is_multiplied_plainly(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(weight: torch.Tensor, bias: torch.Tensor | None) -> PlainProduct:
        if broken == "wrong":
            return PlainProduct(2 * weight, bias)
        raise AttributeError("no such operator") if broken == "absent" else RuntimeError("not on this processor")

    monkeypatch.setattr(linear, "PackedProduct", made)
    weight, x = torch.arange(12.0).view(3, 4), torch.ones(2, 4)
    assert torch.equal(pack(weight)(x), F.linear(x, weight))


@pytest.mark.parametrize("weight", [torch.zeros(4, 4).double(), torch.zeros(4, 4, device="meta")], ids=["fp64", "meta"])
def test_others_are_left_to_torch(weight: torch.Tensor) -> None:
    assert isinstance(pack(weight), PlainProduct)
