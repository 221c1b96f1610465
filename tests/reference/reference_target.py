"""A target with a tiny vocabulary: what it says after every text there is, processed as a request asks, in float64.

The processors are vLLM's, in vLLM's order, written once more. Nothing is sampled: what is asked about is enumerated.
V vocabulary, L tokens of a text, T = V**L texts, C contexts (all texts of fewer than L tokens).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

#: The token that a minimum length bans.
STOP = 0


@dataclass(frozen=True)
class Settings:
    """What a request asks for; the defaults change nothing.

    Attributes:
        top_k: 0 for all tokens.
        repetition: tokens of the prompt and the text count.
        presence: tokens of the text count, once.
        frequency: tokens of the text count, every time.
        grammar: whether an automaton says which tokens may come next.
        bad_words: sequences of tokens that must not be completed.
        min_tokens: before which ``STOP`` must not come.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    grammar: bool = False
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0


@dataclass(frozen=True)
class State:
    """What processors need to know of the text so far.

    Attributes:
        text: its tokens, those of earlier steps too.
        grammar: state of the automaton.
    """

    text: tuple[int, ...]
    grammar: int = 0


class Target:
    """Arbitrary logits after every context, a prompt, and an automaton.

    Attributes:
        vocab: V.
        length: L.
        logits: after each context.
        prompt: tokens that count for the repetition penalty.
        start: the state before every text, after as many tokens of earlier steps as ``history``.
        allowed: per state of the automaton, ``[states, V] bool``.
        follows: the next state, per state and token.
    """

    def __init__(self, vocab: int, length: int, generator: torch.Generator, history: int = 0) -> None:
        def integers(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator)

        self.vocab, self.length = vocab, length
        lengths = range(length)
        self.contexts = [c for n in lengths for c in itertools.product(range(vocab), repeat=n)]
        drawn = 2 * torch.randn(len(self.contexts), vocab, generator=generator, dtype=torch.float64)
        self.logits = dict(zip(self.contexts, drawn, strict=True))
        self.prompt = set(integers(vocab, 2).tolist())
        self.start = State(tuple(integers(vocab, history).tolist()))
        self.allowed = torch.rand(3, vocab, generator=generator) < 0.6
        self.allowed[torch.arange(3), integers(vocab, 3)] = True  # a grammar never ends in nothing
        self.follows = integers(3, 3, vocab).tolist()

    @cached_property
    def texts(self) -> Tensor:
        """``[T, L] int64``."""
        return torch.tensor(list(itertools.product(range(self.vocab), repeat=self.length)))

    @cached_property
    def context_of(self) -> Tensor:
        """``[T, L] int64`` the context of each token of each text."""
        index = {context: i for i, context in enumerate(self.contexts)}
        return torch.tensor([[index[tuple(text[:n])] for n in range(self.length)] for text in self.texts.tolist()])

    def advance(self, state: State, token: int) -> State:
        """The state after one more token."""
        return State((*state.text, token), self.follows[state.grammar][token])

    def state_after(self, text: Sequence[int]) -> State:
        """The state after a text, from its beginning."""
        state = self.start
        for token in text:
            state = self.advance(state, token)
        return state

    def processed(self, logits: Tensor, states: Sequence[State], settings: Settings) -> Tensor:
        """Distributions ``[R, V]`` that are sampled from.

        Args:
            logits: ``[R, V]``.
            states: of each row.
            settings: of all of them.
        """
        logits = logits.clone()
        if settings.grammar:
            logits[~self.allowed[[state.grammar for state in states]]] = -torch.inf
        for row, state in zip(logits, states, strict=True):
            for *start, last in settings.bad_words:
                if state.text[len(state.text) - len(start) :] == tuple(start):
                    row[last] = -torch.inf
            if len(state.text) < settings.min_tokens:
                row[STOP] = -torch.inf
        if replace(settings, repetition=1.0, presence=0.0, frequency=0.0) != settings:
            counts = torch.tensor([[state.text.count(t) for t in range(self.vocab)] for state in states])
            seen = (counts > 0) | torch.tensor([t in self.prompt for t in range(self.vocab)])
            scale = torch.where(logits > 0, 1 / settings.repetition, settings.repetition)
            logits = torch.where(seen, logits * scale, logits)
            logits = logits - settings.frequency * counts - settings.presence * (counts > 0)
        if settings.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(dim=1), self.vocab).double()
        return truncated(logits / settings.temperature, settings.top_k, settings.top_p).softmax(dim=1)

    def plain(self, settings: Settings) -> Tensor:
        """``[C, V]`` the distribution after each context, as plain decoding has it."""
        states = [self.state_after(context) for context in self.contexts]
        return self.processed(torch.stack(list(self.logits.values())), states, settings)

    def remaining(self, plain: Tensor) -> Tensor:
        """``[T, L + 1]`` probability that a text goes on as it does, after 0, 1, ... of its tokens.

        Args:
            plain: ``[C, V]``.
        """
        steps = plain[self.context_of, self.texts]
        tails = steps.flip(1).cumprod(dim=1).flip(1)
        return torch.cat([tails, torch.ones(len(tails), 1, dtype=tails.dtype)], dim=1)


def truncated(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits ``[R, V]`` with what top-k and then top-p leave out at minus infinity."""
    if top_k:
        least = logits.topk(min(top_k, logits.shape[1]), dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=1)
        out = ordered.softmax(dim=1).cumsum(dim=1) <= 1 - top_p
        out[:, -1] = False  # at least one
        logits = logits.scatter(1, index, ordered.masked_fill(out, -torch.inf))
    return logits


def text_distribution(target: Target, emitted: Tensor, weights: Tensor, remaining: Tensor) -> Tensor:
    """``[T]`` distribution of the text when one step emits what it may emit, and plain sampling goes on.

    Args:
        target: the target.
        emitted: ``[R, S]`` outcomes of the step, -1 behind their end.
        weights: ``[R]`` their probabilities.
        remaining: ``[T, L + 1]``, see ``Target.remaining``.
    """
    counts = (emitted >= 0).sum(dim=1)
    numbers = target.vocab ** torch.arange(target.length - 1, -1, -1)
    first = (emitted.clamp(min=0) * numbers[: emitted.shape[1]]).sum(dim=1)  # the first text that begins so
    result = torch.zeros(len(target.texts), dtype=torch.float64)
    for count in counts.unique().tolist():
        # All texts that begin so lie side by side.
        beginnings = torch.zeros_like(result).index_add_(0, first[counts == count], weights[counts == count])
        texts = target.vocab ** (target.length - count)
        result += beginnings[::texts].repeat_interleave(texts) * remaining[:, count]
    return result
