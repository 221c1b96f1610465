"""Every position's drafting steps in one forward are what each round alone would compute."""

from __future__ import annotations

import pytest
import torch
from tiny_training import random_shard, tiny_target

from jakiro_vllm.draft.head import DraftHead, Variant
from jakiro_vllm.training.features import StreamedFeatures, place_features
from jakiro_vllm.training.frozen import head_spec
from jakiro_vllm.training.packing import pack_rows
from jakiro_vllm.training.rollout import rollout
from jakiro_vllm.training.settings import HeadSettings

#: Two orders of the same fp32 sums.
FP32 = {"rtol": 1e-4, "atol": 1e-5}


@torch.no_grad()
@pytest.mark.parametrize("variant", list(Variant), ids=lambda v: v.value)
def test_rollout_equals_drafting_one_round(variant: Variant) -> None:
    """Each round alone: the target's keys up to its start, then the head on its own features."""
    target, shard = tiny_target(), random_shard()
    torch.manual_seed(0)
    head = DraftHead(head_spec(target.config, HeadSettings(variant=variant))).eval()
    head.prepare_positions(64)
    rows = pack_rows(shard, 48)
    batch = rows.batch(range(len(rows)))
    row, document, start, length = next(
        (row, place.document, place.start, place.length)
        for row, places in enumerate(batch.places)
        for place in places
        if place.start > 0 and place.length >= 12
    )
    features = place_features(batch, StreamedFeatures(target, shard), torch.device("cpu"))
    embeds = target.embed(batch.tokens)
    steps = [o.feature() for o in rollout(head, embeds, features, batch.segments, batch.positions, 4)]

    own_embeds, own_features = embeds[row, start : start + length], features[row, start : start + length]
    assert torch.equal(own_embeds, target.embed(torch.from_numpy(shard.document(document)[:length].astype("int64"))))
    for base in (0, 2, length - 6):
        x = head.fuse(own_embeds[1 : base + 2], own_features[: base + 1])
        positions = torch.arange(base + 1)
        keys, values = head.keys_values(x, positions)
        newest, position = x[-1:], positions[-1:]
        for k in range(4):

            def attend(query: torch.Tensor, keys: torch.Tensor = keys, values: torch.Tensor = values) -> torch.Tensor:
                key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (keys, values))
                probs = (torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5).softmax(-1)
                return torch.einsum("hqk,khd->qhd", probs, value)

            drafted = head.finish(newest, position, attend).feature()
            torch.testing.assert_close(steps[k][row, start + base + k], drafted[0], **FP32)
            position = position + 1
            newest = head.fuse(own_embeds[base + k + 2][None], drafted)
            key, value = head.keys_values(newest, position)
            keys, values = torch.cat([keys, key]), torch.cat([values, value])
