"""Engines for the integration tests; each runs in a process of its own."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from jakiro_vllm.draft.registry import EMBEDDED_HEAD, EMBEDDED_TARGET
from jakiro_vllm.environment import server_environment
from jakiro_vllm.training.corpus import python_sources, top_level_blocks

SESSION = Path(__file__).with_name("engine_session.py")

#: What every engine here shares: fp32, small pages so that requests cross many, a small cache.
ENGINE = {
    "model": str(EMBEDDED_TARGET),
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 28,
    "enable_prefix_caching": True,
    "seed": 0,
}
JAKIRO = {
    "method": "jakiro",
    "model": str(EMBEDDED_HEAD),
    "num_speculative_tokens": 24,
    "tree": {"depth": 6, "top_k": 8, "adaptive": False},  # tests want trees at any load
}


@pytest.fixture(scope="session")
def plain_engine() -> dict[str, Any]:
    """Arguments of plain vLLM.

    Its budget holds every prompt at once: vLLM 0.32 ends the CPU engine when a seeded request's prompt is
    chunked, because it rewinds a generator in a way that CPU generators do not have.
    """
    return {**ENGINE, "max_num_batched_tokens": 8 * ENGINE["max_model_len"]}


@pytest.fixture(scope="session")
def jakiro_engine() -> dict[str, Any]:
    """Arguments of vLLM with trees, and a budget that chunks prompts and cuts trees."""
    return {**ENGINE, "max_num_batched_tokens": 160, "speculative_config": JAKIRO}


RunEngine = Callable[[dict[str, Any], list[dict[str, Any]]], list[dict[str, Any]]]
RunEngines = Callable[..., list[list[dict[str, Any]]]]


@pytest.fixture(scope="session")
def run_engines(tmp_path_factory: pytest.TempPathFactory) -> RunEngines:
    """Runs engines one after the other in one fresh process; see ``engine_session``."""

    def run(
        jobs: list[tuple[dict[str, Any], list[dict[str, Any]]]], session: Path = SESSION
    ) -> list[list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp("engine")
        request, response = folder / "request.json", folder / "response.json"
        request.write_text(json.dumps([{"engine": engine, "phases": phases} for engine, phases in jobs]))
        done = subprocess.run(
            [sys.executable, str(session), str(request), str(response)],
            env={k: v for k, v in server_environment().items() if k != "TRITON_INTERPRET"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=550,
            check=False,
        )
        assert response.exists(), f"the engine ended with {done.returncode}:\n{done.stdout[-6000:]}"
        return json.loads(response.read_text())

    return run


@pytest.fixture(scope="session")
def run_engine(run_engines: RunEngines) -> RunEngine:
    """Runs one engine's phases in a fresh process and returns its answers."""
    return lambda engine, phases: run_engines([(engine, phases)])[0]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The embedded target's."""
    return AutoTokenizer.from_pretrained(EMBEDDED_TARGET)


@pytest.fixture(scope="session")
def source_tokens(tokenizer: Any) -> list[int]:
    """A long stretch of Python code, from the interpreter's own library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((library / name).read_text(encoding="utf-8") for name in ("argparse.py", "shlex.py", "heapq.py"))
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@pytest.fixture(scope="session")
def definitions(tokenizer: Any) -> list[list[int]]:
    """First halves of short definitions; the embedded target ends some of them by its end-of-text token."""
    blocks = [b for d in python_sources()[:400] if not d.held_out for b in top_level_blocks(d.text) if len(b) < 900]
    chosen = random.Random(1).sample(blocks, 36)
    return [tokenizer(block[: len(block) // 2], add_special_tokens=False)["input_ids"] for block in chosen]
