"""Runs engines, one after the other, in a process of their own: ``engine_session.py REQUEST RESPONSE``.

The request is a list of ``{"engine": arguments, "phases": [...]}``; the response has a list of answers for each.
A phase may name answers that are there by then, as ``[job, phase]``: ``oracle`` grows trees from them instead of the
head's, ``after`` lets its requests go on where those ended.

The engine lives in this process (no engine-core process), so that a phase can sabotage it (a negative
control) or look into its KV cache. Paths are JSON files.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from jakiro_vllm.cache.commit import moved_rows
from jakiro_vllm.decode.budget import Decision
from jakiro_vllm.tree.walk import Accepted

sys.path.append(str(Path(__file__).parents[1] / "reference"))

from oracle import SHAPES, Oracle

#: Whether engines sample as they do on CUDA machines, from exponential noise; else as the CPU platform does.
NATIVE_SAMPLER = False
#: Called with each phase before it runs.
BEFORE_PHASE: Callable[[dict[str, Any]], None] | None = None
#: What a runner calls a request, or one of its samples.
RUNNER_NAME = re.compile(r"(\d+_)?(?P<name>.+)-[0-9a-f]{8}")


def runner_of(llm: LLM) -> Any:
    """The model runner of an engine that lives in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def sabotage(runner: Any, what: str) -> Any:
    """Breaks one part of tree decoding; returns a function that mends it."""
    cls = type(runner)
    if what == "mask":  # every row of a tree sees every node before it, whatever its branch
        original = cls._attach_trees

        def see_all(self: Any, step: Any, per_layer: Any) -> None:
            if step is not None and step.ancestors is not None:
                nodes = self.query_pos.gpu[: step.ancestors.shape[0]]
                until = (torch.ones_like(nodes) << nodes) * 2 - 1
                step.ancestors = until.where(step.ancestors != 0, 0)
            original(self, step, per_layer)

        cls._attach_trees = see_all
        return lambda: setattr(cls, "_attach_trees", original)
    if what == "compaction":
        kept = runner._compact
        runner._compact = lambda step: None
        return lambda: setattr(runner, "_compact", kept)
    if what == "catching up":  # what was left for later is never read
        later = cls.catch_up
        cls.catch_up = lambda self, paged: self.backlog.take() if len(self.backlog) else None
        return lambda: setattr(cls, "catch_up", later)
    if what == "verification":  # whatever was drafted first is accepted, down to a leaf
        original = cls._verify

        def believe(self: Any, step: Any, logits: Any) -> Any:
            accepted, logprobs = original(self, step, logits)
            size = (step.trees.batch_size, self._levels(step) + 1)
            path, tokens = torch.zeros(size, dtype=torch.int64), torch.full(size, -1)
            for b, row in enumerate(step.trees.parents.tolist()):
                nodes = [0]
                while nodes[-1] in row[: step.trees.num_nodes[b]]:
                    nodes.append(row.index(nodes[-1]))
                drafted = step.trees.tokens[b, nodes[1:]].clamp(min=0)
                path[b, : len(nodes)] = torch.tensor(nodes)
                tokens[b, : len(nodes)] = torch.cat([drafted, accepted.tokens[b, :1]])
            counts = (tokens >= 0).sum(dim=1) - 1
            return Accepted(path, tokens, counts), logprobs

        cls._verify = believe
        return lambda: setattr(cls, "_verify", original)
    if what == "positions":  # tree rows keep the position of their slot
        original = cls._prepare_inputs

        def keep_positions(self: Any, scheduler_output: Any, counts: Any) -> Any:
            result = original(self, scheduler_output, counts)
            total = scheduler_output.total_num_scheduled_tokens
            base = self.num_computed_tokens[self.req_indices.gpu[:total]]
            self.positions[:total] = base + self.query_pos.gpu[:total]
            return result

        cls._prepare_inputs = keep_positions
        return lambda: setattr(cls, "_prepare_inputs", original)
    raise ValueError(what)


#: Where drafts come from, by the letter that asks for it: the head, each request's text, both in turn, or nowhere.
HEAD, TEXT, BOTH, NOWHERE = "HTB-"


@contextmanager
def drafts_from(runner: Any, pattern: str | None) -> Iterator[None]:
    """Decides for the budget, step by step, by a pattern that repeats itself; None leaves it alone.

    Drafts are as large as they may be, whatever they promise.
    """
    if pattern is None:
        yield
        return
    steps, full = itertools.count(), runner.drafter.drafter.full

    def decide(random: Any, others: int = 0, chances: Any = None) -> Decision:
        source = pattern[next(steps) % len(pattern)]
        repeated = (chances > 0).sum(axis=1) * (source in (TEXT, BOTH))
        if source == BOTH:
            repeated[::2] = 0
        heads = int((repeated == 0).sum()) if source in (HEAD, BOTH) else 0
        return Decision(full if heads else None, heads, repeated)

    controller = runner.pacer.controller
    controller.decide, kept = decide, controller.decide
    controller.select, selected = lambda shape, scores, *_: np.isfinite(scores).sum(axis=1) - 1, controller.select
    try:
        yield
    finally:
        controller.decide, controller.select = kept, selected


class Acceptance:
    """Counts what the walk accepts, and which shapes of batches were verified."""

    def __init__(self, runner: Any) -> None:
        self.drafts = self.accepted = self.moved = self.mixed = self.steps = self.resumed = 0
        self.by_depth: dict[int, int] = {}
        #: Verified so far, by request.
        self.trees: Counter[str] = Counter()
        original, update = runner._compact, runner._update_states

        def compact(step: Any) -> None:
            counts = step.accepted.num_accepted[step.has_tree]
            # vLLM pads some steps with drafts of -1.
            proposed = step.has_tree & (step.trees.tokens[:, 1:] >= 0).any(dim=1)
            names = [name for name, tree in zip(runner.input_batch.req_ids, proposed, strict=True) if tree]
            self.trees.update(RUNNER_NAME.fullmatch(name)["name"] for name in names)
            self.steps += 1
            self.drafts += counts.numel()
            self.accepted += int(counts.sum())
            self.moved += int(moved_rows(step.tree_starts, step.accepted)[0].numel())
            self.mixed += 0 < counts.numel() < step.row_counts.numel()
            for depth in counts.tolist():
                self.by_depth[depth] = self.by_depth.get(depth, 0) + 1
            original(step)

        def update_states(scheduler_output: Any) -> Any:
            self.resumed += len(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
            return update(scheduler_output)

        runner._compact, runner._update_states = compact, update_states

    def take(self) -> dict[str, Any]:
        """Returns and resets the counts."""
        taken = {k: v for k, v in vars(self).items() if k != "trees"}
        self.drafts = self.accepted = self.moved = self.mixed = self.steps = self.resumed = 0
        self.by_depth = {}
        return taken


def sampling_params(settings: dict[str, Any]) -> SamplingParams:
    """From JSON; ``structured_outputs`` are keywords."""
    settings = dict(settings)
    structured = settings.pop("structured_outputs", None)
    return SamplingParams(**settings, structured_outputs=structured and StructuredOutputsParams(**structured))


def lora_request(folder: str | None) -> LoRARequest | None:
    """The adapter in a folder; its number is the last character of the folder's name."""
    return None if folder is None else LoRARequest(folder, int(folder[-1]), folder)


def generate(llm: LLM, phase: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs a phase's requests together."""
    prompts = [TokensPrompt(prompt_token_ids=r["prompt"]) for r in phase["requests"]]
    params = [sampling_params(r["sampling"]) for r in phase["requests"]]
    adapters = [lora_request(r.get("adapter")) for r in phase["requests"]]
    answers = llm.generate(prompts, params, use_tqdm=False, lora_request=adapters if any(adapters) else None)
    found = []
    for answer in answers:
        first = answer.outputs[0]
        logprobs = None
        if first.logprobs is not None:
            logprobs = [{str(t): lp.logprob for t, lp in position.items()} for position in first.logprobs]
        found.append(
            {
                "name": answer.request_id,
                "tokens": list(first.token_ids),
                "samples": [list(o.token_ids) for o in answer.outputs],
                "text": first.text,
                "finish": first.finish_reason,
                "stop_reason": first.stop_reason,
                "cached": answer.num_cached_tokens,
                "logprobs": logprobs,
                "prompt_logprobs": prompt_logprobs(answer),
            }
        )
    return found


def prompt_logprobs(answer: Any) -> list[float] | None:
    """The log-probability of each prompt token but the first."""
    if answer.prompt_logprobs is None:
        return None
    pairs = zip(answer.prompt_token_ids, answer.prompt_logprobs, strict=True)
    return [position[token].logprob for token, position in pairs if position is not None]


def read_kv(runner: Any, request: str, length: int) -> dict[str, torch.Tensor]:
    """The KV of a live request's first tokens, per layer ``[length, G, 2, D]``, unpacked from its pages."""
    index = runner.input_batch.req_id_to_index[request]
    layers = runner.compilation_config.static_forward_context
    block_size = runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    blocks = runner.input_batch.block_table[0].get_cpu_tensor()[index]
    found = {}
    for name, layer in layers.items():
        pages = layer.kv_cache
        dim = pages.shape[3] // 2
        halves = pages.view(pages.shape[0], pages.shape[1], 2, block_size * dim)
        rows = []
        for position in range(length):
            block, offset = int(blocks[position // block_size]), position % block_size
            key = halves[block, :, 0].view(-1, dim, block_size)[:, :, offset]
            value = halves[block, :, 1].view(-1, block_size, dim)[:, offset]
            rows.append(torch.stack([key, value], dim=1))
        found[name] = torch.stack(rows).clone()
    return found


def compare_kv(llm: LLM, runner: Any, phase: dict[str, Any]) -> dict[str, Any]:
    """Speculates a while, then prefills the same tokens into fresh pages and compares the caches."""
    engine = llm.llm_engine

    def run(name: str, prompt: list[int], stop_after: int) -> tuple[dict[str, torch.Tensor], list[int]]:
        llm.reset_prefix_cache()
        params = SamplingParams(temperature=0.0, max_tokens=4096, ignore_eos=True)
        engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)
        while True:
            outputs = engine.step()
            if outputs and len(outputs[0].outputs[0].token_ids) >= stop_after:
                break
        tokens = prompt + list(outputs[0].outputs[0].token_ids)
        internal = next(iter(runner.input_batch.req_id_to_index))
        runner.catch_up(SimpleNamespace(block_table=torch.zeros(1, 1, dtype=torch.int32)))  # of nobody
        kv = read_kv(runner, internal, len(tokens) - 1)  # the last token's KV is not computed yet
        engine.abort_request([name])
        engine.step()
        return kv, tokens

    speculated, tokens = run("speculated", phase["prompt"], phase["tokens"])
    recomputed, _ = run("recomputed", tokens[:-1], 1)
    length = len(tokens) - 1
    # The head's entry at a position also depends on the next token, which the last position has not seen.
    return {
        name: float((speculated[name][: length - 1] - recomputed[name][: length - 1]).abs().max())
        for name in speculated
    }


def speculation(llm: LLM) -> dict[str, float]:
    """vLLM's own counters of speculation since the engine started."""
    names = {f"vllm:spec_decode_num_{what}": what for what in ("drafts", "draft_tokens", "accepted_tokens")}
    return {names[m.name].removesuffix("_tokens"): m.value for m in llm.get_metrics() if m.name in names}


def continued(requests: list[dict[str, Any]], answers: list[dict[str, Any]], room: int) -> list[dict[str, Any]]:
    """The same requests, each from where its answer ended, with ``room`` tokens at most before it."""
    pairs = zip(requests, answers, strict=True)
    return [request | {"prompt": (request["prompt"] + answer["tokens"])[:room]} for request, answer in pairs]


def oracle(runner: Any, phase: dict[str, Any], answers: list[dict[str, Any]]) -> Oracle:
    """An oracle that knows the answers to a phase's requests, which may be the first of those that were answered."""
    made = Oracle(runner, phase.get("shapes") or list(SHAPES))
    for request, answer in zip(phase["requests"], answers, strict=False):
        seed = request["sampling"].get("seed")
        for i, sample in enumerate(answer["samples"]):
            made.learn(request["prompt"], None if seed is None else seed + i, request.get("adapter"), sample)
    return made


def run_phases(engine: dict[str, Any], phases: list[dict[str, Any]], response: list[list[dict[str, Any]]]) -> None:
    """Builds an engine and answers its phases; the engine is gone afterwards.

    Args:
        engine: its arguments.
        phases: what to do with it.
        response: of all engines; the answers go into the last list.
    """
    llm = LLM(**engine)
    runner = runner_of(llm)
    if NATIVE_SAMPLER:
        sampler = runner.sampler.topk_topp_sampler
        sampler.forward = sampler.forward_native
    acceptance = Acceptance(runner) if hasattr(runner, "_compact") else None
    answers = response[-1]
    for phase in phases:
        if phase.get("fresh_cache"):
            llm.reset_prefix_cache()
        if BEFORE_PHASE is not None:
            BEFORE_PHASE(phase)
        if phase.get("after"):
            job, index = phase["after"]
            room = engine["max_model_len"] * 3 // 4
            phase = phase | {"requests": continued(phase["requests"], response[job][index]["requests"], room)}
        mend = sabotage(runner, phase["sabotage"]) if phase.get("sabotage") else None
        try:
            with drafts_from(runner, phase.get("sources")):
                if phase.get("kind") == "kv":
                    answers.append({"difference": compare_kv(llm, runner, phase)})
                elif phase.get("oracle"):
                    job, index = phase["oracle"]
                    with oracle(runner, phase, response[job][index]["requests"]):
                        answers.append({"requests": generate(llm, phase)})
                else:
                    answers.append({"requests": generate(llm, phase)})
        finally:
            if mend is not None:
                mend()
        if engine.get("disable_log_stats") is False:
            answers[-1]["spec_decode"] = speculation(llm)
        if acceptance is not None:
            answers[-1]["acceptance"] = acceptance.take()
            for request in answers[-1].get("requests", ()):
                request["trees"] = acceptance.trees[request["name"]]
    if acceptance is not None:
        answers.append({"live_trees": len(runner.tree_store)})


def main() -> None:
    """Runs the engines and writes the answers."""
    response: list[list[dict[str, Any]]] = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        response.append([])
        run_phases(job["engine"], job["phases"], response)
        cleanup_dist_env_and_memory()
    Path(sys.argv[2]).write_text(json.dumps(response))


if __name__ == "__main__":
    main()
