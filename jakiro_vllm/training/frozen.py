"""The frozen target as training sees it: embedding, features, logits, and the sizes that its head must share.

Shapes: T tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from jakiro_vllm.draft.head import HeadSpec, Variant
from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.training.settings import HeadSettings

#: Rotary embeddings that depend on the position alone; the head may be served at other lengths than it was trained at.
_STATIC_ROPE = ("default", "linear", "yarn", "llama3")
#: Belong to a target's own layout of rotated dimensions; the head rotates all of them, as Llama does.
_FOREIGN_ROPE = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
#: How far the two ways to the same logits may be apart, relative to the largest; per dtype.
_LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


class Target:
    """A causal LM whose last hidden states a head learns to foresee.

    The features are what the LM head reads: the last hidden states after the final norm.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        """Takes a model that is loaded already.

        Args:
            model: any causal LM of transformers; frozen here.
            name: for messages and records.

        Raises:
            JakiroConfigError: if its features cannot be had.
        """
        self.name = name
        self.model = model.requires_grad_(False).eval()
        self.config: PretrainedConfig = model.config
        _check_config(name, self.config)
        self._lm_head = model.get_output_embeddings()
        if self._lm_head is None or model.get_input_embeddings() is None:
            raise _refusal(name, "it has no LM head or no token embedding")
        self._cap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self._scale: float = (getattr(self.config, "logit_scale", None) or 1.0) / (
            getattr(self.config, "logits_scaling", None) or 1.0
        )
        self._check_features()

    @classmethod
    def load(cls, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Target:
        """Loads a target from a folder or the hub.

        Raises:
            JakiroConfigError: if it cannot be loaded, or its features cannot be had.
        """
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise JakiroConfigError(f"target {name!r} cannot be loaded: {_first_line(error)}") from error
        _check_config(name, config)  # before gigabytes are read
        try:
            model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype)
        except (OSError, ValueError, ImportError) as error:
            raise JakiroConfigError(f"target {name!r} cannot be loaded: {_first_line(error)}") from error
        return cls(model.to(device), name)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its parameters, and of its features."""
        return self._lm_head.weight.dtype

    @property
    def hidden_size(self) -> int:
        """C."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """V: rows of the LM head."""
        return int(self._lm_head.weight.shape[0])

    def embed(self, tokens: Tensor) -> Tensor:
        """``[...] int64 -> [..., C]``: raw rows of the embedding, as vLLM hands them to the head.

        A scale that the target itself applies, such as Gemma's, is left out.
        """
        return F.embedding(tokens, self.model.get_input_embeddings().weight)

    def logits(self, features: Tensor) -> Tensor:
        """``[..., C] -> [..., V] float32``: LM head, scale and soft cap, as the target applies them."""
        logits = self._lm_head(features.to(self.dtype)).float()
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._cap:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits

    @torch.no_grad()
    def features(self, documents: Sequence[np.ndarray], batch_tokens: int = 8192) -> list[Tensor]:
        """The last hidden states of documents, each in its own context only.

        Documents of similar length share a forward, padded at their ends under a mask, so that whatever the
        target's layers look at (all tokens, a window, a state) is what it is in decoding.

        Args:
            documents: ``[tokens]`` each, of an integer dtype.
            batch_tokens: padded tokens of a forward, unless one document has more.

        Returns:
            ``[tokens, C]`` each, in the order of the documents, on the target's device.
        """
        order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
        found: list[Tensor] = [torch.empty(0)] * len(documents)
        while order:
            count = max(1, batch_tokens // max(1, len(documents[order[-1]])))
            batch, order = order[-count:], order[:-count]
            for index, own in zip(batch, self._forward([documents[i] for i in batch]), strict=True):
                found[index] = own
        return found

    def _forward(self, documents: Sequence[np.ndarray]) -> list[Tensor]:
        longest = max(len(document) for document in documents)
        tokens = torch.zeros(len(documents), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, document in enumerate(documents):
            tokens[row, : len(document)] = torch.from_numpy(document.astype(np.int64))
            mask[row, : len(document)] = 1
        output = self.model.get_decoder()(
            input_ids=tokens.to(self.device), attention_mask=mask.to(self.device), use_cache=False
        )
        return [own[: len(document)] for own, document in zip(output.last_hidden_state, documents, strict=True)]

    @cached_property
    def fingerprint(self) -> str:
        """Changes with configuration, dtype and weights, of which it reads a few values each."""
        config = self.config.to_dict()
        for key in ("_name_or_path", "transformers_version"):
            config.pop(key, None)
        found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, parameter in self.model.named_parameters():
            flat = parameter.detach().flatten()
            values = flat[:: max(1, len(flat) // 64)].float().cpu().numpy()
            found.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode() + values.tobytes())
        return found.hexdigest()[:32]

    @torch.no_grad()
    def _check_features(self) -> None:
        """Compares the logits of the features with the target's own on a few tokens."""
        tokens = np.arange(1, 9) * 7 % self.vocab_size
        try:
            ours = self.logits(self.features([tokens])[0])
            own = self.model(input_ids=torch.from_numpy(tokens)[None].to(self.device), use_cache=False).logits[0]
        except (AttributeError, TypeError, RuntimeError, NotImplementedError) as error:
            raise _refusal(self.name, f"its decoder does not run alone ({_first_line(error)})") from error
        if ours.shape != own.shape:
            raise _refusal(self.name, f"its LM head gives logits of {ours.shape[-1]} tokens, itself {own.shape[-1]}")
        distance, largest = (ours - own.float()).abs().max().item(), own.float().abs().max().item()
        if not distance <= _LOGIT_TOLERANCE.get(self.dtype, 0.03) * largest:
            raise _refusal(
                self.name,
                f"its LM head on its last hidden states gives logits that are {distance:.3g} off its own, which "
                f"reach {largest:.3g}",
            )


def head_spec(target: PretrainedConfig, settings: HeadSettings) -> HeadSpec:
    """A head whose attention has its target's shape, so that both can share one paged KV cache.

    Args:
        target: the target's configuration.
        settings: variant and sizes of the MLP.

    Raises:
        JakiroConfigError: if no head can have the target's shape.
    """
    name = target.name_or_path or target.model_type
    _check_config(name, target)
    if getattr(target, "kv_lora_rank", None):
        raise JakiroConfigError(
            f"target {name!r} keeps latent KV entries (multi-head latent attention), which no draft head has; "
            "use a target with ordinary attention"
        )
    heads = target.num_attention_heads
    head_dim = getattr(target, "head_dim", None) or target.hidden_size // heads
    if head_dim % 2:
        raise JakiroConfigError(
            f"target {name!r} has attention heads of size {head_dim}, and the draft head's rotary embedding needs an "
            "even size; use another target"
        )
    return HeadSpec(
        variant=settings.variant,
        hidden_size=target.hidden_size,
        num_heads=heads,
        num_kv_heads=getattr(target, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        intermediate_size=settings.intermediate_size or target.hidden_size,
        num_experts=1 if settings.variant is Variant.DENSE else settings.num_experts,
        fc_bias=False,
        rms_norm_eps=_norm_eps(target),
        rope=LlamaConfig(
            hidden_size=target.hidden_size,
            num_attention_heads=heads,
            head_dim=head_dim,
            max_position_embeddings=target.max_position_embeddings,
            rope_parameters=_rope_parameters(target),
        ),
    )


def _norm_eps(target: PretrainedConfig) -> float:
    names = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    return next((float(getattr(target, name)) for name in names if getattr(target, name, None)), 1e-6)


def _rope_parameters(target: PretrainedConfig) -> dict[str, Any]:
    """The target's rotary embedding, as far as a head of its own can share it.

    The head is trained from nothing, so it needs a sensible one, not the same: what depends on the length of
    the text becomes the plain embedding with the same base.
    """
    found = getattr(target, "rope_parameters", None) or {}
    if "full_attention" in found:  # one for each kind of layer
        found = found["full_attention"]
    theta = found.get("rope_theta", 10000.0)
    if found.get("rope_type", "default") not in _STATIC_ROPE:
        return {"rope_type": "default", "rope_theta": theta}
    kept = {key: value for key, value in found.items() if key not in _FOREIGN_ROPE}
    return {"rope_type": "default", "rope_theta": theta} | kept


def _check_config(name: str, config: PretrainedConfig) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(name, "it is an encoder and a decoder")
    if config.get_text_config() is not config:
        raise _refusal(name, "it is multimodal")


def _refusal(name: str, reason: str) -> JakiroConfigError:
    return JakiroConfigError(f"target {name!r} cannot give features: {reason}; use a text-only causal language model")


def _first_line(error: Exception) -> str:
    return f"{error}".strip().partition("\n")[0] or type(error).__name__
