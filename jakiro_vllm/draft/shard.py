"""One rank's part of a head: its attention heads, as tensor parallelism shares out the target's.

The pages of a rank hold the rank's KV heads, the draft head's like the target's. So attention is sharded by heads, and
the ranks add up what ``o_proj`` makes of theirs. All else is the same on every rank, the experts too: to share them out
would take a second sum over the ranks in every forward.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from jakiro_vllm.draft.head import DraftHead, HeadSpec, SumOverRanks
from jakiro_vllm.errors import HeadCheckpointError


def check_shards(spec: HeadSpec, source: str, size: int) -> None:
    """Refuses a head whose attention heads cannot be shared out.

    Args:
        spec: of the whole head.
        source: of the head, for messages.
        size: ranks.

    Raises:
        HeadCheckpointError: naming the heads and the ranks.
    """
    for what, count, replicable in (
        ("attention heads", spec.num_heads, False),
        ("KV heads", spec.num_kv_heads, True),
    ):
        if count % size and not (replicable and size % count == 0):
            fitting = [n for n in range(1, size) if _fits(spec, n)]
            raise HeadCheckpointError(
                f"head {source!r} has {count} {what}, which {size} tensor-parallel ranks cannot share out evenly; use "
                f"--tensor-parallel-size {max(fitting)} or a head that was trained with other sizes"
            )


def _fits(spec: HeadSpec, size: int) -> bool:
    return spec.num_heads % size == 0 and (spec.num_kv_heads % size == 0 or size % spec.num_kv_heads == 0)


def shard_head(head: DraftHead, rank: int, size: int, sum_over_ranks: SumOverRanks) -> DraftHead:
    """One rank's part of a head, in tensors of its own where it is a part.

    With more ranks than KV heads, each rank has one, which it shares with its neighbours: as vLLM does it.

    Args:
        head: the whole head, for which ``check_shards`` passed.
        rank: from 0.
        size: ranks.
        sum_over_ranks: adds up a tensor of all ranks; called once per forward.
    """
    spec = head.spec
    heads, kv_heads = spec.num_heads // size, max(1, spec.num_kv_heads // size)
    queries = slice(rank * heads * spec.head_dim, (rank + 1) * heads * spec.head_dim)
    first = rank * spec.num_kv_heads // size
    keys = slice(first * spec.head_dim, (first + kv_heads) * spec.head_dim)
    with torch.device("meta"):  # without weights
        part = DraftHead(replace(spec, num_heads=heads, num_kv_heads=kv_heads), sum_over_ranks)
    state = head.state_dict()
    k, v = state["kv_proj.weight"].chunk(2)
    state["q_proj.weight"] = state["q_proj.weight"][queries].clone()
    state["kv_proj.weight"] = torch.cat([k[keys], v[keys]])
    state["o_proj.weight"] = state["o_proj.weight"][:, queries].clone()
    part.load_state_dict(state, assign=True)
    part.rotary_table = head.rotary_table
    return part.train(head.training).requires_grad_(False)
