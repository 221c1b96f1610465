"""Sampling all rows of a step at once, so that the walk needs no host between its levels.

A request's randomness belongs to output positions: the token at depth d comes from the d-th draw after those
already used, whatever node it is sampled at. So all nodes of a depth share one draw, and a generator ends up having
drawn exactly once per emitted token, as in plain decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import (
    apply_top_k_top_p,
    empty_exponential_noise_like,
    sample_with_exponential_noise,
)


def independent_of_path(metadata: SamplingMetadata) -> bool:
    """Whether every request's next distribution follows from its logits alone.

    Penalties, banned and allowed tokens, minimum lengths and thinking budgets depend on the tokens before it or on
    the request's row in the batch; log-probabilities are wanted of the accepted rows only.
    """
    holder = metadata.thinking_budget_state_holder
    return (
        metadata.no_penalties
        and not metadata.bad_words_token_ids
        and metadata.allowed_token_ids_mask is None
        and metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and (holder is None or not holder.has_tracked_requests())
        and all(_idle(p) for p in (*metadata.logitsprocs.non_argmax_invariant, *metadata.logitsprocs.argmax_invariant))
    )


def _idle(processor: Any) -> bool:
    """Whether one of vLLM's own processors has no request to serve; another's is never taken to be idle."""
    for name in ("min_toks", "biases", "min_p_count"):
        if hasattr(processor, name):
            return not getattr(processor, name)
    return False


@dataclass(frozen=True)
class Draws:
    """What a request's generator drew for one step.

    Attributes:
        generator: the request's own.
        noise: ``[S, V]`` exponential noise, one row per depth.
        states: of the generator after 0, 1, ... draws.
    """

    generator: torch.Generator
    noise: Tensor
    states: Sequence[Tensor]

    def keep(self, count: int) -> None:
        """Rewinds the generator to ``count`` draws."""
        self.generator.set_state(self.states[count])


def draw(generator: torch.Generator, count: int, like: Tensor, fp64: bool) -> Draws:
    """Draws for ``count`` depths, each exactly as vLLM's sampler draws for one token.

    Args:
        generator: of the request.
        count: S.
        like: ``[*, V] float32`` probabilities.
        fp64: whether vLLM was told to use double precision here.
    """
    noise = empty_exponential_noise_like(like[:1].expand(count, -1), fp64)
    states = [generator.get_state()]
    for row in noise:
        row.exponential_(generator=generator)
        states.append(generator.get_state())
    return Draws(generator, noise, states)


def sample_rows(
    sampler: Any,
    logits: Tensor,
    metadata: SamplingMetadata,
    requests: Tensor,
    depths: Tensor,
    generators: Mapping[int, torch.Generator],
    spans: Sequence[tuple[int, int]],
    levels: int,
) -> tuple[Tensor, dict[int, Draws]]:
    """Samples the target's next token after every row, as vLLM's sampler would after that row alone.

    L rows in all, those of a request side by side.

    Args:
        sampler: vLLM's.
        logits: ``[L, V]``, overwritten.
        metadata: of the requests, ``independent_of_path``.
        requests: ``[L] int64`` the request of each row.
        depths: ``[L] int64`` depth of each row, below ``levels``.
        generators: of the seeded requests whose sample counts, by request.
        spans: first and one past the last row of each request.
        levels: draws per seeded request.

    Returns:
        ``([L] int64, draws)``: tokens, and what each seeded request drew, to be rewound to what it emitted.
    """
    rows = replace(
        metadata,
        temperature=_at(metadata.temperature, requests),
        top_p=_at(metadata.top_p, requests),
        top_k=_at(metadata.top_k, requests),
        generators={},
        output_token_ids=[],
        spec_token_ids=None,
    )
    if not generators or metadata.all_greedy:
        output = sampler(logits=logits, sampling_metadata=rows)
        return output.sampled_token_ids.squeeze(1).long(), {}

    logits = logits.float()
    greedy = None if rows.all_random else sampler.greedy_sample(logits)
    logits = sampler.apply_temperature(logits, rows.temperature, rows.all_random)
    probs = apply_top_k_top_p(logits, rows.top_k, rows.top_p).softmax(dim=-1, dtype=torch.float32)
    fp64 = sampler.topk_topp_sampler.use_fp64_gumbel
    noise = empty_exponential_noise_like(probs, fp64).exponential_()
    draws = {}
    for request, generator in generators.items():
        draws[request] = draw(generator, levels, probs, fp64)
        first, end = spans[request]
        noise[first:end] = draws[request].noise[depths[first:end]]
    tokens = sample_with_exponential_noise(probs, noise)
    if greedy is not None:
        tokens = greedy.long().where(rows.temperature < GREEDY_BELOW, tokens)
    return tokens, draws


#: vLLM's bound below which a temperature means greedy.
GREEDY_BELOW = 1e-5


def _at(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows]
