"""Acceptance by depth for Prometheus, beside vLLM's own speculative counters.

vLLM counts by position in a list of drafts, which for a tree says nothing. What it hands to loggers is how
many tokens each draft had accepted, and on a tree's path the i-th accepted token has depth i.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY, Counter
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from jakiro_vllm.integration.front_end import ADDITIONAL_CONFIG_KEY


class JakiroStatLogger(AggregateStatLoggerBase):
    """Exports ``jakiro:trees_total`` and ``jakiro:accepted_tokens_total{depth}``; silent for other methods."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        """Registers the counters if this engine drafts trees."""
        settings = (vllm_config.additional_config or {}).get(ADDITIONAL_CONFIG_KEY)
        self.depth = settings["tree"]["depth"] if settings else 0
        if not self.depth:
            return
        labels = ("model_name", "engine")
        self.model_name = str(vllm_config.model_config.served_model_name)
        self.trees = _counter("jakiro:trees", "Trees verified.", labels)
        self.accepted = _counter("jakiro:accepted_tokens", "Draft tokens accepted, by depth.", (*labels, "depth"))

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Adds one step's counts."""
        stats = scheduler_stats.spec_decoding_stats if scheduler_stats is not None else None
        if not self.depth or stats is None:
            return
        self.trees.labels(self.model_name, str(engine_idx)).inc(stats.num_drafts)
        for depth, count in enumerate(stats.num_accepted_tokens_per_pos[: self.depth], start=1):
            self.accepted.labels(self.model_name, str(engine_idx), str(depth)).inc(count)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def _counter(name: str, documentation: str, labels: tuple[str, ...]) -> Counter:
    """A counter; a second engine in one process shares the first one's."""
    existing = REGISTRY._names_to_collectors.get(name)
    if isinstance(existing, Counter):
        return existing
    return Counter(name, documentation, labels)
