"""Drafting against a per-request, per-node reference.

V vocabulary, C hidden size, B requests that draft, T committed rows of a round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from published_heads import published_head, write_head
from reference_drafter import DenseHeadCache, ReferenceDraft, ReferenceDrafter, Row, token_paths
from reference_head import ReferenceHead
from torch import Tensor

from jakiro_vllm.config import TreeConfig
from jakiro_vllm.decode.drafter import Roots, RoundInput, TreeDrafter
from jakiro_vllm.draft.candidates import resolve_policy
from jakiro_vllm.draft.checkpoint import load_head
from jakiro_vllm.kernels import forward, native
from jakiro_vllm.tree.batch import TreeBatch

VOCAB = 40
HIDDEN = 16
#: Scores are fp32 sums of log-probabilities; rotary tables are fp32 too. Where two candidates are closer
#: than this at a cut, either may win, and the case is drawn again.
MARGIN = 1e-4


@dataclass
class Case:
    """What is drafted with what.

    Attributes:
        rounds: per round the committed rows of each request, in request order; requests with 0 rows sit out.
            The last round drafts.
        drafting: requests that draft, by default all with rows in the last round.
        head: options of ``published_head``.
    """

    variant: str = "jakiro"
    config: TreeConfig = field(default_factory=lambda: TreeConfig(node_budget=20, depth=4, top_k=4))
    rounds: tuple[tuple[int, ...], ...] = ((1, 6, 13),)
    drafting: tuple[int, ...] | None = None
    head: dict[str, Any] = field(default_factory=dict)
    gather_parents: bool = True
    everyone: bool = False  # negative control of DenseHeadCache
    packed: bool = False
    dtype: torch.dtype = torch.float64


@dataclass
class Result:
    """Trees of the drafter and of the reference, request by request."""

    trees: TreeBatch
    references: list[ReferenceDraft]
    drafter: TreeDrafter
    attends: int
    roots: list[int]

    def agrees(self) -> list[bool]:
        """Whether each request's nodes are those of the reference."""
        return [
            sorted(token_paths(self.trees, i)) == sorted(reference.paths) for i, reference in enumerate(self.references)
        ]


def draft(case: Case, folder: Path) -> Result:
    """Draws a case whose decisions are clear, and drafts it."""
    for seed in range(50):
        result = draft_once(case, folder / str(seed), seed)
        if min(reference.margin for reference in result.references) > MARGIN:
            return result
    raise AssertionError("no seed without near ties; lower the number of decisions per case")


def draft_once(case: Case, folder: Path, seed: int) -> Result:
    """Several rounds through ``TreeDrafter``, and the last one through the reference."""
    config, tensors = published_head(case.variant, hidden_size=HIDDEN, gain=1.5, seed=seed, **case.head)
    head = load_head(write_head(folder, config, tensors, "safetensors"), case.dtype)
    head.prepare_positions(64)
    if case.packed:
        head.requires_grad_(False).pack()
    generator = torch.Generator().manual_seed(seed)
    embedding, lm_head = (torch.randn(VOCAB, HIDDEN, generator=generator).to(case.dtype) for _ in range(2))
    drafter = TreeDrafter(
        head, case.config, lambda ids: embedding[ids], lambda f: f @ lm_head.T, gather_parents=case.gather_parents
    )
    reference = ReferenceDrafter(
        ReferenceHead(config, tensors),
        embedding,
        lm_head,
        case.config,
        resolve_policy(case.config.policy, head.spec),
        case.gather_parents,
    )

    history: dict[int, list[Row]] = {i: [] for i in range(len(case.rounds[0]))}
    cache = DenseHeadCache(everyone=case.everyone)
    for number, counts in enumerate(case.rounds):
        rows, requests = [], []
        for request, count in enumerate(counts):
            for _ in range(count):
                feature = torch.randn(HIDDEN, generator=generator).to(case.dtype)
                token = int(torch.randint(VOCAB, (), generator=generator))
                history[request].append(Row(feature, token, len(history[request])))
                rows.append(history[request][-1])
                requests.append(request)
        is_last = number == len(case.rounds) - 1
        drafting = [i for i, n in enumerate(counts) if n] if case.drafting is None else list(case.drafting)
        inputs = RoundInput(
            features=torch.stack([row.feature for row in rows]),
            next_tokens=torch.tensor([row.next_token for row in rows]),
            positions=torch.tensor([row.position for row in rows]),
        )
        cache.begin(requests, drafting)
        if is_last:
            last = torch.tensor([max(t for t, r in enumerate(requests) if r == request) for request in drafting])
            x = drafter.observe(inputs, cache)
            trees = drafter.grow(Roots(x[last], inputs.next_tokens[last], inputs.positions[last]), cache)
        else:
            drafter.observe(inputs, cache)
            assert cache.attends == 0, "committed rows need keys and values only"
    references = [reference.draft(history[request]) for request in drafting]
    return Result(trees, references, drafter, cache.attends, [history[r][-1].next_token for r in drafting])


def check(case: Case, folder: Path) -> Result:
    """The drafter's trees are the reference's, in an order in which every prefix is a tree."""
    result = draft(case, folder)
    assert all(result.agrees())
    trees = result.trees
    assert trees.tokens[:, 0].tolist() == result.roots
    assert trees.width <= case.config.num_nodes
    for i, reference in enumerate(result.references):
        count = int(trees.num_nodes[i])
        paths = token_paths(trees, i)
        assert len(set(paths)) == len(paths), "a path is drafted once"
        parents = trees.parents[i, :count].tolist()
        assert all(parent < node for node, parent in enumerate(parents))
        assert trees.depths[i, 1:count].tolist() == [len(path) for path in paths]
        assert count - 1 == len(reference.paths) <= case.config.node_budget
    assert result.attends == result.drafter.num_forwards
    return result


def tree(node_budget: int, depth: int, top_k: int, policy: str = "auto") -> TreeConfig:
    return TreeConfig(node_budget, depth, top_k, policy)


VARIANTS = [
    pytest.param("jakiro", {}, id="jakiro"),
    pytest.param("jakiro", {"num_experts": 4}, id="jakiro-4-experts"),
    pytest.param("jakiro", {"bias": False, "kv_heads": 1}, id="jakiro-no-bias-one-kv-head"),
    pytest.param("jakiro_star", {}, id="jakiro_star"),
    pytest.param("jakiro_star", {"num_experts": 3}, id="jakiro_star-3-experts"),
    pytest.param("dense", {}, id="dense"),
]


@pytest.mark.parametrize("policy", ["mixture", "decoupled"])
@pytest.mark.parametrize(("variant", "options"), VARIANTS)
def test_every_variant_and_policy(variant: str, options: dict[str, Any], policy: str, tmp_path: Path) -> None:
    check(Case(variant, tree(20, 4, 4, policy), head=options), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(tree(3, 1, 5), id="one-level"),
        pytest.param(tree(12, 2, 4), id="two-levels-from-one-forward"),
        pytest.param(tree(6, 6, 1), id="chain"),
        pytest.param(tree(63, 3, 5), id="budget-above-the-candidates"),
        pytest.param(tree(4, 4, 3), id="small-budget"),
        pytest.param(tree(40, 6, 3), id="deep"),
        pytest.param(tree(30, 3, 12), id="wide"),
    ],
)
@pytest.mark.parametrize("variant", ["jakiro", "jakiro_star", "dense"])
def test_every_shape(variant: str, config: TreeConfig, tmp_path: Path) -> None:
    result = check(Case(variant, config, rounds=((4, 1),)), tmp_path)
    forwards = config.depth - 1 if variant == "jakiro" and config.depth > 1 else config.depth
    assert result.drafter.num_forwards == forwards
    if config.node_budget == 63:
        # The first level's candidates, and the beam's on every later level.
        levels = config.top_k + (config.depth - 1) * config.top_k**2
        assert (result.trees.num_nodes == 1 + min(63, levels)).all()


def test_the_deepest_level_is_used(tmp_path: Path) -> None:
    """Otherwise the comparison would say nothing of the contrastive level."""
    result = check(Case(config=tree(30, 3, 4)), tmp_path)
    assert int(result.trees.depths.max()) == 3


@pytest.mark.parametrize(
    ("rounds", "drafting"),
    [
        pytest.param(((1,),), None, id="first-token-only"),
        pytest.param(((20, 1, 7, 2),), None, id="ragged"),
        pytest.param(((5, 9), (3, 1), (1, 4)), None, id="several-rounds"),
        pytest.param(((5, 9, 2), (3, 6, 1)), (2, 0), id="some-draft-in-another-order"),
        pytest.param(((5, 0, 2), (0, 6, 1), (2, 1, 0)), None, id="unscheduled-requests"),
    ],
)
@pytest.mark.parametrize("variant", ["jakiro", "jakiro_star"])
def test_contexts(
    variant: str, rounds: tuple[tuple[int, ...], ...], drafting: tuple[int, ...] | None, tmp_path: Path
) -> None:
    """The head sees the committed rows of all rounds, and each request its own."""
    check(Case(variant, tree(12, 3, 3), rounds=rounds, drafting=drafting), tmp_path)


def test_single_precision(tmp_path: Path) -> None:
    check(Case(dtype=torch.float32), tmp_path)


@pytest.mark.parametrize("few", [True, False], ids=["few-rows", "library"])
@pytest.mark.parametrize(("variant", "options"), VARIANTS)
def test_packed_weights(
    variant: str, options: dict[str, Any], few: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call where rows are few, and with a library's products where they are not."""
    calls = []
    for name in ("project", "complete"):
        original = getattr(forward.FewRows, name)
        monkeypatch.setattr(forward.FewRows, name, lambda *a, o=original, **k: calls.append(o) or o(*a, **k))
    monkeypatch.setitem(forward.MAX_ROWS, torch.float32, 64 if few else 0)
    with torch.inference_mode():
        check(Case(variant, head=options, dtype=torch.float32, packed=True), tmp_path)
    assert bool(calls) == (few and variant != "jakiro_star" and native.library() is not None)


def test_keys_and_values_of_all_committed_rows_are_written(tmp_path: Path) -> None:
    """Checked by number; their values are checked through the trees."""
    config, tensors = published_head("jakiro", hidden_size=HIDDEN)
    head = load_head(write_head(tmp_path, config, tensors, "safetensors"))
    head.prepare_positions(16)
    drafter = TreeDrafter(head, tree(4, 2, 2), torch.nn.Embedding(VOCAB, HIDDEN), torch.nn.Linear(HIDDEN, VOCAB))
    cache = DenseHeadCache()
    cache.begin([0, 0, 0, 1, 1], [])
    x = drafter.observe(RoundInput(torch.randn(5, HIDDEN), torch.arange(5), torch.tensor([0, 1, 2, 0, 1])), cache)
    assert x.shape == (5, HIDDEN)
    assert {request: len(keys) for request, keys in cache.keys.items()} == {0: 3, 1: 2}


# Negative controls: what must change the trees.


def test_without_gathering_parents_the_last_level_differs(tmp_path: Path) -> None:
    """The method's reference code hangs the contrastive candidates under the beam by position."""
    wrong = draft(Case(gather_parents=False), tmp_path)
    assert all(wrong.agrees()), "the switch does what the reference code does"
    right = draft_once(Case(), tmp_path / "right", 0)
    wrong = draft_once(Case(gather_parents=False), tmp_path / "wrong", 0)
    shown = [sorted(token_paths(result.trees, i)) for result in (right, wrong) for i in range(3)]
    assert shown[:3] != shown[3:]


def test_seeing_all_nodes_is_noticed(tmp_path: Path) -> None:
    """A scratch mask that lets siblings see each other gives other trees."""
    assert not all(draft(Case(everyone=True), tmp_path).agrees())


def test_a_wrong_context_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One committed row that is not written gives other trees."""
    write: Callable = DenseHeadCache.write

    def forget_the_first(cache: DenseHeadCache, keys: Tensor, values: Tensor) -> None:
        write(cache, keys, values)
        for store in (cache.keys, cache.values):
            for request in store:
                store[request] = store[request][1:] or store[request]

    monkeypatch.setattr(DenseHeadCache, "write", forget_the_first)
    assert not all(draft(Case(rounds=((3, 6),)), tmp_path).agrees())


def test_policies_differ(tmp_path: Path) -> None:
    """Otherwise the tests of the policies would be one test."""
    paths = [
        sorted(token_paths(draft_once(Case("jakiro_star", tree(20, 4, 4, policy)), tmp_path / policy, 0).trees, 2))
        for policy in ("mixture", "decoupled")
    ]
    assert paths[0] != paths[1]
