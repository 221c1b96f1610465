"""Where the time of an engine's step goes, by timers around its methods; and engines in processes of their own.

Every moment of a step belongs to exactly one part: the innermost timed method that is running.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from jakiro_vllm.config import TreeConfig
from jakiro_vllm.environment import server_environment

#: In the order of a plot, from below.
PARTS = (
    "target forward",  # LM head included
    "draft",
    "sampling",  # for trees: and the walk
    "compaction",
    "adapting",  # of trees to the load
    "scheduler",
    "bookkeeping",  # of the engine core: all else
    "front end",  # detokenizing and handing out
)


@dataclass
class Step:
    """One step of the engine.

    Attributes:
        requests: that were scheduled.
        rows: of each request, tree included; None if they differ.
        decoding: whether no request computed a prompt.
        tokens: handed out.
        seconds: by part.
    """

    requests: int = 0
    rows: int | None = None
    decoding: bool = False
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())


class StepClock:
    """Times the steps of an engine that lives in this process."""

    def __init__(self, llm: Any) -> None:
        """Wraps its methods.

        Args:
            llm: ``vllm.LLM``, made with ``VLLM_ENABLE_V1_MULTIPROCESSING=0``.
        """
        import torch

        # Elsewhere than on a CPU a method returns before its work is done.
        self._wait: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        self.steps: list[Step] = []
        self._step = Step()
        self._running: list[str] = []
        self._since = 0.0
        engine = llm.llm_engine
        core = engine.engine_core.engine_core
        self.runner: Any = core.model_executor.driver_worker.worker.model_runner
        self._time(engine, "step", "front end", self._finish)
        self._time(core, "step_fn", "bookkeeping", self._count_tokens)
        self._time(core, "post_step", "bookkeeping")
        self._time(core.scheduler, "schedule", "scheduler", self._note)
        for name in ("update_from_output", "update_draft_token_ids", "get_grammar_bitmask"):
            self._time(core.scheduler, name, "scheduler")
        self._time(self.runner, "_model_forward", "target forward")
        self._time(self.runner.model, "compute_logits", "target forward")
        self._time(self.runner, "_sample", "sampling")
        if hasattr(self.runner, "_compact"):
            self._time(self.runner, "_compact", "compaction")
            self._time(self.runner, "_grow", "draft")
            self.watch_drafter()
            for name in ("verified", "followed", "decide", "grow") if self.runner.pacer is not None else ():
                self._time(self.runner.pacer, name, "adapting")
        elif hasattr(self.runner, "drafter"):
            self._time(self.runner, "propose_draft_token_ids", "draft")

    def watch_drafter(self) -> None:
        """Times the drafter that the runner has now; to be called again when it gets another."""
        self._time(self.runner.drafter.drafter, "observe", "draft")

    def take(self) -> list[Step]:
        """The steps since the last call."""
        taken, self.steps = self.steps, []
        return taken

    def _time(self, owner: Any, name: str, part: str, then: Callable[[Any], None] | None = None) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._running.append(part)
            try:
                result = inner(*args, **kwargs)
            finally:
                self._switch()
                self._running.pop()
            if then is not None:
                then(result)
            return result

        setattr(owner, name, timed)

    def _switch(self) -> None:
        """Gives the time since the last switch to the part that was running."""
        self._wait()
        now = time.perf_counter()
        if self._running:
            self._step.seconds[self._running[-1]] += now - self._since
        self._since = now

    def _note(self, scheduled: Any) -> None:
        step, counts = self._step, scheduled.num_scheduled_tokens
        drafts = scheduled.scheduled_spec_decode_tokens
        sizes = set(counts.values())
        step.requests = len(counts)
        step.rows = sizes.pop() if len(sizes) == 1 else None
        step.decoding = (
            bool(counts)
            and not scheduled.scheduled_new_reqs
            and all(count == 1 + len(drafts.get(name, ())) for name, count in counts.items())
        )

    def _count_tokens(self, result: Any) -> None:
        for outputs in (result[0] or {}).values():
            self._step.tokens += sum(len(output.new_token_ids) for output in outputs.outputs)

    def _finish(self, result: Any) -> None:
        self.steps.append(self._step)
        self._step = Step()


class EngineProcess:
    """An engine in a process of its own: vLLM does not start every kind of engine after another in one."""

    def __init__(self, **arguments: Any) -> None:
        """Starts nothing yet but the process.

        Args:
            arguments: of ``vllm.LLM``.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.update(server_environment())
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._started = self._pool.submit(_open, arguments)

    def wait(self) -> None:
        """Returns when the engine is there."""
        self._started.result()

    def steps(self, prompts: list[list[int]], max_tokens: int, temperature: float = 0.0) -> list[Step]:
        """The steps of completing prompts together, each to ``max_tokens``."""
        found: list[Step] = self._pool.submit(_steps, prompts, max_tokens, temperature).result()
        return found

    def use_tree(self, tree: TreeConfig | None) -> None:
        """From now on drafts other trees, of at most the nodes that the engine was made for; None drafts nothing.

        The engine's trees must not be adaptive.
        """
        self._pool.submit(_use_tree, tree).result()

    def stop(self) -> None:
        """Ends the process."""
        self._pool.shutdown()


#: The engine of such a process, and its clock.
_engine: tuple[Any, StepClock] | None = None


def _open(arguments: dict[str, Any]) -> None:
    global _engine
    from vllm import LLM

    llm = LLM(**arguments)
    _engine = llm, StepClock(llm)


def _opened() -> tuple[Any, StepClock]:
    assert _engine is not None
    return _engine


def _steps(prompts: list[list[int]], max_tokens: int, temperature: float) -> list[Step]:
    from vllm import SamplingParams

    llm, clock = _opened()
    params = [
        SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True, seed=seed)
        for seed in range(len(prompts))
    ]
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return clock.take()


def _use_tree(tree: TreeConfig | None) -> None:
    _, clock = _opened()
    runner = clock.runner
    runner.__dict__.pop("_may_draft", None)
    if tree is None:
        runner._may_draft = lambda name: False
        return
    from jakiro_vllm.decode.drafter import TreeDrafter

    proposer = runner.drafter
    old = proposer.drafter
    proposer.drafter = TreeDrafter(old.head, tree, old.embed, old.lm_head)
    proposer.tree_config = tree
    runner._store = None
    clock.watch_drafter()
