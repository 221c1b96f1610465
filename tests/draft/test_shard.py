"""A head's parts on several ranks: together they compute what the whole head computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from jakiro_vllm.draft.head import DraftHead, HeadSpec
from jakiro_vllm.draft.shard import check_shards, shard_head
from jakiro_vllm.errors import HeadCheckpointError

#: fp32 sums of a few dozen terms, taken in parts.
FP32 = {"rtol": 1e-4, "atol": 1e-5}
LENGTH = 11
POSITIONS = torch.arange(5, 5 + LENGTH)

#: query heads, KV heads, ranks
SIZES = [(4, 2, 2), (4, 4, 2), (6, 3, 3), (4, 2, 4), (8, 2, 8), (4, 1, 2), (4, 2, 1)]


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``[S, H, D], [S, G, D], [S, G, D] -> [S, H, D]``."""
    return torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), is_causal=True, enable_gqa=True
    ).transpose(0, 1)


class Ranks:
    """Ranks that run one after the other: first each says what it adds to the sum, then each gets the sum."""

    def __init__(self, head: DraftHead, size: int) -> None:
        self.terms: list[Tensor] = []
        self.complete = False
        self.heads = [shard_head(head, rank, size, self.sum) for rank in range(size)]

    def sum(self, term: Tensor) -> Tensor:
        if not self.complete:
            self.terms.append(term)
        return torch.stack(self.terms).sum(0) if self.complete else term

    def run(self, *inputs: Tensor) -> list[Any]:
        for head in self.heads:
            head(*inputs, causal)
        self.complete = True
        return [head(*inputs, causal) for head in self.heads]


@pytest.fixture
def make_head(tiny_spec: Callable[..., HeadSpec]) -> Callable[..., DraftHead]:
    def make(variant: str, heads: int, kv_heads: int) -> DraftHead:
        torch.manual_seed(0)
        head = DraftHead(replace(tiny_spec(variant), num_heads=heads, num_kv_heads=kv_heads)).requires_grad_(False)
        head.prepare_positions(32)
        return head

    return make


@pytest.mark.parametrize("variant", ["jakiro", "jakiro_star", "dense"])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SIZES)
def test_ranks_compute_what_the_whole_head_does(
    variant: str, heads: int, kv_heads: int, size: int, make_head: Callable[..., DraftHead], generator: torch.Generator
) -> None:
    head = make_head(variant, heads, kv_heads)
    inputs = (*(torch.randn(LENGTH, 16, generator=generator) for _ in range(2)), POSITIONS)
    expected = head(*inputs, causal)
    found = Ranks(head, size).run(*inputs)
    for output in found:
        torch.testing.assert_close(output.feature(), expected.feature(), **FP32)
        if head.spec.has_contrast:
            torch.testing.assert_close(output.contrast(), expected.contrast(), **FP32)
        assert torch.equal(output.feature(), found[0].feature())


def test_without_the_sum_the_result_is_another(make_head: Callable[..., DraftHead], generator: torch.Generator) -> None:
    """The negative control of the test above."""
    head = make_head("jakiro", 4, 2)
    inputs = (*(torch.randn(LENGTH, 16, generator=generator) for _ in range(2)), POSITIONS)
    alone = shard_head(head, 0, 2, lambda term: term)(*inputs, causal).feature()
    assert (alone - head(*inputs, causal).feature()).abs().max() > 100 * FP32["atol"]


@pytest.mark.parametrize(("heads", "kv_heads", "size"), SIZES)
def test_ranks_hold_the_pages_of_their_kv_heads(
    heads: int, kv_heads: int, size: int, make_head: Callable[..., DraftHead], generator: torch.Generator
) -> None:
    """As vLLM shares out the target's: in order, and neighbours share a head where there are too few."""
    head = make_head("jakiro", heads, kv_heads)
    x = torch.randn(LENGTH, 16, generator=generator)
    whole = head.keys_values(x, POSITIONS)
    each = max(1, kv_heads // size)
    for rank in range(size):
        part = shard_head(head, rank, size, lambda term: term)
        assert part.spec == replace(head.spec, num_heads=heads // size, num_kv_heads=each)
        first = rank // (size // kv_heads) if size > kv_heads else rank * each
        for mine, all_heads in zip(part.keys_values(x, POSITIONS), whole, strict=True):
            torch.testing.assert_close(mine, all_heads[:, first : first + each], **FP32)


def test_a_part_keeps_nothing_of_the_rest(make_head: Callable[..., DraftHead]) -> None:
    """Slices that are views would hold on to the whole matrices."""
    part = shard_head(make_head("jakiro", 4, 2), 1, 2, lambda term: term)
    for layer in (part.q_proj, part.kv_proj, part.o_proj):
        assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes
    assert not any(p.is_meta or p.requires_grad for p in part.parameters())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "message"),
    [
        (4, 2, 3, r"has 4 attention heads, which 3 .* cannot share out evenly; use --tensor-parallel-size 2"),
        (4, 2, 8, r"has 4 attention heads, which 8 .* use --tensor-parallel-size 4"),
        (6, 2, 3, r"has 2 KV heads, which 3 .* use --tensor-parallel-size 2"),
        (5, 5, 2, r"has 5 attention heads, which 2 .* use --tensor-parallel-size 1"),
    ],
)
def test_heads_that_cannot_be_shared_out(
    heads: int, kv_heads: int, size: int, message: str, tiny_spec: Callable[..., HeadSpec]
) -> None:
    with pytest.raises(HeadCheckpointError, match=message):
        check_shards(replace(tiny_spec(), num_heads=heads, num_kv_heads=kv_heads), "some/head", size)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), SIZES)
def test_heads_that_can(heads: int, kv_heads: int, size: int, tiny_spec: Callable[..., HeadSpec]) -> None:
    check_shards(replace(tiny_spec(), num_heads=heads, num_kv_heads=kv_heads), "some/head", size)
