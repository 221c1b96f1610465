"""Runs engines as ``engine_session`` does, on two tensor-parallel ranks: ``parallel_session.py REQUEST RESPONSE``.

Each rank is a process of its own, so what sabotages one or looks into it is sent there as a function.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # for engine_session, with PYTHONSAFEPATH too

# One core for each rank: vLLM itself binds a rank to a NUMA node, and here may be but one.
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(core) for core in sorted(os.sched_getaffinity(0))[:2])

import cloudpickle
import engine_session
import torch
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory

#: For ranks that Ray starts, which vLLM does not bind.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "KMP_BLOCKTIME": "5"}

# Ranks do not find this folder's modules.
cloudpickle.register_pickle_by_value(engine_session)


def watch(worker: Any) -> None:
    """Counts what a rank accepts, and remembers a digest of all that it verified."""
    runner = worker.model_runner
    runner.acceptance = engine_session.Acceptance(runner)
    runner.digest = hashlib.sha256()
    pacer = runner.pacer
    # As the ranks agreed on at start-up; each learns from its own clock thereafter.
    runner.timed = pacer and [table.seconds.tolist() for table in (pacer.controller.verify, pacer.controller.draft)]
    original = runner._compact

    def compact(step: Any) -> None:
        trees, accepted = step.trees, step.accepted
        # A request without drafts borrows some tree's root, which nobody reads.
        counts = trees.num_nodes.where(step.has_tree, 0)
        nodes = torch.arange(trees.width) < counts.unsqueeze(1)
        for tensor in (trees.tokens[nodes], trees.parents[nodes], accepted.tokens, accepted.num_accepted):
            runner.digest.update(tensor.numpy().tobytes())
        original(step)

    runner._compact = compact


def take(worker: Any) -> dict[str, Any]:
    """What a rank has seen since the last time."""
    runner = worker.model_runner
    taken = runner.acceptance.take() | {"digest": runner.digest.hexdigest(), "rank": worker.rank}
    if runner.pacer:
        taken |= {"timed": runner.timed, "plans": runner.pacer.controller._steps}
    runner.digest = hashlib.sha256()
    return taken


def begin(worker: Any, what: str) -> None:
    """Breaks one part on a rank, until ``end``."""
    runner = worker.model_runner
    if what == "sum":  # each rank goes on with what its own attention heads say
        head = runner.drafter.drafter.head
        kept, head.sum_over_ranks = head.sum_over_ranks, lambda term: term
        runner.mend = lambda: setattr(head, "sum_over_ranks", kept)
    elif what == "other ranks' trees":  # only the first rank grows the trees that it should
        grow = runner._grow
        if worker.rank:
            runner._grow = lambda *given: replace(trees := grow(*given), tokens=trees.tokens.flip(1))
        runner.mend = lambda: setattr(runner, "_grow", grow)
    else:
        runner.mend = engine_session.sabotage(runner, what)


def end(worker: Any) -> None:
    """Mends what ``begin`` broke."""
    worker.model_runner.mend()


def name_gpus() -> None:
    """Makes vLLM's CPU platform one that its Ray executor takes: it asks for a device by Ray's name for it."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"


@contextmanager
def cluster(engine: dict[str, Any]) -> Any:
    """A Ray cluster with two devices, for engines that want one."""
    if engine.get("distributed_executor_backend") != "ray":
        yield
        return
    os.environ["RAY_AUTH_MODE"] = "disabled"  # else Ray leaves a token in the user's home
    import ray

    name_gpus()
    # What ranks import to run this file's functions; Ray passes on the folder of this file only.
    variables = ONE_THREAD | {"PYTHONPATH": str(Path(__file__).parents[1] / "reference")}
    environment = {"worker_process_setup_hook": name_gpus, "env_vars": variables}
    ray.init(
        num_cpus=2,
        num_gpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        runtime_env=environment,
        log_to_driver=False,
        _system_config={"worker_niceness": 0},  # else a rank that competes for its core holds up the other one
    )
    try:
        yield
    finally:
        ray.shutdown()


def follow_up(phase: dict[str, Any], answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Requests that go on where others ended: their prompts lie in blocks that those filled."""
    pairs = zip(phase["requests"], answer["requests"], strict=True)
    return [q | {"prompt": q["prompt"] + a["tokens"] + q["prompt"][:3]} for q, a in pairs]


def run_phases(engine: dict[str, Any], phases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Builds an engine and answers its phases; the engine is gone afterwards."""
    llm = LLM(**engine)
    trees = "speculative_config" in engine
    if trees:
        llm.collective_rpc(watch)
    answers = []
    for phase in phases:
        if phase.get("fresh_cache"):
            llm.reset_prefix_cache()
        if "continues" in phase:
            phase = {"requests": follow_up(phases[phase["continues"]], answers[phase["continues"]])}
        broken = phase.get("sabotage")
        if broken:
            llm.collective_rpc(begin, args=(broken,))
        answers.append({"requests": engine_session.generate(llm, phase)})
        if broken:
            llm.collective_rpc(end)
        if trees:
            answers[-1]["ranks"] = llm.collective_rpc(take)
    llm.llm_engine.engine_core.shutdown()
    return answers


def main() -> None:
    """Runs the engines and writes the answers."""
    response = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        with cluster(job["engine"]):
            response.append(run_phases(job["engine"], job["phases"]))
        cleanup_dist_env_and_memory()
    Path(sys.argv[2]).write_text(json.dumps(response))


if __name__ == "__main__":
    main()
