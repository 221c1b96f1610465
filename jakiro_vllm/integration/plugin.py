"""Entry point of the plugin: vLLM loads it in every process."""

from __future__ import annotations


def register() -> None:
    """Makes the front end understand the method ``jakiro``; safe to call twice."""
    from jakiro_vllm.integration.patches import apply_all

    apply_all()
