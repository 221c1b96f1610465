"""Sampling along a path: what processors must know there, and all rows of a step at once, without a host in between.

A request's randomness belongs to output positions: the token at depth d comes from the d-th draw after those
already used, whatever node it is sampled at. So all nodes of a depth share one draw, and a generator ends up having
drawn exactly once per emitted token, as in plain decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessors, MinTokensLogitsProcessor
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


def processors_after(processors: LogitsProcessors, emitted: int) -> LogitsProcessors:
    """Logits processors for the token after ``emitted`` others of the same step.

    A minimum length ends at an output position, and vLLM's processor knows only of tokens of earlier steps. So it gets
    a minimum that is closer by what was emitted since, and drops the requests that have reached it.
    """
    return LogitsProcessors(_closer(p, emitted) for p in processors.all)


def _closer(processor: Any, emitted: int) -> Any:
    if not isinstance(processor, MinTokensLogitsProcessor) or not processor.min_toks:
        return processor
    closer = copy(processor)
    closer.min_toks = {i: (least - emitted, *rest) for i, (least, *rest) in processor.min_toks.items()}
    closer.update_state(None)
    return closer


def random_sampling(requests: int, logits: Tensor) -> SamplingMetadata:
    """Metadata of requests that sample with top-k and top-p: what takes the most memory.

    Args:
        requests: how many.
        logits: ``[L, V]``, for the device and V.
    """

    def every(value: float | int) -> Tensor:
        return torch.full((requests,), value, device=logits.device)

    return SamplingMetadata(
        temperature=every(0.5),
        all_greedy=False,
        all_random=False,
        top_p=every(0.9),
        top_k=every(logits.shape[1] - 1),
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=every(0.0),
        presence_penalties=every(0.0),
        repetition_penalties=every(1.0),
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


@dataclass(frozen=True)
class Draws:
    """What a request's generator drew in one step.

    Attributes:
        generator: the request's own.
        states: of the generator after 0, 1, ... draws.
    """

    generator: torch.Generator
    states: Sequence[Tensor]

    def keep(self, count: int) -> None:
        """Rewinds the generator to ``count`` draws."""
        self.generator.set_state(self.states[count])


def draw(generator: torch.Generator, count: int, like: Tensor, fp64: bool) -> tuple[Tensor, Draws]:
    """Draws for ``count`` depths, each exactly as vLLM's sampler draws for one token.

    Args:
        generator: of the request.
        count: S.
        like: ``[*, V] float32`` probabilities.
        fp64: whether vLLM was told to use double precision here.

    Returns:
        ``([S, V], draws)``: exponential noise, one row per depth.
    """
    noise = empty_exponential_noise_like(like[:1].expand(count, -1), fp64)
    states = [generator.get_state()]
    for row in noise:
        row.exponential_(generator=generator)
        states.append(generator.get_state())
    return noise, Draws(generator, states)


def sample_rows(
    sampler: Any,
    logits: Tensor,
    metadata: SamplingMetadata,
    requests: Tensor,
    depths: Tensor,
    generators: Mapping[int, torch.Generator],
    counts: Sequence[int],
    levels: int,
) -> tuple[Tensor, dict[int, Draws]]:
    """Samples the target's next token after every row, as vLLM's sampler would after that row alone.

    L rows in all, those of a request side by side and in the order of the requests. Requests are taken together up
    to ``ROWS_AT_ONCE`` rows: probabilities of all rows of a large step would take gigabytes.

    Args:
        sampler: vLLM's.
        logits: ``[L, V]``, overwritten.
        metadata: of the requests, ``independent_of_path``.
        requests: ``[L] int64`` the request of each row.
        depths: ``[L] int64`` depth of each row, below ``levels``.
        generators: of the seeded requests whose sample counts, by request.
        counts: rows of each request, L in sum.
        levels: draws per seeded request.

    Returns:
        ``([L] int64, draws)``: tokens, and what each seeded request drew, to be rewound to what it emitted.
    """
    tokens, draws = torch.empty_like(requests), dict[int, Draws]()
    first = 0
    for batch in _batches(counts):
        spans, end = {}, first
        for request in batch:
            spans[request] = end - first, end - first + counts[request]
            end += counts[request]
        part, first = slice(first, end), end
        rows = replace(
            metadata,
            temperature=_at(metadata.temperature, requests[part]),
            top_p=_at(metadata.top_p, requests[part]),
            top_k=_at(metadata.top_k, requests[part]),
            generators={},
            output_token_ids=[],
            spec_token_ids=None,
        )
        seeded = {} if metadata.all_greedy else {i: generators[i] for i in batch if i in generators}
        if not seeded:
            tokens[part] = sampler(logits=logits[part], sampling_metadata=rows).sampled_token_ids.squeeze(1).long()
            continue
        probs, greedy = _probabilities(sampler, logits[part], rows)
        fp64 = sampler.topk_topp_sampler.use_fp64_gumbel
        noise = empty_exponential_noise_like(probs, fp64).exponential_()
        for request, generator in seeded.items():
            own, draws[request] = draw(generator, levels, probs, fp64)
            mine = slice(*spans[request])
            noise[mine] = own[depths[part][mine]]
        sampled = sample_with_exponential_noise(probs, noise)
        tokens[part] = sampled if greedy is None else greedy.where(rows.temperature < GREEDY_BELOW, sampled)
    return tokens, draws


def _batches(counts: Sequence[int]) -> Iterator[range]:
    """Consecutive requests of at most ``ROWS_AT_ONCE`` rows together, or one of more."""
    first, rows = 0, 0
    for i, count in enumerate(counts):
        if i > first and rows + count > ROWS_AT_ONCE:
            yield range(first, i)
            first, rows = i, 0
        rows += count
    if counts:
        yield range(first, len(counts))


def _probabilities(sampler: Any, logits: Tensor, metadata: SamplingMetadata) -> tuple[Tensor, Tensor | None]:
    """As in vLLM's sampler: ``[L, V] float32`` to draw from, and ``[L] int64`` greedy tokens unless all rows draw."""
    logits = logits.float()
    greedy = None if metadata.all_random else sampler.greedy_sample(logits).long()
    logits = sampler.apply_temperature(logits, metadata.temperature, metadata.all_random)
    logits = apply_top_k_top_p(logits, metadata.top_k, metadata.top_p)
    return logits.softmax(dim=-1, dtype=torch.float32), greedy


#: Rows whose probabilities are computed together: half a gigabyte per copy with 128k tokens in float32.
ROWS_AT_ONCE = 1024
#: vLLM's bound below which a temperature means greedy.
GREEDY_BELOW = 1e-5


def _at(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows]
