"""Expert routing and the mixture of experts: the kernels, interpreted and compiled, against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jakiro_vllm.kernels import experts, native
from jakiro_vllm.kernels.experts import Routing, reference
from jakiro_vllm.kernels.experts import native as compiled

pytest.importorskip("triton")
from jakiro_vllm.kernels.experts import triton_kernel

EPS = 1e-5
INF, NAN = float("inf"), float("nan")
#: Sums in another order, and in float16 and bfloat16 also intermediates that only the reference rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
#: Logits closer than this may change places where sums are rounded differently.
NEAR_TIE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
#: bfloat16 rounds logits of up to 4 to steps of 2**-6, and one step changes a softmax by a quarter of it.
WEIGHT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

#: Elements behind everything that a kernel reads or writes.
GUARD = 512


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """One set of experts and the rows they read."""

    variant: str
    rows: int
    num_experts: int
    hidden: int
    width: int
    dtype: torch.dtype = torch.float32

    @property
    def contrast(self) -> bool:
        return self.variant == "jakiro"

    @property
    def activation(self) -> str:
        return "gelu" if self.variant == "jakiro_star" else "swiglu"

    def __str__(self) -> str:
        sizes = f"T{self.rows}-E{self.num_experts}-C{self.hidden}-I{self.width}"
        return f"{self.variant}-{sizes}-{dtype_id(self.dtype)}"


CASES = [
    Case("jakiro", 1, 2, 64, 48),
    Case("jakiro", 3, 2, 272, 24),
    Case("jakiro", 10, 2, 272, 200, torch.bfloat16),
    Case("jakiro", 40, 4, 96, 72),
    Case("jakiro", 40, 8, 130, 40, torch.float16),
    Case("jakiro", 129, 2, 80, 40),
    Case("jakiro", 129, 4, 144, 24, torch.bfloat16),
    Case("jakiro", 3, 8, 272, 1040),
    Case("jakiro_star", 1, 4, 272, 24, torch.float16),
    Case("jakiro_star", 10, 2, 130, 72),
    Case("jakiro_star", 40, 8, 64, 200, torch.bfloat16),
    Case("jakiro_star", 3, 1, 64, 40),
    Case("dense", 1, 1, 272, 200),
    Case("dense", 10, 1, 130, 1040, torch.bfloat16),
    Case("dense", 129, 1, 64, 24),
]
TWO_EXPERTS = Case("jakiro", 10, 2, 272, 72)
FOUR_EXPERTS = Case("jakiro", 12, 4, 96, 72)


@dataclass(frozen=True)
class Weights:
    """Random weights of a case, scaled such that logits and outputs are about 1."""

    residual: Tensor
    norm: Tensor
    gate: Tensor | None
    up: Tensor
    down: Tensor


def weights_of(case: Case, generator: torch.Generator) -> Weights:
    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = (scale * torch.randn(shape, generator=generator) + shift).flatten()
        behind = torch.full((GUARD,), float("nan"))  # not to be read
        return torch.cat([values, behind]).to(case.dtype)[: values.numel()].view(shape)

    width = case.num_experts * case.width
    halves = experts.HALVES[case.activation]
    num_gates = {"jakiro": case.num_experts + 2, "jakiro_star": case.num_experts, "dense": 0}[case.variant]
    return Weights(
        draw(case.rows, case.hidden),
        draw(case.hidden, scale=0.2, shift=1.0),
        draw(num_gates, case.hidden, scale=case.hidden**-0.5) if num_gates else None,
        draw(halves * width, case.hidden, scale=1.5 * case.hidden**-0.5),
        draw(case.hidden, width, scale=2 * case.width**-0.5),
    )


def routed(case: Case, weights: Weights) -> Routing:
    """The reference's routing, so that what follows it is compared on its own."""
    return reference.route(weights.residual, weights.norm, EPS, weights.gate, case.num_experts, case.contrast)


def selected(routing: Routing, values: Tensor) -> Tensor:
    """``[T, E, I] -> [T, K, I]``."""
    return values.gather(1, routing.experts.unsqueeze(2).expand(*routing.experts.shape, values.shape[2]))


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compares within a share of the largest magnitude; NaN is never near."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    scale = expected.float().abs().max().clamp(min=1.0)
    worst = (found.float() - expected.float()).abs().max() / scale
    assert worst <= tolerance, f"{float(worst):.2e} of the largest magnitude, {tolerance:.0e} allowed"


@pytest.fixture(autouse=True)
def _nan_filled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fills what the launch functions allocate: NaN, or an expert that is not there. Nothing is written past it."""
    guards: list[Tensor] = []

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args, **kwargs) -> Tensor:
            made = make(*args, **kwargs)
            fill = float("nan") if made.is_floating_point() else -7
            memory = torch.full((made.numel() + GUARD,), fill, dtype=made.dtype)
            guards.append(memory[made.numel() :])
            return memory[: made.numel()].view(made.shape)

        return poisoned

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", filled(torch.empty))
        patch.setattr(torch, "empty_like", filled(torch.empty_like))
        patch.setattr(Tensor, "new_empty", filled(Tensor.new_empty))
        yield
    for guard in guards:
        assert bool((guard.isnan() if guard.is_floating_point() else guard == -7).all())


class Compiled:
    """The compiled kernels, to be called as Triton's; the products are PyTorch's."""

    separate = staticmethod(reference.separate)

    @staticmethod
    def route(*arguments) -> Routing:
        return compiled.route(native.library(), *arguments)

    @staticmethod
    def activate(normed: Tensor, up: Tensor, routing: Routing, num_experts: int, halves: int) -> Tensor:
        activation = next(name for name, count in experts.HALVES.items() if count == halves)
        return compiled.activate(native.library(), normed, up, num_experts, activation, None)

    @staticmethod
    def combine(*arguments) -> tuple[Tensor, Tensor | None]:
        return compiled.combine(native.library(), *arguments, None)


needs_compiler = pytest.mark.skipif(native.library() is None, reason="needs a C++ compiler")
KERNELS = [pytest.param(triton_kernel, id="triton"), pytest.param(Compiled, id="native", marks=needs_compiler)]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest):
    """One set of kernels."""
    return request.param


@pytest.fixture
def _kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "runs_triton", lambda tensor: True)


ROUTES = [pytest.param(reference.route, id="reference"), pytest.param(triton_kernel.route, id="triton")]
ROUTES.append(pytest.param(Compiled.route, id="native", marks=needs_compiler))


class TestRoute:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_equals_the_reference(self, case, kernel, generator):
        weights = weights_of(case, generator)
        args = (weights.residual, weights.norm, EPS, weights.gate, case.num_experts, case.contrast)
        found, expected = kernel.route(*args), reference.route(*args)
        assert_near(found.normed, expected.normed, TOLERANCE[case.dtype])
        assert found.experts.dtype == torch.int64
        assert found.weights.dtype == torch.float32
        if weights.gate is None:
            assert torch.equal(found.experts, expected.experts)
            assert torch.equal(found.weights, expected.weights)
            return
        logits = F.linear(expected.normed.double(), weights.gate.double())
        apart = far_apart(logits[:, : case.num_experts], NEAR_TIE[case.dtype], expected.experts.shape[1])
        assert apart.any()
        assert torch.equal(found.experts[apart], expected.experts[apart])
        assert_near(found.weights[apart], expected.weights[apart], WEIGHT_TOLERANCE[case.dtype])
        if case.contrast:
            apart &= far_apart(logits[:, case.num_experts :], NEAR_TIE[case.dtype], 1)
            assert apart.any()
            assert_near(found.contrast[apart], expected.contrast[apart], WEIGHT_TOLERANCE[case.dtype])
        else:
            assert found.contrast is None

    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize("num_experts", [2, 4, 8], ids="E{}".format)
    def test_ties_go_to_the_lower_index(self, route, num_experts, generator):
        residual = torch.randn(3, 32, generator=generator)
        gate = torch.randn(1, 32, generator=generator).expand(num_experts, 32).contiguous()
        found = route(residual, torch.ones(32), EPS, gate, num_experts, False)
        assert found.experts.tolist() == [[0, 1]] * 3
        assert found.weights.tolist() == [[0.5, 0.5]] * 3

    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize(
        ("num_experts", "logits", "chosen", "signed"),
        [
            pytest.param(2, [0.0, 1.0, 2.0, 0.0], [1, 0], [-0.1192, 0.8808], id="two-by-expert"),
            pytest.param(2, [1.0, 0.0, 0.0, 2.0], [0, 1], [-0.1192, 0.8808], id="two-second-larger"),
            pytest.param(3, [0.0, 1.0, 2.0, 2.0, 0.0], [2, 1], [0.8808, -0.1192], id="three-by-rank"),
            pytest.param(3, [0.0, 1.0, 2.0, 0.0, 2.0], [2, 1], [-0.1192, 0.8808], id="three-second-larger"),
        ],
    )
    def test_contrast_belongs_to_experts_or_to_ranks(self, route, num_experts, logits, chosen, signed):
        residual = torch.zeros(1, 16)
        residual[0, 0] = 4.0  # its RMS is 1, and the gate reads this element alone
        gate = torch.zeros(num_experts + 2, 16)
        gate[:, 0] = torch.tensor(logits) / 4
        found = route(residual, torch.ones(16), 0.0, gate, num_experts, True)
        assert found.experts.tolist() == [chosen]
        assert found.contrast[0].tolist() == pytest.approx(signed, abs=1e-4)

    @pytest.mark.filterwarnings("ignore:invalid value")
    def test_reads_nothing_of_other_rows(self, kernel, generator):
        case = replace(TWO_EXPERTS, rows=3)
        weights = weights_of(case, generator)
        args = (weights.norm, EPS, weights.gate, case.num_experts, case.contrast)
        expected = kernel.route(weights.residual, *args)
        weights.residual[1] = float("nan")
        found = kernel.route(weights.residual, *args)
        for name in ("normed", "experts", "weights", "contrast"):
            assert torch.equal(getattr(found, name)[[0, 2]], getattr(expected, name)[[0, 2]])
        assert bool(((found.experts >= 0) & (found.experts < case.num_experts)).all())


class TestActivate:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_equals_the_reference(self, case, kernel, generator):
        weights = weights_of(case, generator)
        routing = routed(case, weights)
        found = kernel.activate(routing.normed, weights.up, routing, case.num_experts, experts.HALVES[case.activation])
        expected = reference.activate(routing.normed, weights.up, case.num_experts, case.activation)
        assert found.shape == expected.shape
        assert_near(selected(routing, found), selected(routing, expected), TOLERANCE[case.dtype])

    def test_experts_that_no_row_selected_are_not_read(self, generator):
        case = replace(FOUR_EXPERTS, rows=1)
        weights = weights_of(case, generator)
        routing = routed(case, weights)
        expected = reference.activate(routing.normed, weights.up, case.num_experts, case.activation)
        unread = [e for e in range(4) if e not in routing.experts[0].tolist()]
        weights.up.unflatten(0, (2, 4, -1))[:, unread] = float("nan")
        found = triton_kernel.activate(routing.normed, weights.up, routing, case.num_experts, 2)
        assert_near(selected(routing, found), selected(routing, expected), TOLERANCE[case.dtype])
        assert bool(found[0, unread].isnan().all())


class TestProducts:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_equals_the_reference(self, case, kernel, generator):
        weights = weights_of(case, generator)
        routing = routed(case, weights)
        activations = reference.activate(routing.normed, weights.up, case.num_experts, case.activation)
        args = (activations, weights.down, routing, weights.residual)
        expected = reference.combine(*args, case.contrast)
        own = reference.separate(*args)
        args = (unselected_poisoned(activations, routing), *args[1:])
        found = kernel.combine(*args, case.contrast)
        assert_near(found[0], expected[0], TOLERANCE[case.dtype])
        if case.contrast:
            assert_near(found[1], expected[1], TOLERANCE[case.dtype])
        else:
            assert found[1] is None
        assert_near(kernel.separate(*args), own, TOLERANCE[case.dtype])

    @pytest.mark.parametrize("splits", [1, 2, 8], ids="S{}".format)
    def test_any_number_of_splits_gives_the_sum(self, splits, generator, monkeypatch):
        # 8 splits of 72: some have nothing to add
        case = TWO_EXPERTS
        weights = weights_of(case, generator)
        routing = routed(case, weights)
        activations = reference.activate(routing.normed, weights.up, case.num_experts, case.activation)
        monkeypatch.setattr(triton_kernel, "_num_splits", lambda *args: splits)
        args = (activations, weights.down, routing, weights.residual, True)
        found, expected = triton_kernel.combine(*args), reference.combine(*args)
        for ours, theirs in zip(found, expected, strict=True):
            assert_near(ours, theirs, TOLERANCE[case.dtype])

    def test_reference_ignores_unselected_activations(self, generator):
        case = FOUR_EXPERTS
        weights = weights_of(case, generator)
        routing = routed(case, weights)
        activations = reference.activate(routing.normed, weights.up, case.num_experts, case.activation)
        args = (weights.down, routing, weights.residual, True)
        clean = reference.combine(activations, *args)
        poisoned = reference.combine(unselected_poisoned(activations, routing), *args)
        for ours, theirs in zip(poisoned, clean, strict=True):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("case", [TWO_EXPERTS, FOUR_EXPERTS], ids=str)
    @pytest.mark.parametrize("swapped", ["weights", "contrast"])
    def test_swapped_weights_are_seen(self, case, swapped, kernel, generator):
        weights = weights_of(case, generator)
        routing = routed(case, weights)
        activations = reference.activate(routing.normed, weights.up, case.num_experts, case.activation)
        expected = reference.combine(activations, weights.down, routing, weights.residual, True)
        wrong = replace(routing, **{swapped: getattr(routing, swapped).flip(1)})
        found = kernel.combine(activations, weights.down, wrong, weights.residual, True)
        output = 0 if swapped == "weights" else 1
        assert_near(found[1 - output], expected[1 - output], TOLERANCE[case.dtype])
        with pytest.raises(AssertionError):
            assert_near(found[output], expected[output], 1e-2)


class TestSplits:
    @pytest.mark.parametrize(
        ("rows", "hidden", "width", "num_experts", "expected"),
        [
            pytest.param(1, 4096, 4096, 2, 2, id="one-row"),
            pytest.param(64, 4096, 4096, 2, 2, id="64-rows"),
            pytest.param(64, 4096, 4096, 8, 1, id="eight-experts"),
            pytest.param(1, 4096, 4096, 8, 2, id="two-of-eight"),
            pytest.param(512, 4096, 4096, 2, 1, id="512-rows"),
            pytest.param(1, 2048, 2048, 1, 4, id="dense"),
            pytest.param(1, 128, 256, 2, 1, id="too-narrow"),
            pytest.param(0, 4096, 4096, 2, 8, id="no-rows"),
        ],
    )
    def test_fill_the_gpu(self, rows, hidden, width, num_experts, expected):
        block_m = triton_kernel._rows_per_block(rows, torch.bfloat16)
        assert triton_kernel._num_splits(rows, hidden, width, num_experts, block_m) == expected


class TestReference:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_equals_the_definition(self, case, generator):
        case = replace(case, rows=min(case.rows, 12), dtype=torch.float32)
        weights = weights_of(case, generator)
        expected = [torch.stack(outputs).float() for outputs in zip(*definition(case, weights), strict=True)]
        for ours, theirs in zip(mixture_of(case, weights, reference), expected, strict=True):
            assert_near(ours, theirs, 2 * TOLERANCE[torch.float32])


class TestDispatch:
    @pytest.mark.usefixtures("_kernels_on_cpu")
    @pytest.mark.parametrize("case", [TWO_EXPERTS, FOUR_EXPERTS, Case("dense", 3, 1, 64, 40)], ids=str)
    def test_whole_mixture(self, case, generator):
        weights = weights_of(case, generator)
        expected = mixture_of(case, weights, reference)
        for ours, theirs in zip(mixture_of(case, weights, experts), expected, strict=True):
            assert_near(ours, theirs, 2 * TOLERANCE[case.dtype])

    @pytest.mark.usefixtures("_kernels_on_cpu")
    def test_no_rows(self, generator):
        case = replace(TWO_EXPERTS, rows=0)
        mixture, contrastive, own = mixture_of(case, weights_of(case, generator), experts)
        assert mixture.shape == contrastive.shape == (0, case.hidden)
        assert own.shape == (0, 2, case.hidden)

    @pytest.mark.usefixtures("_kernels_on_cpu")
    def test_float64_stays_with_the_reference(self, generator):
        case = replace(TWO_EXPERTS, dtype=torch.float64)
        weights = weights_of(case, generator)
        for ours, theirs in zip(mixture_of(case, weights, experts), mixture_of(case, weights, reference), strict=True):
            assert torch.equal(ours, theirs)

    @pytest.mark.usefixtures("_kernels_on_cpu")
    def test_gradients_flow(self, generator):
        case = TWO_EXPERTS
        weights = weights_of(case, generator)
        for tensor in (weights.norm, weights.gate, weights.up, weights.down):
            tensor.requires_grad_()
        mixture, contrastive, own = mixture_of(case, weights, experts)
        (mixture.sum() + contrastive.sum() + own.sum()).backward()
        for tensor in (weights.norm, weights.gate, weights.up, weights.down):
            assert bool(tensor.grad.abs().sum() > 0)


def zero_routing() -> Routing:
    return Routing(torch.zeros(3, 16), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2), torch.zeros(3, 2))


@needs_compiler
class TestCompiled:
    def test_the_wrappers_take_it(self, generator, monkeypatch):
        for name in ("route", "activate", "combine"):
            monkeypatch.setattr(reference, name, None)
        case = replace(TWO_EXPERTS, dtype=torch.bfloat16)
        assert len(mixture_of(case, weights_of(case, generator), experts)) == 3

    @pytest.mark.parametrize("gate", [[NAN, 0.0, 0.0], [0.0, NAN, NAN], [-INF, -INF, -INF], [INF, 0.0, INF]], ids=str)
    def test_logits_that_are_no_numbers(self, gate):
        """As descending sorts have it: NaN first, and of equals the lower index."""
        residual, weight = torch.ones(1, 16), torch.zeros(3, 16)
        weight[:, 0] = torch.tensor(gate)
        args = (residual, torch.ones(16), EPS, weight, 3, False)
        found, wanted = Compiled.route(*args), reference.route(*args)
        assert found.experts.tolist() == wanted.experts.tolist()
        assert found.weights.isnan().any() == wanted.weights.isnan().any()

    @pytest.mark.parametrize("expert", [-1, 2])
    def test_experts_that_are_not_there(self, expert, generator):
        weights = weights_of(TWO_EXPERTS, generator)
        routing = routed(TWO_EXPERTS, weights)
        routing.experts[3, 1] = expert
        activations = torch.zeros(10, 2, 72)
        with pytest.raises(IndexError, match=r"outside \[0, 2\)"):
            experts.combine(activations, weights.down, routing, weights.residual, False)

    def test_tensors_that_lie_otherwise(self, generator):
        weights = weights_of(FOUR_EXPERTS, generator)
        routing = routed(FOUR_EXPERTS, weights)
        wide = torch.full((12, 200), NAN)
        wide[:, 50:146] = weights.residual
        args = (weights.norm, EPS, weights.gate, 4, True)
        assert torch.equal(
            Compiled.route(wide[:, 50:146], *args).normed, Compiled.route(weights.residual, *args).normed
        )
        columns = replace(routing, experts=routing.experts.T.contiguous().T, weights=routing.weights.T.contiguous().T)
        activations = torch.randn(12, 4, 72, generator=generator)
        args = (weights.down, routing, weights.residual, True)
        apart = activations.transpose(0, 1).contiguous().transpose(0, 1)
        for found, wanted in zip(
            Compiled.combine(apart, weights.down, columns, weights.residual, True),
            Compiled.combine(activations, *args),
            strict=True,
        ):
            assert torch.equal(found, wanted)

    def test_gates_of_any_size_do_not_overflow(self):
        """silu of what the exponential cannot hold."""
        hidden = torch.tensor([[-200.0, -88.5, -1.0, 0.0, 88.5, 1e4, 1.0, 2.0] + [1.0] * 8])
        up = torch.eye(16)
        found = compiled.activate(native.library(), hidden, up, 1, "swiglu", None)
        torch.testing.assert_close(found, reference.activate(hidden, up, 1, "swiglu"), rtol=1e-5, atol=1e-30)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param({"residual": torch.zeros(16)}, "residual must have 2 dimensions", id="no-rows"),
            pytest.param({"residual": torch.zeros(3, 16).int()}, "residual must be float32", id="dtype"),
            pytest.param({"norm_weight": torch.zeros(8)}, r"norm_weight must have shape \[16\]", id="norm"),
            pytest.param({"gate": torch.zeros(2, 16)}, r"gate must have shape \[4, 16\], got \[2, 16\]", id="gate"),
            pytest.param({"gate": torch.zeros(4, 16).half()}, "gate must be torch.float32", id="gate-dtype"),
            pytest.param({"gate": torch.zeros(16, 4).T}, "gate must be contiguous", id="gate-strides"),
            pytest.param({"gate": None}, "without a gate", id="no-gate"),
            pytest.param({"num_experts": 1, "gate": torch.zeros(3, 16)}, "must be at least 2", id="one-expert"),
        ],
    )
    def test_route(self, change, message):
        arguments = {
            "residual": torch.zeros(3, 16),
            "norm_weight": torch.ones(16),
            "eps": EPS,
            "gate": torch.zeros(4, 16),
            "num_experts": 2,
            "contrast": True,
        }
        with pytest.raises(ValueError, match=message):
            experts.route(**(arguments | change))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param({"activation": "relu"}, "activation must be one of swiglu, gelu, got 'relu'", id="activation"),
            pytest.param({"up": torch.zeros(30, 16)}, "multiple of 4 rows", id="rows"),
            pytest.param({"up": torch.zeros(32, 8)}, r"up must have shape \[32, 16\]", id="hidden"),
            pytest.param({"normed": torch.zeros(2, 16)}, r"experts of shape \[2, 2\]", id="routing"),
        ],
    )
    def test_activate(self, change, message):
        arguments = {
            "normed": torch.zeros(3, 16),
            "up": torch.zeros(32, 16),
            "routing": zero_routing(),
            "num_experts": 2,
            "activation": "swiglu",
        }
        with pytest.raises(ValueError, match=message):
            experts.activate(**(arguments | change))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param({"activations": torch.zeros(3, 16)}, "activations must have 3 dimensions", id="activations"),
            pytest.param({"down": torch.zeros(16, 8)}, r"down must have shape \[16, 16\]", id="down"),
            pytest.param({"residual": torch.zeros(3, 8)}, r"residual must be .* of shape \[3, 16\]", id="residual"),
            pytest.param({"routing": replace(zero_routing(), contrast=None)}, "no contrast weights", id="no-contrast"),
        ],
    )
    def test_products(self, change, message):
        arguments = {
            "activations": torch.zeros(3, 2, 8),
            "down": torch.zeros(16, 16),
            "routing": zero_routing(),
            "residual": torch.zeros(3, 16),
        } | change
        with pytest.raises(ValueError, match=message):
            experts.combine(**arguments, contrast=True)
        if "routing" not in change:
            with pytest.raises(ValueError, match=message):
                experts.separate(**arguments)


def far_apart(logits: Tensor, margin: float, places: int) -> Tensor:
    """``[T, E] -> [T]``: whether the first ``places`` logits in order differ from the next by more than a margin."""
    ordered = logits.sort(dim=1, descending=True).values
    gaps = ordered[:, :-1] - ordered[:, 1:]
    return (gaps[:, :places] > margin).all(dim=1)


def unselected_poisoned(activations: Tensor, routing: Routing) -> Tensor:
    """NaN wherever a row did not select an expert."""
    chosen = torch.zeros(activations.shape[:2], dtype=torch.bool).scatter(1, routing.experts, True)
    return activations.masked_fill(~chosen.unsqueeze(2), float("nan"))


def definition(case: Case, weights: Weights) -> list[list[Tensor]]:
    """Per row the mixture, the contrastive feature where there is one, and ``[K, C]`` the experts' own, in float64."""
    num_experts, rows = case.num_experts, []
    halves = weights.up.double().unflatten(0, (-1, num_experts, case.width))
    down = weights.down.double().unflatten(1, (num_experts, case.width))
    for residual in weights.residual.double():
        normed = residual / (residual.square().mean() + EPS).sqrt() * weights.norm.double()
        logits = torch.zeros(1).double() if weights.gate is None else weights.gate.double() @ normed
        order = sorted(range(num_experts), key=lambda e: -float(logits[e]))[:2]
        own = []
        for e in order:
            hidden = [half[e] @ normed for half in halves]
            own.append(down[:, e] @ (F.silu(hidden[0]) * hidden[1] if len(hidden) == 2 else F.gelu(hidden[0])))
        mixture = sum(w * f for w, f in zip(logits[order].softmax(0), own, strict=True))
        outputs = [residual + mixture]
        if case.contrast:
            c = logits[num_experts:].softmax(0)
            of_c = sorted(order) if num_experts == 2 else order  # the expert that each c belongs to
            larger, smaller = (0, 1) if c[0] > c[1] else (1, 0)
            signed = c[larger] * own[order.index(of_c[larger])] - c[smaller] * own[order.index(of_c[smaller])]
            outputs.append(residual + signed)
        rows.append([*outputs, residual + torch.stack(own)])
    return rows


def mixture_of(case: Case, weights: Weights, op) -> list[Tensor]:
    """Mixture, contrastive feature where there is one, and the experts' own, through ``op``'s four functions."""
    routing = op.route(weights.residual, weights.norm, EPS, weights.gate, case.num_experts, case.contrast)
    if op is reference:
        activations = op.activate(routing.normed, weights.up, case.num_experts, case.activation)
    else:
        activations = op.activate(routing.normed, weights.up, routing, case.num_experts, case.activation)
    args = (activations, weights.down, routing, weights.residual)
    return [x for x in (*op.combine(*args, case.contrast), op.separate(*args)) if x is not None]
