"""Every tunable is checked once, and every refusal says what was received and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from jakiro_vllm.config import (
    ADAPTIVE_DEPTH,
    DEPTH,
    MAX_DEPTH,
    MAX_NODE_BUDGET,
    MAX_NODES,
    POLICIES,
    TreeConfig,
)
from jakiro_vllm.errors import HeadCheckpointError, JakiroConfigError, JakiroError


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"node_budget": 63, "depth": 6, "top_k": 10}, id="largest-budget"),
        pytest.param({"node_budget": 59, "depth": 6, "top_k": 10}, id="paper"),
        pytest.param({"node_budget": 1, "depth": 1, "top_k": 1}, id="smallest"),
        pytest.param({"node_budget": 5, "depth": 1, "top_k": 63}, id="widest"),
        pytest.param({"node_budget": 16, "depth": 16, "top_k": 4}, id="deepest"),
        pytest.param({"node_budget": 8, "depth": 8, "top_k": 1}, id="chain"),
        pytest.param({"node_budget": 33, "depth": 5, "top_k": 16}, id="scratch-just-full"),
        *(pytest.param({"policy": policy}, id=policy) for policy in POLICIES),
    ],
)
def test_valid_trees(values: dict[str, Any]) -> None:
    config = TreeConfig(**values)
    assert config == TreeConfig.from_dict(values)
    assert config.num_nodes == config.node_budget + 1 <= MAX_NODES
    # The beams of all levels that a head may run on fit one word.
    assert (config.depth - 1) * config.top_k <= MAX_NODES


@pytest.mark.parametrize("wrong", [0, -1, 100, 2.0, "8", True, None])
@pytest.mark.parametrize(
    ("name", "shown", "highest"),
    [
        ("node_budget", "num_speculative_tokens", MAX_NODE_BUDGET),
        ("depth", "tree.depth", MAX_DEPTH),
        ("top_k", "tree.top_k", MAX_NODE_BUDGET),
    ],
)
def test_numbers_out_of_range(name: str, shown: str, highest: int, wrong: object) -> None:
    with pytest.raises(JakiroConfigError) as error:
        TreeConfig(**{name: wrong})
    message = str(error.value)
    for part in (shown, f"[1, {highest}]", f"got {wrong!r}", "64"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(("name", "highest"), [("node_budget", 63), ("depth", 16), ("top_k", 63)])
def test_the_limits_are_exact(name: str, highest: int) -> None:
    others = {"node_budget": 63, "depth": 1, "top_k": 1}
    TreeConfig(**(others | {name: highest}))
    with pytest.raises(JakiroConfigError):
        TreeConfig(**(others | {name: highest + 1}))


@pytest.mark.parametrize("policy", ["best", "", "Mixture", None])
def test_unknown_policies(policy: object) -> None:
    with pytest.raises(JakiroConfigError) as error:
        TreeConfig(policy=policy)
    assert f"got {policy!r}" in str(error.value)
    for allowed in POLICIES:
        assert allowed in str(error.value)


def test_a_budget_below_the_depth() -> None:
    with pytest.raises(JakiroConfigError, match=r"at least tree\.depth, got 3 < 4; raise num_speculative_tokens"):
        TreeConfig(node_budget=3, depth=4)


def test_beams_that_do_not_fit_a_word() -> None:
    with pytest.raises(JakiroConfigError, match=r"at most 64, got \(6 - 1\) \* 13 = 65; lower one of them"):
        TreeConfig(depth=6, top_k=13)


@pytest.mark.parametrize(
    ("values", "can_adapt", "expected"),
    [
        ({}, True, (ADAPTIVE_DEPTH, True)),
        ({}, False, (DEPTH, False)),
        ({"adaptive": False}, True, (DEPTH, False)),
        ({"adaptive": True}, False, (ADAPTIVE_DEPTH, True)),  # which the front end refuses
        ({"depth": 3}, True, (3, True)),
        ({"depth": 3}, False, (3, False)),
        ({"node_budget": 4}, False, (4, False)),
        ({"node_budget": 8}, True, (8, True)),
        ({"top_k": 16}, True, (5, True)),
        ({"top_k": 63}, False, (2, False)),
    ],
)
def test_what_the_platform_decides(values: dict[str, Any], can_adapt: bool, expected: tuple[int, bool]) -> None:
    config = TreeConfig.for_platform(values, can_adapt)
    assert (config.depth, config.adaptive) == expected
    for name, value in values.items():
        assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("values", "can_adapt", "expected"),
    [
        ({}, True, (True, 16)),
        ({}, False, (False, DEPTH)),
        ({"adaptive": False}, True, (False, DEPTH)),
        ({"lookup": False}, True, (False, ADAPTIVE_DEPTH)),
        ({"lookup": True, "node_budget": 24}, True, (True, 24)),
        ({"lookup": False}, False, (False, DEPTH)),
    ],
)
def test_texts_are_looked_up_where_trees_adapt(
    values: dict[str, Any], can_adapt: bool, expected: tuple[bool, int]
) -> None:
    """And then a path may be as long as a tree has nodes."""
    config = TreeConfig.for_platform(values, can_adapt)
    assert (config.lookup, config.levels) == expected


@pytest.mark.parametrize(("values", "can_adapt"), [({"adaptive": False}, True), ({}, False)])
def test_lookup_needs_trees_that_adapt(values: dict[str, Any], can_adapt: bool) -> None:
    with pytest.raises(JakiroConfigError, match=r"tree\.lookup needs trees that adapt .* got lookup: true without"):
        TreeConfig.for_platform({"lookup": True} | values, can_adapt)


@pytest.mark.parametrize(
    "values", [{"depth": 0}, {"depth": None}, {"depth": 5, "node_budget": 4}, {"depth": 12, "top_k": 8}]
)
def test_the_platform_overrules_nothing(values: dict[str, Any]) -> None:
    with pytest.raises(JakiroConfigError, match=r"depth"):
        TreeConfig.for_platform(values, can_adapt=True)


def test_unknown_keys() -> None:
    with pytest.raises(JakiroConfigError) as error:
        TreeConfig.from_dict({"depth": 3, "breadth": 2, "budget": 4})
    message = str(error.value)
    assert "breadth, budget" in message
    for allowed in ("node_budget", "depth", "top_k", "policy", "adaptive", "lookup"):
        assert allowed in message


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        TreeConfig().depth = 3  # type: ignore[misc]


def test_every_refusal_is_a_value_error() -> None:
    """So that argument parsers and pydantic report them as wrong input."""
    for error in (JakiroError, JakiroConfigError, HeadCheckpointError):
        assert issubclass(error, ValueError)
        assert issubclass(error, JakiroError)
