"""vLLM's door for an outside proposer: builds the head, its KV layer and the drafter.

Drafting itself is called by the runner, because this door hands over no hidden states.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.communication_op import tensor_model_parallel_all_reduce
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import set_default_torch_dtype

from jakiro_vllm.config import MAX_DEPTH, TreeConfig
from jakiro_vllm.decode.drafter import TreeDrafter
from jakiro_vllm.draft.candidates import LmHead
from jakiro_vllm.draft.checkpoint import load_head
from jakiro_vllm.draft.shard import shard_head
from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.integration.front_end import ADDITIONAL_CONFIG_KEY

logger = init_logger("vllm.plugins.jakiro")  # vLLM configures the loggers below its own name

HEAD_LAYER = "jakiro_head.layers.0.self_attn.attn"


class JakiroProposer:
    """Holds the draft head of one worker."""

    drafter: TreeDrafter
    attention: Attention

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Reads the configuration; the head is built when the target is there."""
        settings = vllm_config.additional_config[ADDITIONAL_CONFIG_KEY]
        self.vllm_config = vllm_config
        self.folder: str = settings["head"]
        self.tree_config = TreeConfig.from_dict(settings["tree"])

    def load_model(self, target: nn.Module) -> None:
        """Builds the head beside its target.

        Args:
            target: vLLM's model; its embedding and LM head are shared.

        Raises:
            JakiroConfigError: if the target exposes neither.
        """
        config = self.vllm_config
        dtype = config.model_config.dtype
        device = torch.device(config.device_config.device_type)
        head = load_head(self.folder, dtype)
        ranks = get_tensor_model_parallel_world_size()
        if ranks > 1:
            head = shard_head(head, get_tensor_model_parallel_rank(), ranks, tensor_model_parallel_all_reduce)
        head = head.to(device)
        head.prepare_positions(config.model_config.max_model_len + MAX_DEPTH + 1)
        if device.type == "cpu":
            head.pack()
        spec = head.spec
        # vLLM builds the target's layers under its device, where their scales must lie too.
        with set_current_vllm_config(config), set_default_torch_dtype(dtype), device:
            # Owns the pages: with the target's KV shape it joins the target's KV group, and so shares its
            # block table, its prefix cache and its eviction.
            self.attention = Attention(
                num_heads=spec.num_heads,
                head_size=spec.head_dim,
                scale=spec.head_dim**-0.5,
                num_kv_heads=spec.num_kv_heads,
                cache_config=config.cache_config,
                prefix=HEAD_LAYER,
            )
        self.drafter = TreeDrafter(head, self.tree_config, _embedding_of(target), _lm_head_of(target))
        parameters = sum(p.numel() for p in head.parameters())
        logger.info(
            "Loaded a %s draft head with %.1fM parameters%s: trees of %d nodes, depth %d, from %d forwards",
            spec.variant.value,
            parameters / 1e6,
            " per rank" if ranks > 1 else "",
            self.tree_config.node_budget,
            self.tree_config.depth,
            self.drafter.num_forwards,
        )
        scheduler, nodes = config.scheduler_config, self.tree_config.num_nodes
        fitting = scheduler.max_num_batched_tokens // nodes
        if fitting < scheduler.max_num_seqs:
            logger.info(
                "A step of %d tokens advances %d requests with trees of %d rows; up to %d are admitted, and the last "
                "of them wait meanwhile (--max-num-batched-tokens, --max-num-seqs)",
                scheduler.max_num_batched_tokens,
                fitting,
                nodes,
                scheduler.max_num_seqs,
            )

    def tensors(self) -> list[torch.Tensor]:
        """All that the head computes with, apart from what it shares with the target and the KV pages."""
        head = self.drafter.head
        return [*head.parameters(), *head.buffers(), *self.attention.buffers()]

    def release(self) -> None:
        """Drops the head, and with it what it holds of the target."""
        for name in ("drafter", "attention"):
            self.__dict__.pop(name, None)

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """Never called: the runner drafts, with the target's hidden states."""
        raise AssertionError("JakiroProposer needs jakiro-vllm's worker; do not set worker_cls")


def _embedding_of(target: nn.Module) -> nn.Module:
    for path in ("model.embed_tokens", "model.model.embed_tokens", "embed_tokens"):
        try:
            return _without_adapter(target.get_submodule(path))
        except AttributeError:
            continue
    raise JakiroConfigError(
        f"target {type(target).__name__} has no token embedding where Llama-like models have it "
        "(model.embed_tokens); serve it without speculation"
    )


def _lm_head_of(target: Any) -> LmHead:
    if not hasattr(target, "compute_logits"):
        raise JakiroConfigError(f"target {type(target).__name__} computes no logits; serve it without speculation")
    if any(isinstance(module, BaseLayerWithLoRA) for module in target.children()):
        # The same target, weights included, but for the layers that adapters wrap.
        target = copy.copy(target)
        target._modules = {name: _without_adapter(module) for name, module in target._modules.items()}
    return target.compute_logits


def _without_adapter(module: nn.Module) -> nn.Module:
    """The layer itself, if LoRA adapters are wrapped around it.

    A wrapper assigns adapters to the rows of the step that the target computes; a draft's rows are others. Drafts need
    not know of adapters.
    """
    return module.base_layer if isinstance(module, BaseLayerWithLoRA) else module
