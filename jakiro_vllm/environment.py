"""The process environment that vLLM's CPU build wants."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path


def server_environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the environment for a vLLM process.

    Without Intel's OpenMP, vLLM's CPU build loses much of its speed under speculation. The library comes
    with vLLM's dependencies and only has to be loaded first. An OpenMP that is preloaded already is kept,
    because vLLM refuses two.

    Args:
        base: environment to extend; this process's by default.
    """
    env = dict(os.environ if base is None else base)
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    preloaded = env.get("LD_PRELOAD", "")
    if library.exists() and not any(name in preloaded for name in ("libiomp", "libgomp", "libomp")):
        env["LD_PRELOAD"] = f"{library}:{preloaded}".rstrip(":")
    return env
