"""Runs engines as ``engine_session`` does, and notes the trees of structured requests: ``... REQUEST RESPONSE``.

A phase's first answer gets ``structured_trees``: for each step and structured request what it had written before, its
draft tokens, their parents, and how many were accepted. With ``unmask``, a phase's rows but a tree's root stay
unmasked.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
sys.path.append(str(Path(__file__).parent))  # for engine_session, with PYTHONSAFEPATH too

import engine_session
from vllm.v1.core.sched.scheduler import Scheduler

from jakiro_vllm.integration import scheduler as trees_scheduler

TREES: list[dict[str, Any]] = []


def note_trees() -> None:
    """Notes what the scheduler schedules and what comes back."""
    cls = trees_scheduler.JakiroScheduler
    original = cls.update_from_output

    def update_from_output(self: Any, scheduler_output: Any, runner_output: Any) -> Any:
        sampled = dict(zip(runner_output.req_ids, runner_output.sampled_token_ids, strict=True))
        for name, drafts in scheduler_output.scheduled_spec_decode_tokens.items():
            request = self.requests.get(name)
            if request is not None and request.use_structured_output and sampled.get(name):
                if name not in self._parents:  # a first step, which vLLM pads
                    assert set(drafts) == {-1}, drafts
                    continue
                TREES.append(
                    {
                        "written": list(request.output_token_ids),
                        "drafts": list(drafts),
                        "parents": self._parents[name][: len(drafts)],
                        "accepted": len(sampled[name]) - 1,
                    }
                )
        return original(self, scheduler_output, runner_output)

    cls.update_from_output = update_from_output


def unmask(phase: dict[str, Any]) -> None:
    """Switches the sabotage on or off."""
    cls = trees_scheduler.JakiroScheduler
    if not phase.pop("unmask", False):
        cls.get_grammar_bitmask = HONEST
        return

    def roots_only(self: Any, scheduler_output: Any) -> Any:
        hidden = {name: [-1] * len(t) for name, t in scheduler_output.scheduled_spec_decode_tokens.items()}
        return Scheduler.get_grammar_bitmask(
            self, trees_scheduler.replace(scheduler_output, scheduled_spec_decode_tokens=hidden)
        )

    cls.get_grammar_bitmask = roots_only


HONEST = trees_scheduler.JakiroScheduler.get_grammar_bitmask
GENERATE = engine_session.generate


def generate(llm: Any, phase: dict[str, Any]) -> Any:
    """As ``engine_session.generate``, with the phase's trees behind the answers."""
    TREES.clear()
    found = GENERATE(llm, phase)
    found[0]["structured_trees"] = list(TREES)
    return found


if __name__ == "__main__":
    note_trees()
    engine_session.BEFORE_PHASE = unmask
    engine_session.generate = generate
    engine_session.main()
