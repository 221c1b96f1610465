"""KV compaction against a loop over moves, byte by byte.

L layers of P pages, G KV heads, B slots per page, E elements per slot and head; R requests, S the longest path.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from jakiro_vllm.kernels import compaction as wrapper
from jakiro_vllm.kernels.compaction import LayerPages, compact, triton_kernel
from jakiro_vllm.kernels.compaction.reference import compact_reference
from jakiro_vllm.kernels.compaction.triton_kernel import launch_compact

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
LAYOUTS = ("HND", "NHD", "gaps")
#: A page's rows that no request has: more slots than rows.
SPARE_SLOTS = 13


@dataclass(frozen=True)
class Layer:
    """Shape and strides of a layer's pages; ``gaps`` leaves room after every row."""

    layout: str = "HND"
    heads: int = 2
    block: int = 4
    width: int = 8
    dtype: torch.dtype = torch.bfloat16

    def make(self, slots: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random bytes, NaNs among them: ``(storage, [P, G, B, E] pages in it)``."""
        pages, size = -(-slots // self.block), self.dtype.itemsize
        gap = 3 if self.layout == "gaps" else 0
        inner = (self.heads, self.block) if self.layout == "HND" else (self.block, self.heads)
        shape = (pages, *inner, (self.width + gap) * size)
        storage = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        view = storage.view(self.dtype)[..., : self.width]
        return storage, view if self.layout == "HND" else view.transpose(1, 2)


@dataclass
class Step:
    """Trees of ``counts`` rows each, one after the other, and what was accepted of them."""

    counts: list[int]
    paths: list[list[int]]
    slots: list[int]
    max_depth: int
    starts_dtype: torch.dtype = torch.int64
    row_starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.row_starts = [sum(self.counts[:i]) for i in range(len(self.counts))]

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(slot_mapping, row_starts, path, num_accepted)``; the path's padding would read out of bounds."""
        path = torch.full((len(self.paths), self.max_depth + 1), 10**9)
        for i, nodes in enumerate(self.paths):
            path[i, : len(nodes)] = torch.tensor(nodes)
        return (
            torch.tensor(self.slots),
            torch.tensor(self.row_starts, dtype=self.starts_dtype),
            path,
            torch.tensor([len(nodes) - 1 for nodes in self.paths]),
        )

    def moves(self) -> list[tuple[int, int]]:
        """``(source slot, destination slot)`` in increasing order within a request."""
        return [
            (self.slots[start + node], self.slots[start + i])
            for start, nodes in zip(self.row_starts, self.paths, strict=True)
            for i, node in enumerate(nodes)
            if node != i and min(self.slots[start + node], self.slots[start + i]) >= 0
        ]


def make_step(counts: Sequence[int], accepted: Sequence[int], rng: random.Random, max_depth: int = 6) -> Step:
    """Increasing random paths; rows in slots here and there."""
    paths = [[0, *sorted(rng.sample(range(1, n), k))] for n, k in zip(counts, accepted, strict=True)]
    slots = rng.sample(range(sum(counts) + SPARE_SLOTS), sum(counts))
    return Step(list(counts), paths, slots, max_depth)


def one_by_one(pages: Tensor, moves: Sequence[tuple[int, int]]) -> None:
    """Moves a layer's rows in the order given."""
    block = pages.shape[2]
    raw = pages.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[pages.element_size()])
    for source, target in moves:
        raw[target // block, :, target % block] = raw[source // block, :, source % block]


def check(layers: Sequence[Layer], step: Step, generator: torch.Generator) -> None:
    """Compares kernel and reference with the loop, in every byte of the storage."""
    num_slots = max(step.slots) + SPARE_SLOTS
    made = [layer.make(num_slots, generator) for layer in layers]
    wanted = []
    for storage, pages in made:
        copy, same = twin(storage, pages)
        one_by_one(same, step.moves())
        wanted.append(copy)
    for implementation in (run_kernel, run_reference):
        twins = [twin(*pair) for pair in made]
        implementation([pages for _, pages in twins], step)
        for layer, (storage, _), want in zip(layers, twins, wanted, strict=True):
            assert torch.equal(storage, want), f"{implementation.__name__}, {layer}"


def twin(storage: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of both."""
    copy = storage.clone()
    return copy, copy.view(pages.dtype).as_strided(pages.shape, pages.stride())


def run_kernel(pages: Sequence[Tensor], step: Step) -> None:
    launch_compact(LayerPages.of(pages), *step.arguments)


def run_reference(pages: Sequence[Tensor], step: Step) -> None:
    compact_reference(pages, *step.arguments)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ragged_batches(layout: str, dtype: str, batch: int, generator: torch.Generator, rng: random.Random) -> None:
    counts = [rng.randint(7, 25) for _ in range(batch)]
    accepted = [rng.randint(0, 6) for _ in range(batch)]
    layers = [Layer(layout, dtype=DTYPES[dtype])] * 2
    check(layers, make_step(counts, accepted, rng), generator)


@pytest.mark.parametrize(
    ("width", "dtype", "word", "alignment"),
    [
        (8, torch.bfloat16, 4, 16),
        (3, torch.float32, 4, 4),
        (6, torch.float16, 4, 4),
        (3, torch.bfloat16, 2, 2),
        (5, torch.float8_e5m2, 1, 1),
        (1, torch.bfloat16, 2, 2),
    ],
)
def test_words(
    width: int, dtype: torch.dtype, word: int, alignment: int, generator: torch.Generator, rng: random.Random
) -> None:
    layers = [Layer("HND", 3, 4, width, dtype), Layer("NHD", 3, 4, width, dtype)]
    described = LayerPages.of([layer.make(64, generator)[1] for layer in layers])
    assert (described.word, described.alignment) == (word, alignment)
    check(layers, make_step([12, 9], [5, 4], rng), generator)


def test_layers_of_many_shapes(generator: torch.Generator, rng: random.Random) -> None:
    layers = [
        Layer("HND", heads=1, block=4, width=16),
        Layer("NHD", heads=5, block=16, width=8),
        Layer("gaps", heads=3, block=6, width=40),
        Layer("NHD", heads=2, block=128, width=24, dtype=torch.float16),
    ]
    check(layers, make_step([25, 3, 17], [6, 2, 4], rng), generator)


@pytest.mark.parametrize("tile", [8, 64, 256])
def test_heads_and_words_in_chunks(
    tile: int, generator: torch.Generator, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_kernel, "TILE", tile)
    check([Layer("HND", 5, 4, 24), Layer("NHD", 3, 4, 40)], make_step([12, 9], [5, 4], rng), generator)


def test_deepest_trees(generator: torch.Generator, rng: random.Random) -> None:
    check([Layer("NHD")], make_step([64, 64, 30], [16, 16, 3], rng, max_depth=16), generator)
    check([Layer("HND")], make_step([64, 64], [63, 40], rng, max_depth=64), generator)


@pytest.mark.parametrize("starts_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_rows_move_onto_each_other(starts_dtype: torch.dtype, generator: torch.Generator) -> None:
    """Every destination but the first is a source, and slots in a row cross pages."""
    step = Step([8, 8], [[0, 2, 3, 4, 5, 6, 7], [0, 2, 4, 6]], list(range(5, 21)), 6, starts_dtype)
    check([Layer("HND", block=4), Layer("NHD", block=16)], step, generator)
    # Negative control: moved from the end, rows are overwritten before they are read.
    _, pages = Layer().make(40, generator)
    forward, backward = pages.clone(), pages.clone()
    one_by_one(forward, step.moves())
    one_by_one(backward, step.moves()[::-1])
    assert not torch.equal(forward.view(torch.int16), backward.view(torch.int16))


@pytest.mark.parametrize(
    "paths",
    [[[0], [0]], [[0, 1, 2, 3], [0, 1]], [[0, 1, 2, 3, 4, 5, 6], [0]]],
    ids=["nothing accepted", "all in place", "a whole chain"],
)
def test_nothing_moves(paths: list[list[int]], generator: torch.Generator) -> None:
    step = Step([7, 7], paths, list(range(3, 17)), 6)
    assert step.moves() == []
    check([Layer()], step, generator)


def test_requests_without_moves_read_no_slots(generator: torch.Generator) -> None:
    """Padded requests of a captured batch: their rows need not exist."""
    storage, pages = Layer().make(40, generator)
    before = storage.clone()
    arguments = torch.tensor([3]), torch.tensor([10**9]), torch.full((1, 7), 10**9), torch.tensor([0])
    launch_compact(LayerPages.of([pages]), *arguments)
    compact_reference([pages], *arguments)
    assert torch.equal(storage, before)


@pytest.mark.parametrize("missing", [0, 1, 3, 5], ids="row {}".format)
def test_negative_slots_are_left_out(missing: int, generator: torch.Generator) -> None:
    step = Step([6], [[0, 3, 4, 5]], [9, 2, 7, 11, 4, 0], 6)
    step.slots[missing] = -1
    check([Layer("HND"), Layer("NHD")], step, generator)


def test_path_in_a_wider_buffer(generator: torch.Generator, rng: random.Random) -> None:
    step = make_step([12, 9], [5, 4], rng)
    slots, starts, path, accepted = step.arguments
    storage, pages = Layer().make(64, generator)
    copy, same = twin(storage, pages)
    one_by_one(same, step.moves())
    for other in (torch.cat([path, path], dim=1)[:, :7], path.t().contiguous().t()):
        found, moved = twin(storage, pages)
        launch_compact(LayerPages.of([moved]), slots, starts, other, accepted)
        assert torch.equal(found, copy)


@pytest.mark.parametrize("implementation", [run_kernel, run_reference], ids=["triton", "reference"])
@pytest.mark.parametrize(("batch", "max_depth"), [(0, 6), (2, 0)], ids=["no requests", "no depth"])
def test_empty(batch: int, max_depth: int, implementation: Callable[..., None], generator: torch.Generator) -> None:
    storage, pages = Layer().make(20, generator)
    before = storage.clone()
    step = Step([1] * batch, [[0]] * batch, list(range(batch)), max_depth)
    if batch == 0:
        empty = torch.empty(0, dtype=torch.int64)
        arguments = empty, empty, torch.empty(0, max_depth + 1, dtype=torch.int64), empty
        compact(LayerPages.of([pages]), *arguments)
        launch_compact(LayerPages.of([pages]), *arguments)
    else:
        implementation([pages], step)
    assert torch.equal(storage, before)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_the_wrapper_picks(
    on_gpu: bool, generator: torch.Generator, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    monkeypatch.setattr(wrapper, "runs_triton", lambda tensor: on_gpu)
    monkeypatch.setattr(triton_kernel, "launch_compact", lambda *given: launched.append(given))
    storage, pages = Layer().make(64, generator)
    copy, same = twin(storage, pages)
    step = make_step([12], [5], rng)
    one_by_one(same, step.moves())
    compact(LayerPages.of([pages]), *step.arguments)
    assert len(launched) == on_gpu
    assert on_gpu or torch.equal(storage, copy)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"path": torch.zeros(2, 66, dtype=torch.int64)}, r"S in \[1, 65\], got \[2, 66\]"),
        ({"path": torch.zeros(2, 7, dtype=torch.int32)}, "path must be int64, got torch.int32"),
        ({"slot_mapping": torch.zeros(3, 3, dtype=torch.int64)}, r"slot_mapping must be \[T\], got \[3, 3\]"),
        ({"slot_mapping": torch.zeros(9, dtype=torch.int32)}, "slot_mapping must be int64"),
        ({"row_starts": torch.zeros(2)}, "row_starts must be int32 or int64, got torch.float32"),
        ({"row_starts": torch.zeros(3, dtype=torch.int64)}, r"row_starts must be \[2\], got \[3\]"),
        ({"num_accepted": torch.zeros(1, dtype=torch.int64)}, r"num_accepted must be \[2\], got \[1\]"),
        ({"num_accepted": torch.zeros(2, dtype=torch.int64, device="meta")}, "must be on the pages' device cpu"),
    ],
)
def test_errors(changes: dict[str, Tensor], sentence: str) -> None:
    given = {
        "pages": LayerPages.of([torch.zeros(3, 2, 4, 8)]),
        "slot_mapping": torch.zeros(9, dtype=torch.int64),
        "row_starts": torch.zeros(2, dtype=torch.int64),
        "path": torch.zeros(2, 7, dtype=torch.int64),
        "num_accepted": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=sentence):
        compact(**(given | changes))


@pytest.mark.parametrize(
    ("pages", "sentence"),
    [
        ([], "at least one layer, got none"),
        ([torch.zeros(3, 2, 4)], r"layer 0 must be \[P, G, B, E\]"),
        ([torch.zeros(0, 2, 4, 8)], "not empty"),
        ([torch.zeros(3, 2, 8, 4).transpose(2, 3)], "contiguous in E, got strides"),
        ([torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8).half()], "got 2 bytes in layer 1 and 4 in layer 0"),
        ([torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8, device="meta")], "got meta in layer 1"),
        ([torch.zeros(1, 1, 1, 1).expand(2**27, 1, 16, 1)], "fewer than 2\\*\\*31 slots"),
    ],
    ids=["none", "shape", "empty", "strides", "sizes", "devices", "slots"],
)
def test_pages_that_do_not_fit(pages: list[Tensor], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LayerPages.of(pages)
