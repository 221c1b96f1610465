"""Whether a head fits a target."""

from __future__ import annotations

from dataclasses import dataclass

from jakiro_vllm.draft.head import HeadSpec
from jakiro_vllm.errors import HeadCheckpointError


@dataclass(frozen=True)
class TargetSizes:
    """What a head must share with its target.

    Attributes:
        name: of the target, for messages.
        hidden_size: the head reads features of this size and writes features for the target's LM head.
        num_kv_heads: with ``head_dim`` the shape of a KV entry; equal shapes share vLLM's pages.
        head_dim: size of one attention head.
    """

    name: str
    hidden_size: int
    num_kv_heads: int
    head_dim: int


def check_fit(spec: HeadSpec, source: str, target: TargetSizes) -> None:
    """Compares a head's sizes with its target's.

    Raises:
        HeadCheckpointError: naming both sides.
    """
    for what, mine, theirs in (
        ("hidden size", spec.hidden_size, target.hidden_size),
        ("number of KV heads", spec.num_kv_heads, target.num_kv_heads),
        ("attention head size", spec.head_dim, target.head_dim),
    ):
        if mine != theirs:
            raise HeadCheckpointError(
                f"head {source!r} does not fit target {target.name!r}: its {what} is {mine}, the target's is "
                f"{theirs}; use a head that was trained for this target"
            )
