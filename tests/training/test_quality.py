"""Quality of heads on tiny random targets, against naive loops."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from tiny_training import VOCAB, greedy_shard, tiny_target

from jakiro_vllm.draft.head import DraftHead, Variant
from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.training import quality as quality_module
from jakiro_vllm.training.documents import Shard, pack_documents
from jakiro_vllm.training.features import StreamedFeatures
from jakiro_vllm.training.frozen import Target, head_spec
from jakiro_vllm.training.quality import Quality, _walk, evaluate_head
from jakiro_vllm.training.rollout import rollout
from jakiro_vllm.training.settings import EvaluationSettings, HeadSettings

#: Averages of a few hundred figures, in two orders.
AVERAGE = {"rel": 1e-5}


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(scope="module")
def shard(target: Target) -> Shard:
    return greedy_shard(target, 4, 12)


def make_head(target: Target, variant: Variant = Variant.JAKIRO, num_experts: int = 2) -> DraftHead:
    torch.manual_seed(1)
    head = DraftHead(head_spec(target.config, HeadSettings(variant=variant, num_experts=num_experts)))
    head.prepare_positions(128)
    return head


def measure(target: Target, head: DraftHead, shard: Shard, **settings: int) -> Quality:
    return evaluate_head(target, head, shard, StreamedFeatures(target, shard), EvaluationSettings(**settings))


@pytest.mark.parametrize("variant", list(Variant), ids=lambda v: v.value)
def test_counts_what_decoding_would_emit(target: Target, shard: Shard, variant: Variant) -> None:
    quality = measure(target, make_head(target, variant), shard, depth=3, width=VOCAB)
    # Every token is among all: only the end of the text cuts a round of three drafts and a bonus token.
    rounds = sum(-(-(len(shard.document(i)) - 5) // 4) for i in range(len(shard)))
    emitted = sum(len(shard.document(i)) - 5 for i in range(len(shard)))
    assert quality.top_k == (1.0, 1.0, 1.0)
    assert quality.positions == emitted
    assert quality.acceptance_length_top_k == pytest.approx(emitted / rounds)
    assert 1.0 <= quality.acceptance_length <= quality.acceptance_length_top_k
    assert (quality.right_top1 is None) is (variant is not Variant.JAKIRO)
    assert (quality.experts is None) is (variant is Variant.DENSE)
    assert json.loads(json.dumps(dataclasses.asdict(quality)))["width"] == VOCAB
    assert str(quality).startswith("acceptance length")


@torch.no_grad()
@pytest.mark.parametrize("num_experts", [2, 3])
def test_figures_equal_plain_loops(
    target: Target, shard: Shard, num_experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One document after the other, one position after the other."""
    monkeypatch.setattr(quality_module, "_LOGIT_ELEMENTS", 7 * VOCAB)
    head, width, depth = make_head(target, num_experts=num_experts), 3, 3
    found = measure(target, head, shard, depth=depth, width=width)
    hits: dict[tuple[str, int], list[bool]] = {(kind, d): [] for kind in ("1", "k") for d in range(depth)}
    right: list[bool] = []
    weights, first, entropy, same, overlap = [], [], [], [], []
    for i in range(len(shard)):
        document = shard.document(i).astype(np.int64)
        tokens = torch.from_numpy(document)[None]
        features = target.features([document])[0][None]
        segments, positions = torch.ones_like(tokens), torch.arange(len(document))[None]
        steps = list(rollout(head, target.embed(tokens), features, segments, positions, depth - 1))
        prompt = int(shard.prompt_lengths[i])
        for base in range(prompt - 1, len(document) - 2):
            for d in range(depth):
                if base + 2 + d >= len(document):
                    continue
                last = d == depth - 1
                own = steps[d - 1].contrast()[0, base + d - 1] if last else steps[d].feature()[0, base + d]
                best = target.logits(own).topk(width).indices.tolist()
                hits["1", d].append(best[0] == document[base + 2 + d])
                hits["k", d].append(document[base + 2 + d] in best)
            if base + 3 < len(document):
                best = target.logits(steps[0].contrast()[0, base]).topk(width).indices.tolist()
                right.append(best[0] == document[base + 3])
            own_features, log_weights = steps[0].expert_features()
            row = dict(zip(steps[0].routing.experts[base].tolist(), log_weights[0, base].exp().tolist(), strict=True))
            weights.append([row.get(e, 0.0) for e in range(num_experts)])
            first.append([float(e == max(row, key=lambda e: row[e])) for e in range(num_experts)])
            entropy.append(-sum(w * math.log(w) for w in row.values()))
            tops = [target.logits(own_features[0, base, k]).topk(width).indices.tolist() for k in range(2)]
            same.append(tops[0][0] == tops[1][0])
            overlap.append(len(set(tops[0]) & set(tops[1])) / len(set(tops[0]) | set(tops[1])))
    for kind, values in (("1", found.top1), ("k", found.top_k)):
        assert values == pytest.approx([np.mean(hits[kind, d]) for d in range(depth)], **AVERAGE)
    assert found.right_top1 == pytest.approx(np.mean(right), **AVERAGE)
    assert found.experts is not None
    assert found.experts.mean_weight == pytest.approx(np.mean(weights, axis=0), **AVERAGE)
    assert found.experts.first_share == pytest.approx(np.mean(first, axis=0), **AVERAGE)
    assert found.experts.entropy == pytest.approx(np.mean(entropy), **AVERAGE)
    assert found.experts.same_top1 == pytest.approx(np.mean(same), **AVERAGE)
    assert found.experts.overlap_top_k == pytest.approx(np.mean(overlap), **AVERAGE)
    assert 0 < found.experts.overlap_top_k < 1


def test_experts_that_are_one_agree(target: Target, shard: Shard) -> None:
    head = make_head(target, Variant.JAKIRO_STAR)
    for weight, dim in ((head.experts.up.weight, 0), (head.experts.down.weight, 1)):
        half = weight.shape[dim] // 2
        weight.data.narrow(dim, half, half).copy_(weight.data.narrow(dim, 0, half))
    experts = measure(target, head, shard, depth=2, width=4).experts
    assert experts is not None
    assert (experts.same_top1, experts.overlap_top_k) == (1.0, 1.0)


def test_only_so_many_documents(target: Target, shard: Shard) -> None:
    head = make_head(target)
    assert measure(target, head, shard, prompts=1).positions == len(shard.document(0)) - 5
    few = pack_documents([shard.document(0)[:4]], [[3]])
    with pytest.raises(JakiroConfigError, match="two tokens to judge by"):
        measure(target, head, few)


@pytest.mark.parametrize(
    ("hits", "expected"),
    [([[0, 0, 0], [1, 1, 1]], (3, 3)), ([[1, 1, 1], [0, 1, 1]], (2, 3)), ([[1, 1, 1], [1, 1, 1]], (1, 3))],
    ids=["nothing accepted", "one, then cut", "all"],
)
def test_walk(hits: list[list[int]], expected: tuple[int, int]) -> None:
    assert _walk(np.asarray(hits, dtype=bool)) == expected
