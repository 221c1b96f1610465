"""A head's forward on few rows in two calls, against the same formulas in float64.

R rows, C hidden size, H query heads, G KV heads, D head size, E experts, I expert intermediate size.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jakiro_vllm.kernels import forward, native
from jakiro_vllm.kernels.experts import reference as experts
from jakiro_vllm.kernels.forward import FewRows, HeadWeights, pack
from jakiro_vllm.kernels.rotary import reference as rotary

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs a C++ compiler")

#: Of the largest number: activations are rounded at every stage.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
H, G, D, POSITIONS = 4, 2, 16, 30


def random_weights(
    generator: torch.Generator, dtype: torch.dtype, hidden: int = 40, num_experts: int = 2, width: int = 24
) -> HeadWeights:
    """Of a head whose sizes are no multiples of a panel's."""

    def matrix(outputs: int, inputs: int) -> Tensor:
        return (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).to(dtype)

    contrast = num_experts > 1
    return HeadWeights(
        fuse=matrix(hidden, 2 * hidden),
        fuse_bias=torch.randn(hidden, generator=generator).to(dtype),
        qkv=matrix((H + 2 * G) * D, hidden),
        output=matrix(hidden, H * D),
        norm=torch.rand(hidden, generator=generator).to(dtype) + 0.5,
        eps=1e-5,
        gate=matrix(num_experts + 2, hidden) if contrast else None,
        up=matrix(2 * num_experts * width, hidden),
        down=matrix(hidden, num_experts * width),
        num_heads=H,
        num_experts=num_experts,
    )


def packed(weights: HeadWeights) -> FewRows:
    found = pack(weights)
    assert found is not None
    return found


def table() -> Tensor:
    angles = torch.arange(POSITIONS).unsqueeze(1) * 0.7 ** torch.arange(D // 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def assert_near(found: Tensor, expected: Tensor) -> None:
    allowed = TOLERANCES[found.dtype] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=allowed)


def wide(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.double()


DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
#: Batch and rows of each: one, a tile's remainder, several tiles.
SIZES = pytest.mark.parametrize("sizes", [(1, 1), (1, 4), (3, 5), (2, 25)], ids=str)


@DTYPES
@SIZES
def test_before_attention(sizes: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    weights = random_weights(generator, dtype)
    batch, each = sizes
    rows, hidden = batch * each, weights.fuse.shape[0]
    embeds, features = torch.randn(2, rows, hidden, generator=generator).to(dtype).unbind()
    positions = torch.randint(POSITIONS, (rows,), generator=generator)
    scratch = torch.full((2, batch, each + 3, G, D), float("nan"), dtype=dtype)
    keys, values = scratch[:, :, 1 : each + 1].unbind()
    x, query = packed(weights).project(embeds, features, positions, table(), keys, values)
    assert_near(x, F.linear(torch.cat([embeds, features], 1).double(), wide(weights.fuse), wide(weights.fuse_bias)))
    projected = F.linear(wide(x), wide(weights.qkv)).view(rows, H + 2 * G, D)
    turned = rotary.rotate_reference(projected[:, : H + G], positions, table().double())
    assert_near(query, turned[:, :H])
    assert_near(keys.flatten(0, 1), turned[:, H:])
    assert_near(values.flatten(0, 1), projected[:, H + G :])
    assert scratch[:, :, 0].isnan().all(), "what lies before the rows is left alone"
    assert scratch[:, :, each + 1 :].isnan().all(), "and what lies behind them"


@DTYPES
@SIZES
@pytest.mark.parametrize(
    ("num_experts", "contrastive"), [(1, False), (2, False), (2, True), (3, False), (3, True)], ids=str
)
def test_after_attention(
    num_experts: int, contrastive: bool, sizes: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    weights = random_weights(generator, dtype, num_experts=num_experts)
    rows, hidden = sizes[0] * sizes[1], weights.fuse.shape[0]
    x = torch.randn(rows, hidden, generator=generator).to(dtype)
    attended = torch.randn(rows, H * D, generator=generator).to(dtype)
    few = packed(weights)
    for _ in range(2):  # the second call finds its working memory used
        found = few.complete(x, attended, contrastive)
    residual = (wide(x) + F.linear(wide(attended), wide(weights.output))).to(dtype)
    # Which experts are selected must not hang on a rounding, so the oracle routes as it is rounded.
    routing = experts.route(residual, weights.norm, weights.eps, weights.gate, num_experts, num_experts > 1)
    routing = replace(
        routing,
        normed=wide(routing.normed),
        weights=routing.weights.double(),
        contrast=None if routing.contrast is None else routing.contrast.double(),
    )
    activations = experts.activate(routing.normed, wide(weights.up), num_experts, "swiglu", None)
    mixture, contrast = experts.combine(activations, wide(weights.down), routing, wide(residual), contrastive, None)
    assert_near(found[0], mixture)
    assert (found[1] is None) == (contrast is None)
    if contrast is not None and found[1] is not None:
        assert_near(found[1], contrast)
        assert not torch.equal(found[0], found[1])


def test_threads_share_large_products(generator: torch.Generator) -> None:
    weights = random_weights(generator, torch.float32, hidden=520, width=264)
    x, attended = torch.randn(5, 520, generator=generator), torch.randn(5, H * D, generator=generator)
    few, before = packed(weights), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(few.complete(x, attended, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True) if one is not None and two is not None)


@pytest.mark.parametrize("position", [-1, POSITIONS])
def test_a_position_outside_the_table_is_refused(position: int, generator: torch.Generator) -> None:
    few, keys = packed(random_weights(generator, torch.float32)), torch.empty(1, 2, G, D)
    rows = torch.zeros(2, 40)
    with pytest.raises(IndexError, match="prepare_positions"):
        few.project(rows, rows, torch.tensor([0, position]), table(), keys, keys.clone())


def test_what_does_not_pay_is_not_packed(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(generator, torch.float32)
    assert pack(random_weights(generator, torch.float64)) is None, "no kernel"
    size = sum(x.numel() * 4 for x in weights.matrices)
    monkeypatch.setattr(forward, "MAX_BYTES", size)
    assert pack(weights) is not None
    monkeypatch.setattr(forward, "MAX_BYTES", size - 1)
    assert pack(weights) is None, "too large"
    monkeypatch.setattr(forward, "compiled", lambda *tensors: None)
    assert pack(weights) is None, "no compiler"
