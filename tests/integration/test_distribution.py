"""The output distribution of a step as it is shipped: the runner's walk, vLLM's sampler, all rows at once.

First exactly: the runner's own walk, with a sampler that enumerates in float64 what vLLM would draw from, given the
logits and the metadata that the runner hands it. Then by a chi-squared test of a million draws with vLLM's sampler.
As in ``tests/tree/test_oracle.py``, compared is the joint distribution of a request's next L tokens: those that the
step emits, and plain sampling behind them. Q requests that are all alike, N nodes, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reference_target import STOP, Settings, State, Target, text_distribution
from reference_tree import depths_of, make_batch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors, MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from jakiro_vllm.integration import sampling
from jakiro_vllm.integration.runner import JakiroRunnerMixin, Step
from jakiro_vllm.integration.sampling import independent_of_path, sample_rows
from jakiro_vllm.tree.batch import TreeBatch
from jakiro_vllm.tree.walk import Accepted, walk_sampled

#: Sums of products of a few float64 probabilities.
FP64 = 1e-12
#: A million draws from the right distribution fall below it once in a million times.
BY_CHANCE = 1e-6
DRAWS = 1_000_000
#: Requests of one batch, to bound memory.
AT_ONCE = 100_000
#: Draws of seeded requests, whose generators vLLM asks one by one.
SEEDED_DRAWS = 100_000
#: What a biased rule differs by, at least.
VISIBLE = 0.01

VOCAB, DEPTH = 4, 3
#: Tokens under several parents, a node without children at every depth, one branch to the end.
PARENTS = [-1, 0, 0, 1, 1, 2, 3, 3, 5]
TOKENS = [3, 1, 2, 0, 1, 1, 2, 3, 0]

SETTINGS = {
    "temperature": Settings(1.5),
    "truncated": Settings(0.7, top_k=3, top_p=0.9),
    "repetition": Settings(1.0, repetition=1.7),
    "presence": Settings(0.3, presence=0.9),
    "frequency": Settings(1.0, frequency=0.8),
    "all penalties": Settings(0.7, 3, 0.9, repetition=0.6, presence=-0.5, frequency=1.1),
    "bad words": Settings(1.0, bad_words=((1,), (2, 2), (0, 0, 2))),
    "min tokens": Settings(1.0, min_tokens=4),
    "greedy": Settings(0.0, frequency=1.5),
}
#: What is drawn from: as flat as leaves texts enough to count.
DRAWN = {
    "temperature": Settings(1.5),
    "truncated": Settings(1.5, top_k=3, top_p=0.95),
    "all penalties": Settings(1.5, 3, 0.95, repetition=0.6, presence=-0.5, frequency=1.1),
}
#: What the runner must tell the sampler anew at every level.
ON_THE_WAY = ("repetition", "presence", "frequency", "all penalties", "bad words", "min tokens", "greedy")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Other threads would wait for each other, and draw in an order of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


#: Targets among which every setting finds one that it changes far down the tree.
TARGETS = [Target(VOCAB, DEPTH + 1, torch.Generator().manual_seed(seed), history=2) for seed in range(8, 12)]
#: What is drawn from.
TARGET = TARGETS[2]


def metadata(target: Target, settings: Settings, requests: int) -> SamplingMetadata:
    """What vLLM's runner would hand its sampler, where all requests ask for the same."""

    def every(value: float | int) -> Tensor:
        return torch.full((requests,), value)

    plain_penalties = (settings.repetition, settings.presence, settings.frequency) == (1, 0, 0)
    minimums = MinTokensLogitsProcessor(None, torch.device("cpu"), False)
    history = list(target.start.text)
    if settings.min_tokens > len(history):
        minimums.min_toks = {i: (settings.min_tokens, history, {STOP}, False) for i in range(requests)}
        minimums.logits_slice = torch.arange(requests, dtype=torch.int32), torch.full((requests,), STOP).int()
    return SamplingMetadata(
        temperature=every(settings.temperature) if settings.temperature else None,
        all_greedy=settings.temperature == 0,
        all_random=settings.temperature > 0,
        top_p=every(settings.top_p) if settings.top_p < 1 else None,
        top_k=every(settings.top_k).int() if settings.top_k else None,
        generators={},
        max_num_logprobs=None,
        no_penalties=plain_penalties,
        prompt_token_ids=torch.tensor([sorted(target.prompt)]).expand(requests, -1),
        frequency_penalties=every(settings.frequency),
        presence_penalties=every(settings.presence),
        repetition_penalties=every(settings.repetition),
        output_token_ids=[] if plain_penalties and not settings.bad_words else [history] * requests,
        allowed_token_ids_mask=None,
        bad_words_token_ids={
            i: [list(words) for words in settings.bad_words] for i in range(requests) if settings.bad_words
        },
        logitsprocs=LogitsProcessors([minimums]),
    )


def trees(requests: int) -> TreeBatch:
    return make_batch([(PARENTS, TOKENS)]).select(torch.zeros(requests, dtype=torch.int64))


def node_logits(target: Target) -> Tensor:
    """``[N, V]`` of the tree's nodes."""
    contexts: list[tuple[int, ...]] = [()]
    for parent, token in zip(PARENTS[1:], TOKENS[1:], strict=True):
        contexts.append((*contexts[parent], token))
    return torch.stack([target.logits[context] for context in contexts])


def walk_by_levels(sampler: Any, logits: Tensor, given: SamplingMetadata, requests: int) -> Accepted:
    """The runner's walk; all requests share the rows of one tree."""
    runner = JakiroRunnerMixin()
    runner.input_batch = SimpleNamespace(sampling_metadata=given)
    runner.drafter = SimpleNamespace(tree_config=SimpleNamespace(levels=DEPTH))
    runner.sampler = sampler
    runner.discard_request_mask = SimpleNamespace(np=np.zeros(requests, dtype=bool))
    zeros = torch.zeros(requests, dtype=torch.int64)
    every = torch.ones_like(zeros).bool()
    step = Step(trees(requests), zeros, zeros, zeros, zeros, every, True, every, False, zeros, zeros)
    return runner._walk_by_levels(step, logits)[0]


# Exactly


class Enumeration:
    """In vLLM's sampler's place: request t draws the tokens of text t, and their probabilities are noted."""

    def __init__(self, target: Target, settings: Settings) -> None:
        self.target = target
        self.settings = replace(settings, min_tokens=0)  # the metadata's processor tells
        self.noted: list[Tensor] = []

    def __call__(self, logits: Tensor, sampling_metadata: SamplingMetadata) -> SamplerOutput:
        given, drawn = sampling_metadata, self.target.texts[:, len(self.noted)]
        banned = torch.zeros(logits.shape)
        for processor in given.logitsprocs.all:
            banned = processor.apply(banned)
        states = [State(tuple(outputs)) for outputs in given.output_token_ids] or [State(())] * len(logits)
        table = self.target.processed(logits + banned, states, self.settings)
        self.noted.append(table.gather(1, drawn.unsqueeze(1)).squeeze(1))
        return SamplerOutput(sampled_token_ids=drawn.unsqueeze(1).int(), logprobs_tensors=None)


def exact_difference(target: Target, settings: Settings) -> float:
    """Between the runner's walk and the target, at most."""
    sampler, requests = Enumeration(target, settings), len(target.texts)
    accepted = walk_by_levels(sampler, node_logits(target), metadata(target, settings, requests), requests)
    noted = torch.stack(sampler.noted, dim=1).where(accepted.tokens >= 0, 1 / VOCAB)
    weights = noted.prod(dim=1) / VOCAB ** (target.length - noted.shape[1])
    remaining = target.remaining(target.plain(settings))
    found = text_distribution(target, accepted.tokens, weights, remaining)
    assert abs(float(found.sum()) - 1) < FP64
    return float((found - remaining[:, 0]).abs().max())


@pytest.mark.parametrize("name", SETTINGS)
def test_the_runners_walk_is_exact(name: str) -> None:
    assert max(exact_difference(target, SETTINGS[name]) for target in TARGETS) < FP64


@pytest.mark.parametrize("name", ON_THE_WAY)
def test_state_that_does_not_follow_the_path_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(JakiroRunnerMixin, "_metadata_at", lambda self, given, emitted, active: given)
    assert max(exact_difference(target, SETTINGS[name]) for target in TARGETS) > VISIBLE


# By drawing


def make_sampler(kind: str) -> Sampler:
    """vLLM's: ``cpu`` as on a CPU, ``native`` as on CUDA machines."""
    sampler = Sampler()
    chosen = {"cpu": sampler.topk_topp_sampler.forward_cpu, "native": sampler.topk_topp_sampler.forward_native}
    sampler.topk_topp_sampler.forward = chosen[kind]
    return sampler


def draw_by_levels(kind: str, settings: Settings, requests: int) -> Tensor:
    """``[Q, S]`` emitted tokens of the level walk, -1 behind their end."""
    given = metadata(TARGET, settings, requests)
    return walk_by_levels(make_sampler(kind), node_logits(TARGET).float(), given, requests).tokens


def draw_all_rows(settings: Settings, requests: int, generator: torch.Generator | None, depths: list[int]) -> Tensor:
    """``[Q, S]`` emitted tokens where every row is sampled, as on a GPU.

    Args:
        settings: of all requests.
        requests: Q.
        generator: of all requests, one after the other, which comes to the same as one for each; None for no seed.
        depths: of the nodes.
    """
    given, nodes = metadata(TARGET, settings, requests), len(PARENTS)
    assert independent_of_path(given)
    tokens, _ = sample_rows(
        make_sampler("native"),
        node_logits(TARGET).float().repeat(requests, 1),
        given,
        torch.arange(requests).repeat_interleave(nodes),
        torch.tensor(depths).repeat(requests),
        {} if generator is None else dict.fromkeys(range(requests), generator),
        [nodes] * requests,
        DEPTH + 1,
    )
    return walk_sampled(trees(requests), tokens.view(requests, nodes), DEPTH).tokens


def continued(emitted: Tensor, plain: Tensor) -> Tensor:
    """``[Q]`` the text of each request: its emitted tokens, then plain samples."""
    text = torch.zeros(len(emitted), dtype=torch.int64)
    for step in range(TARGET.length):
        contexts = sum(VOCAB**n for n in range(step))  # of fewer tokens
        token = plain[contexts + text].multinomial(1).squeeze(1)
        if step < emitted.shape[1]:
            token = emitted[:, step].where(emitted[:, step] >= 0, token)
        text = text * VOCAB + token
    return text


def p_value(settings: Settings, draw: Callable[[int], Tensor], draws: int, at_once: int) -> float:
    """Probability of a chi-squared statistic as large as that of the draws; 0 where the impossible was drawn."""
    torch.manual_seed(7)
    plain = TARGET.plain(settings)
    expected = TARGET.remaining(plain)[:, 0] * draws
    counts = torch.zeros_like(expected)
    for _ in range(draws // at_once):
        counts += continued(draw(at_once), plain).bincount(minlength=len(expected))
    assert int(counts.sum()) == draws
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5  # taken together
    expected = torch.cat([expected[~rare], expected[rare].sum().clamp(min=1).view(1)])
    counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(expected) - 1, dtype=torch.float64)
    assert freedom > 20
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


@pytest.fixture
def one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of tiny vocabularies need no bound of memory, and a thousand at once take their time."""
    monkeypatch.setattr(sampling, "ROWS_AT_ONCE", AT_ONCE * len(PARENTS))


@pytest.mark.parametrize(("name", "kind"), [("truncated", "cpu"), ("truncated", "native"), ("all penalties", "native")])
def test_a_million_walks(name: str, kind: str) -> None:
    settings = DRAWN[name]
    assert p_value(settings, partial(draw_by_levels, kind, settings), DRAWS, AT_ONCE) > BY_CHANCE


@pytest.mark.usefixtures("one_batch")
@pytest.mark.parametrize("name", ["temperature", "truncated"])
def test_a_million_walks_over_sampled_rows(name: str) -> None:
    settings = DRAWN[name]
    draw = partial(draw_all_rows, settings, generator=None, depths=depths_of(PARENTS))
    assert p_value(settings, draw, DRAWS, AT_ONCE) > BY_CHANCE


@pytest.mark.usefixtures("one_batch")
def test_walks_over_sampled_rows_of_seeded_requests() -> None:
    settings = DRAWN["temperature"]
    draw = partial(draw_all_rows, settings, generator=torch.Generator().manual_seed(1), depths=depths_of(PARENTS))
    assert p_value(settings, draw, SEEDED_DRAWS, SEEDED_DRAWS // 10) > BY_CHANCE


@pytest.mark.usefixtures("one_batch")
def test_depths_that_share_a_draw_are_noticed() -> None:
    settings, every = DRAWN["temperature"], [0] * len(PARENTS)
    draw = partial(draw_all_rows, settings, generator=torch.Generator().manual_seed(1), depths=every)
    assert p_value(settings, draw, SEEDED_DRAWS // 10, SEEDED_DRAWS // 10) < BY_CHANCE


@pytest.mark.parametrize("changed", [{"temperature": 1.52}, {"top_k": 3}, {"top_p": 0.95}], ids=str)
def test_a_slightly_different_target_is_noticed(changed: dict[str, float]) -> None:
    """What a million draws can tell apart."""
    settings = DRAWN["temperature"]
    draw = partial(draw_by_levels, "cpu", replace(settings, **changed))
    assert p_value(settings, draw, DRAWS, AT_ONCE) < BY_CHANCE


def test_penalties_that_do_not_follow_the_path_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = DRAWN["all penalties"]
    monkeypatch.setattr(JakiroRunnerMixin, "_metadata_at", lambda self, given, emitted, active: given)
    draw = partial(draw_by_levels, "cpu", settings)
    assert p_value(settings, draw, SEEDED_DRAWS, SEEDED_DRAWS) < BY_CHANCE
