"""Training on tiny random targets, without an engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jakiro_vllm.draft.checkpoint import load_head
from jakiro_vllm.draft.head import DraftHead, Variant
from jakiro_vllm.training import generate as generate_module
from jakiro_vllm.training.corpus import python_sources, training_texts
from jakiro_vllm.training.evaluate import _walk, evaluate_head, greedy_documents, prefixes
from jakiro_vllm.training.generate import (
    GenerationRecipe,
    Shard,
    cut_prompts,
    join_shards,
    load_generated,
    load_shard,
    pack_documents,
    save_shard,
)
from jakiro_vllm.training.head import HeadRecipe, head_spec, rollout_loss, train_head
from jakiro_vllm.training.losses import LossWeights, head_loss, valid_rows
from jakiro_vllm.training.pair import publish
from jakiro_vllm.training.rollout import pack_rows, rollout, target_features

VOCAB = 48
#: Two orders of the same fp32 sums.
FP32 = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.3,  # a target with opinions: a flat one leaves nothing to learn
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def shard() -> Shard:
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, 30, size=24)
    return pack_documents(
        [rng.integers(1, VOCAB, size=4) for _ in lengths], [rng.integers(1, VOCAB, size=n).tolist() for n in lengths]
    )


def make_head(target: LlamaForCausalLM, variant: Variant = Variant.JAKIRO) -> DraftHead:
    torch.manual_seed(1)
    head = DraftHead(head_spec(target.config, variant))
    head.prepare_positions(128)
    return head


RECIPE = HeadRecipe(
    epochs=4,
    rows_per_step=2,
    row_length=48,
    lr=5e-3,
    warmup_steps=2,
    feature_noise=0.1,
    checkpoint_steps=1000,
    compile=False,
)


def test_corpus_split_is_disjoint(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / f"m{i}.py").write_text(f"def f{i}():\n    {'pass; ' * 20}\n    return {i}\n\n\n" * 4)
    documents = python_sources(tmp_path)
    held_out = [d for d in documents if d.held_out]
    assert 0 < len(held_out) < len(documents)
    trained = "".join(training_texts(documents))
    for document in documents:
        assert (f"return {document.name[1:-3]}\n" in trained) is not document.held_out


def test_prompts_are_seeded_prefixes_that_go_on() -> None:
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 4096, size=n).astype(np.uint16) for n in (5, 60, 300)]
    recipe = GenerationRecipe(num_prompts=50, shortest_prompt=8, longest_prompt=64)
    prompts = cut_prompts(documents, recipe)
    assert [p.tolist() for p in prompts] == [p.tolist() for p in cut_prompts(documents, recipe)]
    assert [p.tolist() for p in prompts] != [p.tolist() for p in cut_prompts(documents, replace(recipe, seed=1))]
    for prompt in prompts:
        assert 8 <= len(prompt) <= 64
        assert any(prompt.tobytes() in d[:-1].tobytes() for d in documents)
    with pytest.raises(ValueError, match="lower shortest_prompt"):
        cut_prompts(documents[:1], recipe)


def test_shards_round_trip_and_join(tmp_path: Path, shard: Shard) -> None:
    save_shard(shard, tmp_path / "a.npz")
    loaded = load_shard(tmp_path / "a.npz")
    joined = join_shards([loaded, shard])
    assert loaded.tokens.dtype == np.uint16
    assert joined.num_generated == 2 * shard.num_generated
    for i in range(len(joined)):
        np.testing.assert_array_equal(joined.document(i), shard.document(i % len(shard)))


def test_interrupted_write_leaves_no_shard(tmp_path: Path, shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_module.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_shard(shard, path)
    assert not path.exists()
    monkeypatch.undo()
    save_shard(shard, path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_damaged_shard_is_refused(tmp_path: Path, shard: Shard) -> None:
    save_shard(replace(shard, offsets=shard.offsets + 1), tmp_path / "a.npz")
    with pytest.raises(ValueError, match="do not fit its offsets"):
        load_shard(tmp_path / "a.npz")


def test_generation_resumes_at_the_missing_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def engine(_: Path, prompts: list, output: Path, recipe: GenerationRecipe, missing: list[int]) -> None:
        asked.append(missing)
        for part in missing:
            own = prompts[part * recipe.chunk : (part + 1) * recipe.chunk]
            save_shard(pack_documents(own, [[part]] * len(own)), output / f"part-{part:04d}.npz")

    monkeypatch.setattr(generate_module, "_run_engine", engine)
    documents = [np.arange(100, dtype=np.uint16)]
    recipe = GenerationRecipe(num_prompts=5, shortest_prompt=2, longest_prompt=8, chunk=2)
    whole = generate_module.generate(tmp_path, documents, tmp_path / "out", recipe)
    (tmp_path / "out" / "part-0001.npz").unlink()
    assert not generate_module.is_complete(tmp_path / "out", recipe)
    resumed = generate_module.generate(tmp_path, documents, tmp_path / "out", recipe)
    assert asked == [[0, 1, 2], [1]]
    assert generate_module.is_complete(tmp_path / "out", recipe)
    np.testing.assert_array_equal(whole.tokens, resumed.tokens)
    np.testing.assert_array_equal(whole.tokens, load_generated(tmp_path / "out", recipe).tokens)
    with pytest.raises(ValueError, match="another recipe"):
        generate_module.generate(tmp_path, documents, tmp_path / "out", replace(recipe, seed=3))


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
def test_rows_hold_every_document_once(shard: Shard, shuffled: bool) -> None:
    order = np.random.default_rng(3).permutation(len(shard)) if shuffled else None
    rows = pack_rows(shard, 40, order)
    found = sorted(rows.tokens[r, s : s + n].tolist() for r, s, _, n in rows.places)
    assert found == sorted(shard.document(i).tolist() for i in range(len(shard)))
    for r, s, _, n in rows.places:
        assert rows.segments[r, s : s + n].unique().numel() == 1
        assert rows.positions[r, s : s + n].tolist() == list(range(n))
    assert int((rows.segments > 0).sum()) == len(shard.tokens)


def test_packed_features_are_those_of_the_document_alone(target: LlamaForCausalLM, shard: Shard) -> None:
    rows = pack_rows(shard, 64)
    features = target_features(target, rows.tokens, rows.segments, rows.positions)
    for row, start, _, length in rows.places[:6]:
        alone = target.model(rows.tokens[row, start : start + length][None]).last_hidden_state[0]
        torch.testing.assert_close(features[row, start : start + length], alone, **FP32)


@pytest.mark.parametrize("behind", [0, 1, 2])
@pytest.mark.parametrize("ahead", [1, 2])
def test_valid_rows_stay_in_their_document(ahead: int, behind: int) -> None:
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
    valid = valid_rows(segments, ahead, behind)
    for b in range(2):
        for i in range(9):
            inside = i - behind >= 0 and i + ahead < 9
            expected = inside and segments[b, i - behind] == segments[b, i + ahead] and segments[b, i] > 0
            assert bool(valid[b, i]) is bool(expected)


@pytest.mark.parametrize("has_right", [True, False], ids=["contrast", "mixture only"])
def test_head_loss_equals_plain_loop(has_right: bool) -> None:
    torch.manual_seed(2)
    left, right, features = (torch.randn(2, 7, 5) * 1.5 for _ in range(3))
    lm_head = torch.randn(11, 5)
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
    weights = LossWeights(feature=0.7, token=0.3, right=0.4)
    probs = (features @ lm_head.T).softmax(-1)

    def term(output: torch.Tensor, ahead: int) -> float:
        total, count = 0.0, 0
        for b in range(2):
            for t in range(7 - ahead):
                if segments[b, t] == 0 or segments[b, t] != segments[b, t + ahead]:
                    continue
                goal = features[b, t + ahead]
                smooth = sum(
                    0.5 * float(d) ** 2 if abs(float(d)) < 1 else abs(float(d)) - 0.5 for d in output[b, t] - goal
                )
                p, q = (goal @ lm_head.T).softmax(-1), (output[b, t] @ lm_head.T).softmax(-1)
                entropy = -sum(float(p[v]) * float(q[v].log()) for v in range(11))
                total += 0.7 * smooth / 5 + 0.3 * entropy
                count += 1
        return total / count

    expected = term(left, 1) + (0.4 * term(right, 2) if has_right else 0.0)
    found = head_loss(left, right if has_right else None, features, probs, lm_head, segments, weights)
    assert found.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("variant", list(Variant), ids=lambda v: v.value)
def test_rollout_equals_drafting_one_round(target: LlamaForCausalLM, shard: Shard, variant: Variant) -> None:
    """Each round alone: the target's keys up to its start, then the head on its own features."""
    head = make_head(target, variant).requires_grad_(False)
    rows = pack_rows(shard, 48)
    row, start, _, length = rows.places[1]
    features = target_features(target, rows.tokens, rows.segments, rows.positions)
    embeds = target.get_input_embeddings()(rows.tokens)
    steps = [o.feature() for o in rollout(head, embeds, features, rows.segments, rows.positions, 4)]

    own_embeds, own_features = embeds[row, start : start + length], features[row, start : start + length]
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


@pytest.mark.parametrize("phases", [((1.0, 1),), ((0.5, 1), (0.5, 3))], ids=["reference", "rollout"])
def test_loss_goes_down(
    target: LlamaForCausalLM, shard: Shard, tmp_path: Path, phases: tuple[tuple[float, int], ...]
) -> None:
    recipe = replace(RECIPE, rollout=phases, epochs=8)
    rows = pack_rows(shard, recipe.row_length)
    noise = torch.zeros(*rows.tokens.shape, target.config.hidden_size)

    def loss(head: DraftHead) -> float:
        return rollout_loss(
            target, head, rows.tokens, rows.segments, rows.positions, noise, phases[-1][1], recipe
        ).item()

    before = loss(make_head(target))
    head = train_head(target, head_spec(target.config), shard, shard, tmp_path / "head", recipe)
    assert loss(head) < 0.9 * before
    saved = load_head(tmp_path / "head", torch.bfloat16)
    assert saved.spec.variant is Variant.JAKIRO
    assert saved.spec.num_kv_heads == target.config.num_key_value_heads
    assert not (tmp_path / "head.ckpt").exists()


def test_resumed_training_equals_uninterrupted(target: LlamaForCausalLM, shard: Shard, tmp_path: Path) -> None:
    spec = head_spec(target.config)
    whole = train_head(target, spec, shard, shard, tmp_path / "whole", RECIPE)
    for stop in (3, 7):
        train_head(target, spec, shard, shard, tmp_path / "parts", RECIPE, stop_after=stop)
        assert not (tmp_path / "parts").exists()
    with pytest.raises(ValueError, match="another recipe"):
        train_head(target, spec, shard, shard, tmp_path / "parts", replace(RECIPE, lr=1e-4))
    parts = train_head(target, spec, shard, shard, tmp_path / "parts", RECIPE)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name


def test_greedy_documents_are_the_targets_argmax(target: LlamaForCausalLM) -> None:
    documents = [np.arange(1, 40, dtype=np.uint16)]
    shard = greedy_documents(target, prefixes(documents, 3, 8), 6, batch=2)
    for i in range(len(shard)):
        document = torch.from_numpy(shard.document(i).astype(np.int64))
        best = target(document[None]).logits[0].argmax(-1)
        assert document[8:].tolist() == best[7:-1].tolist()


@pytest.mark.parametrize("variant", list(Variant), ids=lambda v: v.value)
def test_evaluation_counts_what_decoding_would_emit(target: LlamaForCausalLM, variant: Variant) -> None:
    documents = [np.random.default_rng(5).integers(1, VOCAB, size=60).astype(np.uint16)]
    shard = greedy_documents(target, prefixes(documents, 4, 8), 12)
    quality = evaluate_head(target, make_head(target, variant), shard, depth=3, width=VOCAB)
    # Every token is among all: only the end of the text cuts a round of three drafts and a bonus token.
    rounds = sum(-(-(len(shard.document(i)) - 9) // 4) for i in range(len(shard)))
    emitted = sum(len(shard.document(i)) - 9 for i in range(len(shard)))
    assert quality.top_k == (1.0, 1.0, 1.0)
    assert quality.acceptance_length_top_k == pytest.approx(emitted / rounds)
    assert 1.0 <= quality.acceptance_length <= quality.acceptance_length_top_k


@pytest.mark.parametrize(
    ("hits", "expected"),
    [([[0, 0, 0], [1, 1, 1]], (3, 3)), ([[1, 1, 1], [0, 1, 1]], (2, 3)), ([[1, 1, 1], [1, 1, 1]], (1, 3))],
    ids=["nothing accepted", "one, then cut", "all"],
)
def test_walk(hits: list[list[int]], expected: tuple[int, int]) -> None:
    assert _walk(np.asarray(hits, dtype=bool)) == expected


def test_publish_replaces_both_folders(tmp_path: Path) -> None:
    for name in ("target", "head"):
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / "config.json").write_text("{}")
        (tmp_path / "work" / name / "notes.partial").write_text("")
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "old.json").write_text("{}")
    publish(tmp_path / "work", tmp_path / "out")
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")) == [
        "head/config.json",
        "target/config.json",
    ]
