"""Acceptance by depth for Prometheus, beside vLLM's own speculative counters.

vLLM's labels speak of positions in a list of drafts, which for a tree says nothing. What its scheduler
counts is how many tokens of each draft were accepted, and on an accepted path the i-th token has depth i.
"""

from __future__ import annotations

from typing import Any

from vllm.config import SpeculativeConfig
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.spec_decode.metrics import SpecDecodingStats


def export_depths(proposer: str, depth: int) -> None:
    """Lets this process's Prometheus loggers count by depth.

    The class of the speculative counters is an attribute of vLLM's logger, made to be replaced; engines
    with another proposer keep vLLM's behaviour.

    Args:
        proposer: dotted path of the proposer whose engines are counted.
        depth: levels of the trees.
    """
    base = getattr(PrometheusStatLogger._spec_decoding_cls, "_without_depths", PrometheusStatLogger._spec_decoding_cls)

    class TreeSpecDecodingProm(base):  # type: ignore[misc, valid-type]
        """vLLM's counters, trees verified, and draft tokens accepted at each depth."""

        _without_depths = base

        def __init__(
            self,
            speculative_config: SpeculativeConfig | None,
            labelnames: list[str],
            per_engine_labelvalues: dict[int, list[object]],
            is_diffusion: bool = False,
        ) -> None:
            super().__init__(speculative_config, labelnames, per_engine_labelvalues, is_diffusion=is_diffusion)
            self.by_engine: dict[int, tuple[Any, list[Any]]] = {}
            if speculative_config is None or speculative_config.model != proposer:
                return
            trees = self._counter_cls(
                name="vllm:jakiro_trees",
                documentation="Draft rounds verified, one per request and step.",
                labelnames=labelnames,
            )
            accepted = self._counter_cls(
                name="vllm:jakiro_accepted_tokens_per_depth",
                documentation="Draft tokens accepted, by depth in the tree.",
                labelnames=[*labelnames, "depth"],
            )
            for engine, values in per_engine_labelvalues.items():
                levels = [accepted.labels(*values, str(level)) for level in range(1, depth + 1)]
                self.by_engine[engine] = trees.labels(*values), levels

        def observe(self, spec_decoding_stats: SpecDecodingStats, engine_idx: int = 0) -> None:
            """Adds one step's counts."""
            super().observe(spec_decoding_stats, engine_idx)
            if engine_idx not in self.by_engine:
                return
            trees, levels = self.by_engine[engine_idx]
            trees.inc(spec_decoding_stats.num_drafts)
            for level, count in zip(levels, spec_decoding_stats.num_accepted_tokens_per_pos, strict=False):
                level.inc(count)

    PrometheusStatLogger._spec_decoding_cls = TreeSpecDecodingProm
