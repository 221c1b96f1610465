"""The CUDA worker beyond steps: sleeping and shutting down; vLLM's parts are replaced by what they do to memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from vllm.v1.worker.gpu_worker import Worker

from jakiro_vllm.integration.gpu_runner import GPUTreesMixin
from jakiro_vllm.integration.gpu_worker import JakiroGPUWorker
from jakiro_vllm.integration.proposer import JakiroProposer

pytestmark = pytest.mark.vllm


class Head(torch.nn.Module):
    """Parameters and buffers, as a head has."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 3)
        self.register_buffer("rotary_table", torch.randn(4, 2), persistent=False)


def proposer() -> Any:
    """A proposer with a head and the scales of its attention."""
    made = JakiroProposer.__new__(JakiroProposer)
    made.drafter = SimpleNamespace(head=Head())
    made.attention = torch.nn.Module()
    made.attention.register_buffer("_k_scale", torch.tensor(1.0))
    return made


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker whose sleep of level 2 loses what lies on the device."""
    made = JakiroGPUWorker.__new__(JakiroGPUWorker)
    made.model_runner = SimpleNamespace(drafter=proposer())

    def sleep(self: Any, level: int = 1) -> None:
        if level == 2:
            with torch.no_grad():
                for tensor in made.model_runner.drafter.tensors():
                    tensor.fill_(float("nan"))

    monkeypatch.setattr(Worker, "sleep", sleep)
    monkeypatch.setattr(Worker, "wake_up", lambda self, tags=None: None)
    return made


@pytest.mark.parametrize("tags", [[None], [["weights"], ["kv_cache"]], [["kv_cache"], ["weights"]]], ids=str)
def test_the_head_survives_a_deep_sleep(worker: Any, tags: list[Any]) -> None:
    tensors = worker.model_runner.drafter.tensors()
    assert len(tensors) == 4
    before, addresses = [t.detach().clone() for t in tensors], [t.data_ptr() for t in tensors]
    for _ in range(2):
        worker.sleep(2)
        assert all(t.isnan().all() for t in tensors)
        for some in tags:
            worker.wake_up(some)
        after = worker.model_runner.drafter.tensors()
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert [t.data_ptr() for t in after] == addresses, "graphs read the old addresses"
        assert not worker._head_at_rest


def test_a_light_sleep_copies_nothing(worker: Any) -> None:
    worker.sleep(1)
    assert not worker._head_at_rest
    worker.wake_up()


def test_shutdown_lets_go_of_all_memory() -> None:
    called = []

    class Base:
        def shutdown(self) -> None:
            called.append(True)

    class Runner(GPUTreesMixin, Base):
        pass

    runner: Any = Runner()
    runner.drafter = proposer()
    runner._graphs = runner._pages = runner._store = runner._step = object()
    runner.shutdown()
    assert called == [True]
    assert [runner._graphs, runner._pages, runner._store, runner._step] == [None] * 4
    assert not hasattr(runner.drafter, "drafter")
    assert not hasattr(runner.drafter, "attention")
    runner.shutdown()  # as a worker that failed half way may do
