"""Runs of a few steps on a tiny random target: learning, resuming, and several workers."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import (
    greedy_shard,
    random_shard,
    run_and_die,
    run_as_worker,
    tiny_parts,
    tiny_run,
    tiny_settings,
    tiny_target,
)
from torch._dynamo.exc import TorchDynamoException

from jakiro_vllm.draft.head import DraftHead
from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.training import run_files
from jakiro_vllm.training import trainer as trainer_module
from jakiro_vllm.training.features import StreamedFeatures, Target, cache_features
from jakiro_vllm.training.frozen import head_spec
from jakiro_vllm.training.run_files import CHECKPOINT, METRICS
from jakiro_vllm.training.settings import TrainSettings
from jakiro_vllm.training.trainer import TrainingStopped, train_head
from jakiro_vllm.training.workers import Workers, join_workers

#: The same float32 sums in another order, in gradients that AdamW divides by their own size.
CURVE = {"rel": 1e-5, "abs": 1e-5}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """As in the runs' own processes: sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def losses(work: Path) -> list[float]:
    lines = [json.loads(line) for line in (work / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["loss"] for line in lines]


def assert_same(a: DraftHead, b: DraftHead | dict[str, torch.Tensor]) -> None:
    other = b if isinstance(b, dict) else b.state_dict()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(
    ("variant", "precision"),
    [("jakiro", "float32"), ("jakiro", "bfloat16"), ("jakiro_star", "float32"), ("dense", "float32")],
)
def test_a_head_learns(target: Target, tmp_path: Path, variant: str, precision: str) -> None:
    settings = tiny_settings(
        {"variant": variant},
        epochs=12,
        rows=4,
        lr=3e-3,
        precision=precision,
        feature_noise=0.02,
        clip_value=10.0,
        rollout=[{"share": 0.75, "steps": 1}, {"share": 0.25, "steps": 2}],
        loss={"token": 1.0, "experts": 0.0 if variant == "dense" else 0.5},
    )
    documents, held_out = greedy_shard(target, 240, 20, seed=1), greedy_shard(target, 30, 16, seed=2)
    spec = head_spec(target.config, settings.head)

    def accuracy(work: str, of: TrainSettings) -> tuple[float, float, Path]:
        source = StreamedFeatures(target, documents)
        result = train_head(target, spec, documents, source, held_out, tmp_path / work, of)
        assert result.tokens > 0
        assert not any(p.requires_grad for p in result.head.parameters())
        return result.quality.top1[0], result.quality.acceptance_length, tmp_path / work

    short = settings.model_copy(update={"optimizer": settings.optimizer.model_copy(update={"epochs": 0.2})})
    before, length_before, _ = accuracy("short", short)
    after, length_after, work = accuracy("whole", settings)
    curve = losses(work)
    assert sum(curve[-5:]) < 0.85 * sum(curve[:5])
    assert after > before + 0.2
    assert length_after > length_before


def test_the_scale_of_embeddings_is_folded_into_the_head(target: Target, tmp_path: Path) -> None:
    """What was trained on scaled embeddings is served with raw ones."""
    result = tiny_run(tmp_path, tiny_settings(balance_inputs=True), target)
    trained = torch.load(tmp_path / CHECKPOINT, weights_only=True)["head"]["fc.weight"]
    served, hidden = result.head.fc.weight, target.hidden_size
    assert torch.equal(served[:, hidden:], trained[:, hidden:])
    scale = served[0, 0] / trained[0, 0]
    torch.testing.assert_close(served[:, :hidden], trained[:, :hidden] * scale)
    features = torch.cat(target.features([random_shard().document(i) for i in range(24)]))
    embeddings = target.model.get_input_embeddings().weight
    assert scale == pytest.approx(float(features.square().mean().sqrt() / embeddings.square().mean().sqrt()), rel=0.2)
    assert scale > 2, "else nothing is shown"


def test_muon_trains_the_matrices(tmp_path: Path) -> None:
    session = [tiny_run(tmp_path / str(lr), tiny_settings(muon_lr=lr, lr=1e-9, epochs=1)).head for lr in (1e-2, 1e-9)]
    moved = {
        n for n, p in session[0].named_parameters() if not torch.allclose(p, dict(session[1].named_parameters())[n])
    }
    still = {name for name, _ in session[0].named_parameters()} - moved
    assert still == {"norm.weight", "experts.gate.weight"}


def test_gradients_may_be_accumulated(tmp_path: Path) -> None:
    for name, micro in (("whole", None), ("single", 1), ("pairs", 2)):
        tiny_run(tmp_path / name, tiny_settings(micro_rows=micro))
    whole = losses(tmp_path / "whole")
    assert len(whole) > 8
    for name in ("single", "pairs"):
        assert losses(tmp_path / name) == pytest.approx(whole, **CURVE)


def test_two_workers_do_what_one_does(tmp_path: Path) -> None:
    """Three rows a step: the workers' shares differ."""
    settings = [
        tiny_settings({"variant": "jakiro"}, rollout=[{"share": 0.5, "steps": 1}, {"share": 0.5, "steps": 2}]),
        tiny_settings({"variant": "jakiro_star"}, loss={"experts": 0.5}, micro_rows=1, balance_inputs=True),
    ]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=run_as_worker, args=(rank, 2, str(tmp_path), settings)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for number, own in enumerate(settings):
        tiny_run(tmp_path / f"alone{number}", own)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    for number in range(len(settings)):
        together = tmp_path / f"run{number}"
        assert losses(together) == pytest.approx(losses(tmp_path / f"alone{number}"), **CURVE)
        first, second = (torch.load(together / f"head{rank}.pt", weights_only=True) for rank in range(2))
        for name in first:
            assert torch.equal(first[name], second[name]), name
    parts = tiny_parts()
    cache_features(tiny_target(), parts, tmp_path / "alone")
    for i in range(len(parts)):
        shared, alone = (load_file(tmp_path / f / f"part-0000{i}.safetensors") for f in ("features", "alone"))
        assert torch.equal(shared["features"], alone["features"])
    computed = [int((tmp_path / f"computed{rank}").read_text()) for rank in range(2)]
    assert computed == [len(parts[0].tokens) + len(parts[2].tokens), len(parts[1].tokens)]


def test_torchrun_is_joined_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with join_workers() as workers:
        assert workers == Workers(0, 1)
        assert not torch.distributed.is_initialized()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with join_workers() as workers:
        assert torch.distributed.is_initialized()
        assert workers.is_first
        assert workers.agree(True)
        assert not workers.agree(False)
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_compiled_training_does_the_same(tmp_path: Path) -> None:
    phases = [{"share": 0.5, "steps": 1}, {"share": 0.5, "steps": 2}]
    for name in ("compiled", "plain"):
        settings = tiny_settings(epochs=2, rollout=phases, loss={"experts": 0.5}, compile=name == "compiled")
        tiny_run(tmp_path / name, settings)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), **CURVE)


def test_a_compiler_that_fails_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        def fail(*_: Any) -> None:
            raise TorchDynamoException("no compiler here\nand a long story")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    tiny_run(tmp_path / "broken", tiny_settings(epochs=1, compile=True))
    monkeypatch.undo()
    assert "torch.compile failed: no compiler here" in caplog.text
    tiny_run(tmp_path / "plain", tiny_settings(epochs=1))
    assert losses(tmp_path / "broken") == losses(tmp_path / "plain")


def test_more_workers_than_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = trainer_module.Workers(0, 4)
    monkeypatch.setattr(trainer_module.Workers, "current", classmethod(lambda _: workers))
    with pytest.raises(JakiroConfigError, match="at least the number of workers, 4, got 3"):
        tiny_run(tmp_path, tiny_settings())


@pytest.mark.parametrize("more", [{}, {"muon_lr": 1e-2, "balance_inputs": True}], ids=["AdamW", "Muon, balanced"])
def test_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, more: dict[str, Any]) -> None:
    rollout = [{"share": 0.5, "steps": 1}, {"share": 0.5, "steps": 2}]
    settings = tiny_settings(rollout=rollout, **more)
    context = multiprocessing.get_context("spawn")
    killed = context.Process(target=run_and_die, args=(str(tmp_path / "killed"), settings, 7))
    killed.start()
    whole = tiny_run(tmp_path / "whole", settings)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert len(losses(tmp_path / "killed")) == 8
    assert torch.load(tmp_path / "killed" / CHECKPOINT, weights_only=True)["step"] == 6
    resumed = tiny_run(tmp_path / "killed", settings)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert_same(whole.head, resumed.head)
    assert (resumed.steps, resumed.tokens, resumed.quality) == (whole.steps, whole.tokens, whole.quality)
    # Another call of a finished run trains nothing.
    again = tiny_run(tmp_path / "killed", settings)
    assert_same(whole.head, again.head)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_cached_features_do_what_streamed_ones_do(target: Target, tmp_path: Path) -> None:
    documents, settings = random_shard(), tiny_settings()
    spec, held_out = head_spec(target.config, settings.head), greedy_shard(target, 3, 8, seed=7)
    cache = cache_features(target, [documents], tmp_path / "features")
    train_head(target, spec, documents, cache, held_out, tmp_path / "cached", settings)
    tiny_run(tmp_path / "streamed", settings, target)
    # The cache is bfloat16.
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "streamed"), rel=0.02)


def test_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, saved = tiny_settings(), []
    replacing = run_files.os.replace

    def fail_at_second(source: Path, goal: Path) -> None:
        if goal.name == CHECKPOINT:
            saved.append(goal)
            if len(saved) == 2:
                raise KeyboardInterrupt
        replacing(source, goal)

    monkeypatch.setattr(run_files.os, "replace", fail_at_second)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "parts", settings)
    monkeypatch.undo()
    assert torch.load(tmp_path / "parts" / CHECKPOINT, weights_only=True)["step"] == 3
    parts, whole = tiny_run(tmp_path / "parts", settings), tiny_run(tmp_path / "whole", settings)
    assert_same(whole.head, parts.head)


def test_checkpoint_of_another_run_is_refused(target: Target, tmp_path: Path) -> None:
    settings = tiny_settings(epochs=1)
    tiny_run(tmp_path, settings)
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"optimizer\.lr '0\.005', not '0\.001'", {"settings": tiny_settings(epochs=1, lr=1e-3)}),
        ("with head ", {"settings": tiny_settings({"variant": "dense"}, epochs=1)}),
        ("with target ", {"settings": settings, "target": tiny_target(seed=3)}),
        ("with documents ", {"settings": settings, "documents": random_shard(seed=4)}),
    ]
    for message, changed in cases:
        with pytest.raises(JakiroConfigError, match=message) as caught:
            tiny_run(tmp_path, **changed)
        assert "\n" not in str(caught.value)
    tiny_run(tmp_path, tiny_settings(epochs=1, micro_rows=1, checkpoint_steps=50))  # computes the same
    (tmp_path / CHECKPOINT).write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(JakiroConfigError, match="may be damaged"):
        tiny_run(tmp_path, settings)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_a_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    plain, calls = trainer_module.objective, []

    def broken(*args: Any) -> torch.Tensor:
        loss = plain(*args)
        calls.append(loss)
        if len(calls) <= 5:
            return loss
        # 0 * sqrt'(0) is NaN behind a finite loss.
        return loss * math.nan if where == "loss" else loss + (loss - loss).sqrt() * 0.0

    monkeypatch.setattr(trainer_module, "objective", broken)
    with pytest.raises(TrainingStopped, match=r"stopped at step 6: .*nan.*checkpoint.pt keeps step 3; lower") as caught:
        tiny_run(tmp_path, tiny_settings())
    assert str(tmp_path / CHECKPOINT) in str(caught.value)
    monkeypatch.undo()
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in state["head"].values())
    assert len(losses(tmp_path)) == 5
    tiny_run(tmp_path, tiny_settings())
    assert all(math.isfinite(loss) for loss in losses(tmp_path))


def test_schedules_and_metrics(tmp_path: Path) -> None:
    for schedule in ("cosine", "linear", "constant"):
        tiny_run(tmp_path / schedule, tiny_settings(schedule=schedule, evaluate_steps=5))
        lines = [json.loads(line) for line in (tmp_path / schedule / METRICS).read_text().splitlines()]
        rates = [line["lr"] for line in lines]
        assert rates[:3] == pytest.approx([0.0, 2.5e-3, 5e-3])
        assert (rates[-1] == pytest.approx(5e-3)) is (schedule == "constant")
        assert rates[2:] == sorted(rates[2:], reverse=True)


def test_a_warm_up_longer_than_the_run_is_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_run(tmp_path, tiny_settings(warmup_steps=2000, epochs=2))
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert max(line["lr"] for line in lines) == pytest.approx(5e-3)
    assert "cut from 2000" in caplog.text


def test_tensorboard_gets_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="the extra 'train' is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny_run(tmp_path / "with", tiny_settings(epochs=1))
    events = EventAccumulator(str(tmp_path / "with" / "logs"))
    events.Reload()
    assert [e.value for e in events.Scalars("training/loss")] == pytest.approx(losses(tmp_path / "with"))
    names = set(events.Tags()["scalars"])
    assert {"training/lr", "training/tokens_per_second", "held_out/top1/depth_3", "held_out/acceptance_length"} <= names
    found = importlib.util.find_spec
    monkeypatch.setattr(
        run_files.importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name)
    )
    tiny_run(tmp_path / "without", tiny_settings(epochs=1))
    assert losses(tmp_path / "without") == losses(tmp_path / "with")
    assert not (tmp_path / "without" / "logs").exists()


def test_too_little_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(JakiroConfigError, match=r"2 answers fill 2 rows .* give more prompts or lower optimizer.rows"):
        tiny_run(tmp_path, tiny_settings(epochs=1), documents=random_shard(2))


def test_initialisation_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    tiny_run(tmp_path, tiny_settings(epochs=1))
    assert torch.equal(torch.rand(3), expected)
