"""Sampling all nodes at once gives what sampling along the path gives, and leaves the generators where that does."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reference_tree import make_batch, random_parents
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from jakiro_vllm.config import MAX_NODES
from jakiro_vllm.integration import sampling
from jakiro_vllm.integration.cpu_runner import JakiroCPUModelRunner
from jakiro_vllm.integration.runner import Step
from jakiro_vllm.integration.sampling import independent_of_path, random_sampling, sample_rows
from jakiro_vllm.tree.walk import walk_highest, walk_sampled

VOCAB = 12
DEPTH = 5


@pytest.fixture
def sampler() -> Sampler:
    """vLLM's, with the noise of CUDA machines."""
    sampler = Sampler()
    sampler.topk_topp_sampler.forward = sampler.topk_topp_sampler.forward_native
    return sampler


def metadata(temperatures: list[float], generators: dict[int, torch.Generator], **changes: Any) -> SamplingMetadata:
    count = len(temperatures)
    greedy = [t == 0 for t in temperatures]
    zeros = torch.zeros(count)
    values: dict[str, Any] = {
        "temperature": None if all(greedy) else torch.tensor(temperatures),
        "all_greedy": all(greedy),
        "all_random": not any(greedy),
        "top_p": torch.linspace(0.7, 1.0, count),
        "top_k": torch.arange(VOCAB - count, VOCAB, dtype=torch.int32),
        "generators": generators,
        "max_num_logprobs": None,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": zeros,
        "presence_penalties": zeros,
        "repetition_penalties": zeros,
        "output_token_ids": [],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
    }
    return SamplingMetadata(**values | changes)


def logits_after(path: list[int], request: int) -> torch.Tensor:
    """Any function of the tokens so far: what a target is."""
    generator = torch.Generator().manual_seed(hash((request, *path)) % 2**31)
    return torch.randn(VOCAB, generator=generator) * 2


def plain(sampler: Sampler, temperature: float, request: int, generator: Any, count: int, shared: Any) -> list[int]:
    """One token after the other, as plain decoding does."""
    tokens: list[int] = []
    for _ in range(count):
        only = metadata([temperature], {0: generator}, top_p=shared.top_p[request : request + 1])
        only.top_k = shared.top_k[request : request + 1]
        output = sampler(logits=logits_after(tokens, request).unsqueeze(0), sampling_metadata=only)
        tokens.append(int(output.sampled_token_ids))
    return tokens


@pytest.mark.parametrize(
    "temperatures",
    [
        pytest.param([0.0] * 4, id="greedy"),
        pytest.param([0.9, 1.3, 0.5, 1.0], id="random"),
        pytest.param([0.0, 1.2, 0.0, 0.7], id="mixed"),
    ],
)
@pytest.mark.parametrize("rows_at_once", [1, 25, 1024])
@pytest.mark.parametrize("seed", range(6))
def test_a_tree_gives_the_tokens_of_plain_decoding(
    monkeypatch: pytest.MonkeyPatch, sampler: Sampler, temperatures: list[float], seed: int, rows_at_once: int
) -> None:
    monkeypatch.setattr(sampling, "ROWS_AT_ONCE", rows_at_once)
    rng = random.Random(seed)
    shared = metadata(temperatures, {})
    references = [torch.Generator().manual_seed(100 + i) for i in range(4)]
    expected = [plain(sampler, t, i, references[i], DEPTH + 1, shared) for i, t in enumerate(temperatures)]

    trees, spans, rows, requests, depths = [], [], [], [], []
    for request in range(4):
        parents = random_parents("random", rng.randint(1, 20), rng)
        tokens, paths = [0], [[]]
        for parent in parents[1:]:
            # The right continuation often enough that paths are long.
            right = expected[request][len(paths[parent])] if len(paths[parent]) < DEPTH else 0
            wrong = rng.randrange(VOCAB)
            token = right if rng.random() < 0.7 else wrong
            tokens.append(token)
            paths.append([*paths[parent], token])
        trees.append((parents, tokens))
        spans.append((len(rows), len(rows) + len(parents)))
        rows += [logits_after(path, request) for path in paths]
        requests += [request] * len(parents)
        depths += [min(len(path), DEPTH) for path in paths]
    batch = make_batch(trees, width=20)
    # vLLM gives a greedy request no generator.
    generators = {i: torch.Generator().manual_seed(100 + i) for i in range(4) if temperatures[i]}
    found, draws = sample_rows(
        sampler,
        torch.stack(rows),
        metadata(temperatures, dict(generators)),
        torch.tensor(requests),
        torch.tensor(depths),
        generators,
        [end - first for first, end in spans],
        DEPTH + 1,
    )
    sampled = torch.zeros(4, 20, dtype=torch.int64)
    for request, (first, end) in enumerate(spans):
        sampled[request, : end - first] = found[first:end]
    accepted = walk_sampled(batch, sampled, DEPTH)
    for request in range(4):
        count = int(accepted.num_accepted[request]) + 1
        assert accepted.tokens[request, :count].tolist() == expected[request][:count]
        if request in draws:
            draws[request].keep(count)
            again = torch.Generator().manual_seed(100 + request)
            plain(sampler, temperatures[request], request, again, count, shared)
            assert torch.equal(generators[request].get_state(), again.get_state())
    assert int(accepted.num_accepted.max()) >= 1


def test_nodes_of_one_depth_share_a_draw(sampler: Sampler) -> None:
    """Else a token would depend on how many nodes came before its own."""
    logits = torch.zeros(VOCAB).expand(6, VOCAB).clone()
    depths = torch.tensor([0, 1, 1, 2, 1, 2])
    tokens, _ = sample_rows(
        sampler,
        logits,
        metadata([1.0], {}, top_p=None, top_k=None),
        torch.zeros(6, dtype=torch.int64),
        depths,
        {0: torch.Generator().manual_seed(3)},
        [6],
        3,
    )
    by_depth = [tokens[depths == d].unique().numel() for d in range(3)]
    assert by_depth == [1, 1, 1]
    assert tokens.unique().numel() > 1


@pytest.mark.parametrize("counts", [[], [3], [9], [4, 4, 4], [1, 8, 1, 7, 2], [8, 9, 8]])
def test_whole_requests_are_taken_together(monkeypatch: pytest.MonkeyPatch, counts: list[int]) -> None:
    monkeypatch.setattr(sampling, "ROWS_AT_ONCE", 8)
    batches = list(sampling._batches(counts))
    assert [i for batch in batches for i in batch] == list(range(len(counts)))
    rows = [sum(counts[i] for i in batch) for batch in batches]
    assert all(count <= 8 or len(batch) == 1 for count, batch in zip(rows, batches, strict=True))
    assert all(a + counts[b[0]] > 8 for a, b in zip(rows, batches[1:], strict=False)), "could have been joined"


def test_profiling_takes_the_way_of_seeded_requests(sampler: Sampler) -> None:
    logits = torch.randn(6, VOCAB)
    generators = {i: torch.Generator().manual_seed(i) for i in range(2)}
    requests, depths = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2] * 2)
    batch = random_sampling(2, logits)
    assert independent_of_path(batch)
    _, draws = sample_rows(sampler, logits, batch, requests, depths, generators, [3, 3], 3)
    assert draws.keys() == {0, 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"no_penalties": False},
        {"bad_words_token_ids": {0: [[1]]}},
        {"allowed_token_ids_mask": torch.ones(1, VOCAB, dtype=torch.bool)},
        {"max_num_logprobs": 0},
        {"logprob_token_ids": {0: [1]}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_depends_on_the_path_is_sampled_by_levels(changes: dict[str, Any]) -> None:
    assert independent_of_path(metadata([1.0], {}))
    assert not independent_of_path(metadata([1.0], {}, **changes))


def test_a_processor_with_requests_is_not_idle() -> None:
    class MinTokens:
        min_toks: dict[int, Any]

        def is_argmax_invariant(self) -> bool:
            return False

    processor = MinTokens()
    processor.min_toks = {}
    assert independent_of_path(metadata([1.0], {}, logitsprocs=LogitsProcessors([processor])))
    processor.min_toks = {0: (3, [], set(), False)}
    assert not independent_of_path(metadata([1.0], {}, logitsprocs=LogitsProcessors([processor])))
    del processor.min_toks
    assert not independent_of_path(metadata([1.0], {}, logitsprocs=LogitsProcessors([processor])))


# All at once on a CPU.


def coarse_logits(rng: random.Random, rows: int, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
    """So few different ones that the highest is seldom alone, and sometimes a NaN."""
    values = (-1.0, 0.0, -0.0, 1.0, 1.0, float("-inf"), float("inf"))
    logits = torch.tensor(
        [[rng.choice(values[: rng.choice((3, 5, 7))]) for _ in range(vocabulary)] for _ in range(rows)]
    )
    for row in rng.sample(range(rows), rows // 8):
        logits[row, rng.randrange(vocabulary)] = float("nan")
    return logits.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocabulary", [1, 7, 12, 300, 4099])
def test_the_highest_logits_are_those_of_the_sampler(
    vocabulary: int, dtype: torch.dtype, rng: random.Random, sampler: Sampler
) -> None:
    """vLLM has an operator of its own for it on a CPU: ties and what is no number must come out as there."""
    rows = 40
    logits = coarse_logits(rng, rows, vocabulary, dtype)
    wanted = sampler(logits=logits, sampling_metadata=metadata([0.0] * 2, {})).sampled_token_ids.squeeze(1)
    alone = make_batch([([-1], [0])] * rows)
    assert walk_highest(alone, logits, torch.arange(rows), 0).tokens.squeeze(1).tolist() == wanted.tolist()


class Runner(JakiroCPUModelRunner):
    """As much of the runner as a walk needs."""

    def __init__(self, given: SamplingMetadata, sampler: Any) -> None:
        requests = len(given.top_p) if given.top_p is not None else 0
        self.input_batch = SimpleNamespace(sampling_metadata=given)
        self.drafter = SimpleNamespace(tree_config=SimpleNamespace(levels=DEPTH))
        self.sampler = sampler
        self.discard_request_mask = SimpleNamespace(np=np.zeros(requests, dtype=bool))


def step_of(trees: Any, starts: torch.Tensor) -> Step:
    none, has_tree = torch.zeros_like(starts), trees.num_nodes > 1
    any_tree = bool(has_tree.any())
    words = none if any_tree else None
    return Step(trees, none, none, none, none, has_tree, any_tree, has_tree, False, none, starts, ancestors=words)


def test_a_greedy_walk_is_that_of_the_levels(rng: random.Random, sampler: Sampler) -> None:
    for _ in range(20):
        parents = [random_parents("random", rng.randint(1, 9), rng) for _ in range(3)] + [[-1, 0]]
        trees = make_batch([(p, [rng.randrange(3) for _ in p]) for p in parents])
        ends = trees.num_nodes.cumsum(0)
        logits = coarse_logits(rng, int(ends[-1]), 3, torch.float32)
        step = step_of(trees, ends - trees.num_nodes)
        given = metadata([0.0] * 4, {}, top_k=None, top_p=torch.ones(4))
        found, logprobs = Runner(given, None)._verify(step, logits.clone())
        wanted, _ = Runner(given, sampler)._walk_by_levels(step, logits.clone())
        assert logprobs is None
        for name in ("path", "tokens", "num_accepted"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(metadata([0.0, 0.9], {}), id="random"),
        pytest.param(metadata([0.0, 0.0], {}, no_penalties=False), id="penalties"),
        pytest.param(metadata([0.0, 0.0], {}, max_num_logprobs=1), id="logprobs"),
        pytest.param(metadata([0.0, 0.0], {}, bad_words_token_ids={0: [[1]]}), id="bad-words"),
    ],
)
def test_other_batches_are_walked_by_levels(given: SamplingMetadata, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "_walk_by_levels", lambda self, step, logits: "by levels")
    step = SimpleNamespace(any_tree=True)
    assert Runner(given, None)._verify(step, None) == "by levels"


@pytest.mark.parametrize("settings", [{}, {"max_num_logprobs": 2}], ids=["tokens", "logprobs"])
@pytest.mark.parametrize("temperatures", [[0.0, 0.0, 0.0], [0.7, 0.0, 1.3]], ids=["greedy", "mixed"])
def test_a_step_without_trees_is_that_of_the_levels(
    temperatures: list[float], settings: dict[str, Any], rng: random.Random, sampler: Sampler
) -> None:
    """A row of logits between two requests' roots belongs to drafts that hang under no last token."""
    logits = torch.tensor([[rng.gauss(0, 1) for _ in range(VOCAB)] for _ in range(4)])
    step = step_of(make_batch([([-1], [0])] * 3), torch.tensor([0, 1, 3]))

    def runner() -> Runner:
        generators = {i: torch.Generator().manual_seed(i) for i in range(3) if temperatures[i]}
        return Runner(metadata(temperatures, generators, **settings), sampler)

    found, wanted = runner()._verify(step, logits.clone()), runner()._walk_by_levels(step, logits.clone())
    for name in ("path", "tokens", "num_accepted"):
        assert torch.equal(getattr(found[0], name), getattr(wanted[0], name)), name
    assert (found[1] is None) == (not settings)
    for one, two in zip((found[1] or ())[:3], (wanted[1] or ())[:3], strict=True):
        assert torch.equal(one, two)


# Room


def test_drafts_beyond_a_requests_last_token_are_not_wanted() -> None:
    """Of four tokens that are left, a step without drafts emits one."""
    runner = JakiroCPUModelRunner.__new__(JakiroCPUModelRunner)
    states = {"many": (None, 3), "four": (9, 5), "one": (9, 8)}
    runner.requests = {
        name: SimpleNamespace(sampling_params=SimpleNamespace(max_tokens=limit), output_token_ids=[0] * produced)
        for name, (limit, produced) in states.items()
    }
    assert runner._room(list(states)).tolist() == [MAX_NODES, 3, 0]
