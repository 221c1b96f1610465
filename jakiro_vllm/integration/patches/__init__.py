"""Every patch of vLLM, in the order in which they are applied."""

from __future__ import annotations

from jakiro_vllm.integration.patches.base import Patch
from jakiro_vllm.integration.patches.front_end import AddCliArgs, CreateSpeculativeConfig

PATCHES: tuple[type[Patch], ...] = (AddCliArgs, CreateSpeculativeConfig)


def apply_all() -> None:
    """Applies each patch once per process."""
    for patch in PATCHES:
        patch.apply()
