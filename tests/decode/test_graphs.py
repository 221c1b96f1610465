"""Drafts that can be recorded: launches only, from persistent buffers, for padded batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jakiro_vllm.config import TreeConfig
from jakiro_vllm.decode.drafter import Roots, TreeDrafter
from jakiro_vllm.decode.graphs import CUDARecorder, DraftGraphs, DraftInput
from jakiro_vllm.draft.head import DraftHead, HeadSpec
from jakiro_vllm.tree.batch import TreeBatch

VOCAB = 50
CONFIG = TreeConfig(node_budget=12, depth=4, top_k=3)


class DeviceOnly(TorchDispatchMode):
    """Stands in for a GPU that nobody waits for.

    Tensors on the device ``meta`` have no values, so reading one fails; what mixes them with host tensors is
    refused here.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        host = [t for t in tensors if t.device.type != "meta"]
        assert not host, f"{func} takes a host tensor of shape {tuple(host[0].shape)}"
        return func(*args, **(kwargs or {}))


class NoContext:
    """Attends to the draft's own nodes only, without looking at a value."""

    def write(self, keys: Tensor, values: Tensor) -> None:
        raise AssertionError("growing a tree writes no committed rows")

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, num_scratch: int, ancestors: Tensor) -> Tensor:
        if not num_scratch:
            return torch.zeros_like(query)
        keys, values = keys[:, :num_scratch], values[:, :num_scratch]
        group = query.shape[2] // keys.shape[2]
        scores = torch.einsum("brhd,bshd->bhrs", query, keys.repeat_interleave(group, dim=2))
        bits = (ancestors.unsqueeze(2) >> torch.arange(num_scratch, device=query.device)) & 1
        weights = scores.masked_fill((bits == 0).unsqueeze(1), float("-inf")).softmax(dim=-1)
        return torch.einsum("bhrs,bshd->brhd", weights, values.repeat_interleave(group, dim=2))


@pytest.fixture
def make_drafter(tiny_spec: Callable[..., HeadSpec]) -> Callable[..., TreeDrafter]:
    """``make_drafter(variant, policy, device)`` with random weights; none on the device ``meta``."""

    def make(variant: str, policy: str = "auto", device: str = "cpu", shape: TreeConfig = CONFIG) -> TreeDrafter:
        torch.manual_seed(0)
        head = DraftHead(tiny_spec(variant)).requires_grad_(False)
        head.prepare_positions(64)
        head = head.to(device)
        table, lm_head = (torch.randn(VOCAB, 16).to(device) for _ in range(2))
        config = replace(shape, policy=policy)
        return TreeDrafter(head, config, lambda ids: table[ids], lambda f: f @ lm_head.T)

    return make


@pytest.mark.parametrize(
    ("variant", "policy"),
    [("jakiro", "mixture"), ("jakiro", "decoupled"), ("jakiro_star", "decoupled"), ("dense", "mixture")],
)
def test_growing_a_tree_never_waits_for_a_value(
    variant: str, policy: str, make_drafter: Callable[..., TreeDrafter]
) -> None:
    drafter = make_drafter(variant, policy, "meta")
    given = DraftInput.empty(5, 16, torch.float32, 7, "meta")
    with DeviceOnly():
        trees = drafter.grow(given.roots, NoContext())
    assert trees.tokens.shape == (5, CONFIG.num_nodes)
    assert all(t.device.type == "meta" for t in vars(trees).values())


@pytest.mark.parametrize("shape", [(63, 5, 16), (63, 2, 47), (16, 16, 4), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("variant", ["jakiro", "jakiro_star", "dense"])
def test_largest_and_smallest_shapes(
    variant: str, shape: tuple[int, int, int], make_drafter: Callable[..., TreeDrafter]
) -> None:
    """What the configuration admits fits into the ancestor words of a draft's own nodes."""
    drafter = make_drafter(variant, device="meta", shape=TreeConfig(*shape))
    trees = drafter.grow(DraftInput.empty(2, 16, torch.float32, 7, "meta").roots, NoContext())
    assert trees.tokens.shape == (2, shape[0] + 1)


@pytest.mark.parametrize(
    "breaking",
    [
        pytest.param(lambda x: x.sum().item(), id="item"),
        pytest.param(lambda x: x.nonzero(), id="nonzero"),
        pytest.param(lambda x: x[x > 0], id="mask"),
        pytest.param(lambda x: bool((x > 0).any()), id="bool"),
        pytest.param(lambda x: x + torch.arange(4), id="host-tensor"),
        pytest.param(lambda x: x[torch.tensor([0])], id="host-index"),
    ],
)
def test_waiting_is_noticed(breaking: Callable[[Tensor], Any]) -> None:
    """The negative control of the test above."""
    with DeviceOnly(), pytest.raises(Exception):  # noqa: B017, PT011  (each has its own)
        breaking(torch.ones(4, device="meta"))


class Recorder:
    """Records as a CUDA graph does: a replay reads and writes the memory of the recording, and nothing else."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.replays = 0

    def __call__(self, function: Callable[[], TreeBatch]) -> tuple[Callable[[], None], TreeBatch]:
        recorded = function()
        self.sizes.append(recorded.batch_size)

        def replay() -> None:
            self.replays += 1
            for mine, new in zip(vars(recorded).values(), vars(function()).values(), strict=True):
                mine.copy_(new)

        return replay, recorded


def test_replays_give_what_drafting_gives(make_drafter: Callable[..., TreeDrafter], generator: torch.Generator) -> None:
    """For every batch size, in any order, whatever the padding held before."""
    drafter = make_drafter("jakiro")
    seen: list[Tensor] = []

    def draft(given: DraftInput) -> TreeBatch:
        seen.append(given.context_lens.clone())
        return drafter.grow(given.roots, NoContext())

    recorder = Recorder()
    graphs = DraftGraphs(draft, DraftInput.empty(8, 16, torch.float32, 3, "cpu"), (1, 2, 4, 8), recorder)
    assert recorder.sizes == [8, 4, 2, 1], "the largest first: the others fit into its memory"
    for batch in (8, 3, 1, 5, 2, 8):
        assert graphs.fits(batch)
        given = DraftInput(
            Roots(
                torch.randn(batch, 16, generator=generator),
                torch.randint(VOCAB, (batch,), generator=generator),
                torch.randint(40, (batch,), generator=generator),
            ),
            torch.randint(9, (batch, 3), generator=generator, dtype=torch.int32),
            torch.randint(1, 30, (batch,), generator=generator, dtype=torch.int32),
        )
        found = graphs(given)
        assert seen[-1][:batch].tolist() == given.context_lens.tolist()
        assert not seen[-1][batch:].any(), "padding has no context"
        expected = drafter.grow(given.roots, NoContext())
        for name, value in vars(expected).items():
            torch.testing.assert_close(getattr(found, name), value, msg=name)  # scores: padding may round otherwise
    assert recorder.replays == 6
    assert not graphs.fits(9)


def test_each_recording_has_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks agree on addresses when the context ends, so it must hold the whole recording and nothing after it."""
    events: list[str] = []

    @contextmanager
    def context(name: str, **_: Any) -> Iterator[None]:
        events.append(f"begin {name}")
        yield
        events.append(f"end {name}")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: events.append("replay")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: context("recording"))
    record = CUDARecorder(lambda: context("ranks"))
    replay, trees = record(lambda: events.append("draft"))
    assert trees is None
    replay()
    assert events == ["begin ranks", "begin recording", "draft", "end recording", "end ranks", "replay"]
