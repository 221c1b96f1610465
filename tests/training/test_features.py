"""Features of tiny random targets of several architectures, their cache, and rows of documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tiny_training import HIDDEN, VOCAB, WINDOW, random_shard, tiny_config, tiny_parts, tiny_target
from transformers import Gemma3Config, GPT2Config, PretrainedConfig, T5Config

from jakiro_vllm.draft.head import Variant
from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.training import features as features_module
from jakiro_vllm.training.documents import Shard, join_shards, save_shard
from jakiro_vllm.training.features import (
    StreamedFeatures,
    cache_bytes,
    cache_features,
    choose_features,
    place_features,
)
from jakiro_vllm.training.frozen import Target, head_spec
from jakiro_vllm.training.packing import Plan, pack_rows
from jakiro_vllm.training.settings import FeatureSettings, HeadSettings

KINDS = ["llama", "qwen2", "mistral", "gemma2", "cohere", "granite", "gpt2"]
#: Two orders of the same fp32 sums.
FP32 = {"rtol": 1e-4, "atol": 1e-5}
#: The cache keeps 8 bits of mantissa.
BF16 = {"rtol": 2**-8, "atol": 1e-6}


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(scope="module")
def parts() -> list[Shard]:
    return tiny_parts()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_are_those_of_the_document_alone(kind: str) -> None:
    target = tiny_target(kind)
    documents = [np.arange(1, 1 + n, dtype=np.uint32) * 5 % VOCAB for n in (9, 1, 23, 2, 17, 9)]
    found = target.features(documents, batch_tokens=40)
    for document, features in zip(documents, found, strict=True):
        tokens = torch.from_numpy(document.astype(np.int64))[None]
        alone = target.model(tokens, output_hidden_states=True)
        torch.testing.assert_close(features, target.model.get_decoder()(tokens).last_hidden_state[0], **FP32)
        torch.testing.assert_close(target.logits(features), alone.logits[0], **FP32)


@torch.no_grad()
def test_a_sliding_window_is_seen() -> None:
    """Negative control: a token beyond the windows of both layers must not matter, one within must."""
    target = tiny_target("mistral")
    document = np.arange(1, 1 + 3 * WINDOW, dtype=np.uint32)
    far, near = document.copy(), document.copy()
    far[0], near[-2] = 40, 40
    own, far_own, near_own = (f[-1] for f in target.features([document, far, near]))
    torch.testing.assert_close(own, far_own, **FP32)
    assert (own - near_own).abs().max() > 1e-2


@torch.no_grad()
def test_logits_are_capped_and_embeddings_are_raw() -> None:
    target = tiny_target("gemma2")
    features = target.features([np.arange(8)])[0]
    plain = features @ target.model.lm_head.weight.T
    assert plain.abs().max() > 1.5 > target.logits(features).abs().max()
    tokens = torch.arange(5)
    assert torch.equal(target.embed(tokens), target.model.get_input_embeddings().weight[:5])
    assert not torch.allclose(target.embed(tokens), target.model.get_input_embeddings()(tokens))


def test_load_and_fingerprint(tmp_path: Path) -> None:
    original = tiny_target("qwen2")
    original.model.save_pretrained(tmp_path / "a")
    loaded = Target.load(str(tmp_path / "a"))
    assert loaded.fingerprint == original.fingerprint
    assert loaded.hidden_size == HIDDEN
    assert loaded.vocab_size == VOCAB
    assert tiny_target("qwen2", seed=1).fingerprint != original.fingerprint
    assert Target.load(str(tmp_path / "a"), dtype=torch.bfloat16).fingerprint != original.fingerprint


def test_what_is_no_target_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(JakiroConfigError, match=r"target '/no/such' cannot be loaded"):
        Target.load("/no/such")
    T5Config(num_layers=1, d_model=8).save_pretrained(tmp_path / "t5")
    with pytest.raises(JakiroConfigError, match="cannot give features: it is an encoder and a decoder"):
        Target.load(str(tmp_path / "t5"))
    Gemma3Config().save_pretrained(tmp_path / "vision")
    with pytest.raises(JakiroConfigError, match="it is multimodal"):
        Target.load(str(tmp_path / "vision"))


def test_a_target_with_another_way_to_its_logits_is_refused() -> None:
    model = tiny_target().model
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = forward
    with pytest.raises(JakiroConfigError, match="cannot give features: its LM head on its last hidden states"):
        Target(model, "odd")
    model = tiny_target().model
    model.get_output_embeddings = lambda: None  # type: ignore[method-assign]
    with pytest.raises(JakiroConfigError, match="no LM head"):
        Target(model, "odd")


@pytest.mark.parametrize("kind", KINDS)
def test_head_spec_has_the_targets_sizes(kind: str) -> None:
    config = tiny_config(kind)
    spec = head_spec(config, HeadSettings(variant=Variant.JAKIRO, num_experts=3, intermediate_size=12))
    assert (spec.hidden_size, spec.num_heads, spec.head_dim, spec.num_experts) == (HIDDEN, 4, 8, 3)
    assert spec.num_kv_heads == (4 if kind == "gpt2" else 2)
    assert spec.intermediate_size == 12
    assert spec.rms_norm_eps == getattr(config, "rms_norm_eps", 1e-5)
    dense = head_spec(config, HeadSettings(variant=Variant.DENSE))
    assert (dense.num_experts, dense.intermediate_size) == (1, HIDDEN)


ROPES: list[tuple[str, Any, dict[str, Any]]] = [
    ("none", None, {"rope_type": "default", "rope_theta": 10000.0}),
    (
        "static",
        {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
    ),
    (
        "partial",
        {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        {"rope_type": "default", "rope_theta": 1e6},
    ),
    (
        "by length",
        {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0},
        {"rope_type": "default", "rope_theta": 1e6},
    ),
    (
        "by layer",
        {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
        {"rope_type": "default", "rope_theta": 1e6},
    ),
]


@pytest.mark.parametrize(("given", "expected"), [r[1:] for r in ROPES], ids=[r[0] for r in ROPES])
def test_head_spec_has_a_rotary_embedding_of_its_own(given: Any, expected: dict[str, Any]) -> None:
    config = tiny_config("llama")
    config.rope_parameters = given
    rope = head_spec(config, HeadSettings()).rope.rope_parameters
    assert {key: rope[key] for key in expected} == expected
    assert rope.get("partial_rotary_factor", 1.0) == 1.0


def test_head_spec_refuses_what_no_head_can_be(target: Target) -> None:
    class Latent(PretrainedConfig):
        kv_lora_rank = 16

    with pytest.raises(JakiroConfigError, match="latent"):
        head_spec(Latent(), HeadSettings())
    with pytest.raises(JakiroConfigError, match="heads of size 5"):
        head_spec(GPT2Config(n_embd=20, n_head=4), HeadSettings())


def test_cache_holds_the_features(target: Target, parts: list[Shard], tmp_path: Path) -> None:
    save_shard(parts[1], tmp_path / "answers.npz")
    cache = cache_features(target, [parts[0], tmp_path / "answers.npz", parts[2]], tmp_path / "features", 64)
    joined = join_shards(parts)
    documents = [14, 0, 4, 5, 9, 10, 7]
    streamed = StreamedFeatures(target, joined, longest=12).of(documents)
    for index, cached, own in zip(documents, cache.of(documents), streamed, strict=True):
        assert len(cached) == len(joined.document(index))
        assert len(own) == min(12, len(cached))
        torch.testing.assert_close(cached[:12].float(), own, **BF16)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "features").iterdir())
    assert 0 <= on_disk - cache_bytes(len(joined.tokens), HIDDEN) < 3 * 1024
    assert sorted(p.suffix for p in (tmp_path / "features").iterdir()) == [".safetensors"] * 3


def test_cache_resumes_at_the_missing_part(
    target: Target, parts: list[Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replacing = features_module.os.replace

    def fail_at_second(source: Path, goal: Path) -> None:
        if goal.name == "part-00001.safetensors":
            raise KeyboardInterrupt
        replacing(source, goal)

    monkeypatch.setattr(features_module.os, "replace", fail_at_second)
    with pytest.raises(KeyboardInterrupt):
        cache_features(target, parts, tmp_path)
    monkeypatch.undo()
    assert [p.name for p in sorted(tmp_path.glob("*.safetensors"))] == ["part-00000.safetensors"]
    asked: list[int] = []
    computing = Target.features

    def count(self: Target, documents: Sequence[np.ndarray], batch_tokens: int = 8192) -> list[torch.Tensor]:
        asked.append(len(documents))
        return computing(self, documents, batch_tokens)

    monkeypatch.setattr(Target, "features", count)
    resumed = cache_features(target, parts, tmp_path)
    assert sum(asked) == len(parts[1]) + len(parts[2])
    monkeypatch.undo()
    whole = cache_features(target, parts, tmp_path / "whole")
    for a, b in zip(resumed.of(range(15)), whole.of(range(15)), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.glob("*.partial"))


def test_cache_of_something_else_is_refused(target: Target, parts: list[Shard], tmp_path: Path) -> None:
    cache_features(target, parts, tmp_path)
    with pytest.raises(JakiroConfigError, match=r"features of target 'tiny-llama' as it was, not of 'tiny-llama'"):
        cache_features(tiny_target(seed=1), parts, tmp_path)
    with pytest.raises(JakiroConfigError, match="features of other documents"):
        cache_features(target, [parts[0], parts[2], parts[1]], tmp_path)
    moved = replace(parts[0], tokens=np.roll(parts[0].tokens, 1))
    with pytest.raises(JakiroConfigError, match=r"part-00000.* other documents"):
        cache_features(target, [moved, *parts[1:]], tmp_path)
    (tmp_path / "part-00002.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(JakiroConfigError, match=r"part-00002.*is damaged"):
        cache_features(target, parts, tmp_path)


def test_a_cache_that_does_not_fit(
    target: Target, parts: list[Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = FeatureSettings(limit_gib=1e-9)
    assert choose_features(target, parts, tmp_path / "f", small).reads_disk is False
    with pytest.raises(JakiroConfigError, match=r"cannot be cached: .* features.limit_gib is 1e-09; raise"):
        choose_features(target, parts, tmp_path / "f", small.model_copy(update={"source": "cache"}))

    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda _: Usage(1000))
    with pytest.raises(JakiroConfigError, match=r"GiB more, and .* GiB free"):
        choose_features(target, parts, tmp_path / "f", FeatureSettings(source="cache"))
    assert not (tmp_path / "f").exists()
    monkeypatch.undo()
    assert choose_features(target, parts, tmp_path / "f", FeatureSettings()).reads_disk is True
    # What is there already needs no room.
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda _: Usage(0))
    assert choose_features(target, parts, tmp_path / "f", FeatureSettings()).reads_disk is True
    assert choose_features(target, parts, tmp_path / "f", FeatureSettings(source="stream")).reads_disk is False


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
def test_rows_hold_every_document_once(parts: list[Shard], shuffled: bool) -> None:
    shard = join_shards(parts)
    order = np.random.default_rng(3).permutation(len(shard)) if shuffled else None
    rows = pack_rows(shard, 40, order)
    batch = rows.batch(range(len(rows)))
    seen = []
    for b, places in enumerate(batch.places):
        for segment, place in enumerate(places, start=1):
            span = slice(place.start, place.start + place.length)
            assert batch.tokens[b, span].tolist() == shard.document(place.document).tolist()
            assert set(batch.segments[b, span].tolist()) == {segment}
            assert batch.positions[b, span].tolist() == list(range(place.length))
            assert place.prompt == 4
            seen.append(place.document)
    assert sorted(seen) == list(range(len(shard)))
    assert int((batch.segments > 0).sum()) == len(shard.tokens)
    assert torch.equal(batch.segments, rows.segments(range(len(rows))))


def test_long_documents_lose_their_end(parts: list[Shard]) -> None:
    rows = pack_rows(parts[0], 8)
    batch = rows.batch([2])
    assert batch.tokens[0].tolist() == parts[0].document(2)[:8].tolist()
    assert batch.places[0][0].length == 8


def test_features_lie_where_their_tokens_are(target: Target, parts: list[Shard]) -> None:
    rows = pack_rows(parts[0], 20)
    batch = rows.batch([1, 0])
    placed = place_features(batch, StreamedFeatures(target, parts[0]), torch.device("cpu"))
    for b, places in enumerate(batch.places):
        for place in places:
            own = target.features([parts[0].document(place.document)])[0][: place.length]
            torch.testing.assert_close(placed[b, place.start : place.start + place.length], own, **FP32)
    assert placed[batch.segments == 0].abs().sum() == 0


def test_plan_is_a_function_of_seed_and_step() -> None:
    shard = random_shard(40)
    plan, again = Plan(shard, 40, 3, seed=5), Plan(shard, 40, 3, seed=5)

    def documents(plan: Plan, step: int) -> list[int]:
        rows, chosen = plan.step(step)
        assert len(chosen) == 3
        return [place.document for row in chosen for place in rows.places[row]]

    steps = plan.num_rows // 3
    orders = [[documents(plan, epoch * steps + i) for i in range(steps)] for epoch in range(3)]
    # Asked for in another order.
    assert [[documents(again, epoch * steps + i) for i in range(steps)] for epoch in (2, 0, 1)] == [
        orders[2],
        orders[0],
        orders[1],
    ]
    assert orders[0] != orders[1] != orders[2]
    assert documents(Plan(shard, 40, 3, seed=6), 0) != documents(plan, 0)
    for order in orders:  # an epoch leaves out fewer than a step's rows
        assert len({d for step in order for d in step}) >= len(shard) - 3 * 3
