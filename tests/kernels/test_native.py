"""The compiled kernels together: what other machines compile, and who gets to run them."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import pytest
import torch

from jakiro_vllm.kernels import experts, native, rotary, walk
from jakiro_vllm.kernels.dispatch import compiled
from jakiro_vllm.kernels.top_tokens import native as top_tokens
from jakiro_vllm.kernels.top_tokens import reference as top_tokens_reference

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
pytestmark = pytest.mark.skipif(native.compiler() is None, reason="there is no C++ compiler")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
@pytest.mark.parametrize("machine", ["x86-64", "x86-64-v3"])
def test_older_instruction_sets(
    machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """Narrower vectors, conversions without an instruction; sizes that no vector divides."""
    if machine == "x86-64-v3" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("needs AVX2")
    flags = tuple(f"-march={machine}" if flag.startswith("-march") else flag for flag in native.FLAGS)
    compiler = native.compiler()
    assert compiler is not None
    monkeypatch.setattr(native, "FLAGS", flags)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = ctypes.CDLL(str(native.build(compiler)))
    for dtype, tolerance in TOLERANCES.items():

        def draw(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(of)

        logits = draw(3, 333)
        tokens, log_probs = top_tokens.top_tokens(library, logits, 5)
        wanted_tokens, wanted = top_tokens_reference.top_tokens_reference(logits, 5)
        assert torch.equal(logits.gather(1, tokens), logits.gather(1, wanted_tokens))
        torch.testing.assert_close(log_probs, wanted, rtol=0, atol=1e-5)

        one = torch.zeros(3, 1, dtype=torch.int64)
        _, emitted, _ = walk.native.walk_greedy(library, one, one - 1, one[:, 0] + 1, logits, torch.arange(3), 0)
        assert torch.equal(emitted[:, 0], logits.argmax(dim=1))

        residual, norm, gate = draw(5, 67), draw(67), draw(5, 67)
        routing = experts.native.route(library, residual, norm, 1e-5, gate, 3, True)
        expected = experts.reference.route(residual, norm, 1e-5, gate, 3, True)
        torch.testing.assert_close(routing.normed.float(), expected.normed.float(), rtol=tolerance, atol=tolerance)
        up, down = draw(2 * 3 * 21, 67) / 8, draw(67, 3 * 21) / 8
        found = experts.native.activate(library, expected.normed, up, 3, "swiglu", None)
        activations = experts.reference.activate(expected.normed, up, 3, "swiglu")
        torch.testing.assert_close(found.float(), activations.float(), rtol=4 * tolerance, atol=4 * tolerance)
        for ours, theirs in zip(
            experts.native.combine(library, activations, down, expected, residual, True, None),
            experts.reference.combine(activations, down, expected, residual, True),
            strict=True,
        ):
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=4 * tolerance, atol=4 * tolerance)

        x, positions, table = draw(4, 2, 22), torch.arange(4), draw(4, 22, of=torch.float32)
        torch.testing.assert_close(
            rotary.native.rotate(library, x, positions, table).float(),
            rotary.reference.rotate_reference(x, positions, table).float(),
            rtol=tolerance,
            atol=tolerance,
        )


def test_who_runs_them() -> None:
    x = torch.zeros(2)
    assert compiled(x) is native.library() is not None
    assert compiled(x.bfloat16()) is not None
    assert compiled(x.long()) is not None
    assert compiled(x.double()) is None
    assert compiled(x.to("meta")) is None
    wanting = torch.zeros(2, requires_grad=True)
    assert compiled(wanting) is None
    assert compiled(x, None, wanting) is None
    with torch.no_grad():
        assert compiled(x, wanting) is not None


def test_without_a_library_nobody_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    assert compiled(torch.zeros(2)) is None
