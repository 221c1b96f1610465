"""Every tunable of drafting, checked once.

The command line, ``--speculative-config`` and ``LLM(speculative_config=...)`` all end here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from jakiro_vllm.errors import JakiroConfigError

#: A row's ancestors, itself included, are the bits of one 64-bit word.
MAX_NODES = 64
MAX_NODE_BUDGET = MAX_NODES - 1
MAX_DEPTH = 16
POLICIES = ("auto", "mixture", "decoupled")
#: The method's depth, and how deep trees may become that adapt: those end where a further level does not pay.
DEPTH, ADAPTIVE_DEPTH = 6, 12


@dataclass(frozen=True)
class TreeConfig:
    """Shape of the draft trees.

    Attributes:
        node_budget: draft nodes per tree, root excluded, in [1, 63]; vLLM's ``num_speculative_tokens``.
        depth: levels below the root, in [1, 16].
        top_k: nodes expanded per level and candidates taken per expansion, in [1, 63].
        adaptive: whether each step's trees get as many nodes and levels as pay at its load, from the above down to
            none; otherwise all that the above allows. None leaves it to the platform: on a CPU they do.
        lookup: whether a request may get a chain of what its own text suggests instead of the head's tree, where that
            pays; for trees that adapt. None: if they do.
        policy: ``mixture`` takes candidates from the mixed distribution, ``decoupled`` from the experts'
            own; ``auto`` picks what the head was trained for.

    Raises:
        JakiroConfigError: on a value outside its range.
    """

    node_budget: int = 16
    depth: int = DEPTH
    top_k: int = 4
    policy: str = "auto"
    adaptive: bool | None = None
    lookup: bool | None = None

    def __post_init__(self) -> None:
        for name, highest in (("node_budget", MAX_NODE_BUDGET), ("depth", MAX_DEPTH), ("top_k", MAX_NODE_BUDGET)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= highest:
                shown = "num_speculative_tokens (node_budget)" if name == "node_budget" else f"tree.{name}"
                raise JakiroConfigError(
                    f"{shown} must be an integer in [1, {highest}], got {value!r}; "
                    f"a tree has at most {MAX_NODES} rows, root included, so choose a smaller tree"
                )
        if self.policy not in POLICIES:
            raise JakiroConfigError(f"tree.policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        for name in ("adaptive", "lookup"):
            if not isinstance(getattr(self, name), bool | None):
                raise JakiroConfigError(f"tree.{name} must be true or false, got {getattr(self, name)!r}")
        if self.lookup and self.adaptive is False:
            raise JakiroConfigError(
                "tree.lookup needs trees that adapt (tree.adaptive: true, on a CPU), got lookup: true without; "
                "leave one of them out"
            )
        if self.node_budget < self.depth:
            raise JakiroConfigError(
                f"node_budget must be at least tree.depth, got {self.node_budget} < {self.depth}; "
                "raise num_speculative_tokens or lower tree.depth"
            )
        if (self.depth - 1) * self.top_k > MAX_NODES and self.depth > 1:
            raise JakiroConfigError(
                f"(tree.depth - 1) * tree.top_k must be at most {MAX_NODES}, got "
                f"({self.depth} - 1) * {self.top_k} = {(self.depth - 1) * self.top_k}; lower one of them"
            )

    @property
    def num_nodes(self) -> int:
        """Rows of a full tree, root included."""
        return self.node_budget + 1

    @property
    def levels(self) -> int:
        """Draft tokens of the longest path that a step may verify."""
        return self.node_budget if self.lookup else self.depth

    @classmethod
    def for_platform(cls, values: Mapping[str, Any], can_adapt: bool) -> TreeConfig:
        """Builds a configuration from user input, and decides what the user has left open.

        Args:
            values: as of ``from_dict``.
            can_adapt: whether trees can adapt to the load on this platform, and then do.
        """
        config = cls.from_dict(dict(values) | {"depth": values.get("depth", 1)})
        adaptive = can_adapt if config.adaptive is None else config.adaptive
        lookup = adaptive if config.lookup is None else config.lookup
        room = min(config.node_budget, 1 + MAX_NODES // config.top_k)
        depth = min(ADAPTIVE_DEPTH if adaptive else DEPTH, room)
        return replace(config, adaptive=adaptive, lookup=lookup, depth=values.get("depth", depth))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TreeConfig:
        """Builds a configuration from user input; unknown keys are an error."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise JakiroConfigError(f"unknown key(s) {', '.join(unknown)} in 'tree'; allowed: {', '.join(known)}")
        return cls(**values)
