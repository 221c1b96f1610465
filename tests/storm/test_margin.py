"""Margins between two tokens: noise that follows from the seed, penalties, and the edges of top-k and top-p."""

from __future__ import annotations

import math

import pytest
import torch

from jakiro_vllm.storm.cases import COMPLETIONS, Case
from jakiro_vllm.storm.margin import edge_distance, noise_lead, penalized, score_lead

VOCAB = 64


@pytest.mark.parametrize("draws", [0, 1, 5])
@pytest.mark.parametrize(("a", "b"), [(3, 40), (40, 3), (0, 63)])
def test_the_noise_is_the_samplers(draws: int, a: int, b: int) -> None:
    """A hair more or less than the lead of the noise decides which token vLLM's operator takes."""
    lead = noise_lead(11, draws, a, b, VOCAB)
    generator = torch.Generator().manual_seed(11)
    for _ in range(draws + 1):
        seed = torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
    for more, winner in ((1e-4, a), (-1e-4, b)):
        row = torch.full((1, VOCAB), -torch.inf)
        row[0, a], row[0, b] = more - lead, 0.0
        assert int(torch.ops._C.fused_gumbel_argmax(row, seed)) == winner
    assert noise_lead(11, draws, b, a, VOCAB) == pytest.approx(-lead, abs=1e-4)
    assert noise_lead(12, draws, a, b, VOCAB) != pytest.approx(lead, abs=1e-3)


def test_samples_of_one_request_have_seeds_of_their_own() -> None:
    case = Case(0, "seeded", COMPLETIONS, {"temperature": 1.0, "seed": 5, "n": 3})
    logits = torch.zeros(VOCAB)
    assert [score_lead(case, i, logits, 2, 7, 9) for i in range(4)] == [
        noise_lead(5 + i % 3, 2, 7, 9, VOCAB) for i in range(4)
    ]


def test_penalties() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5, 0.0])
    fields = {"repetition_penalty": 2.0, "frequency_penalty": 0.1, "presence_penalty": 0.3}
    found = penalized(logits, fields, [0, 1], [2, 2])
    assert found.tolist() == pytest.approx([1.0, -4.0, 0.5 - 0.2 - 0.3, 0.5, 0.0])
    assert penalized(logits, {"allowed_token_ids": [1, 3]}, [0], []).isfinite().tolist() == [
        False,
        True,
        False,
        True,
        False,
    ]
    assert penalized(logits, {}, [0], [1]).equal(logits)


def test_edges() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert edge_distance(logits, 0, {}) == math.inf
    # The second of two that are kept, and the first that is not: each lies a ratio of 2 from the other.
    for token in (1, 2):
        assert edge_distance(logits, token, {"top_k": 2}) == pytest.approx(math.log(2), abs=1e-5)
    assert edge_distance(logits, 3, {"top_k": 4}) == math.inf
    # A token is kept while those before it have less than p.
    assert edge_distance(logits, 2, {"top_p": 0.8}) == pytest.approx(0.0, abs=1e-6)
    assert edge_distance(logits, 2, {"top_p": 0.7}) == pytest.approx(0.1, abs=1e-6)
    assert edge_distance(logits, 3, {"top_p": 0.7}) == pytest.approx(0.25, abs=1e-6)
