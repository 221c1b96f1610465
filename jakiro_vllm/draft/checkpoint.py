"""Reads and writes heads in the published layout.

Sizes come from the tensors; the configuration only says what tensors cannot (head size, epsilon, rotary
embedding). A disagreement is an error that names both sides.
"""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from jakiro_vllm.draft.head import DraftHead, HeadSpec, Variant, tabulate_rotary
from jakiro_vllm.errors import HeadCheckpointError
from jakiro_vllm.kernels.experts import EXPERTS_PER_TOKEN

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_LAYER = "layers.0."
_MOE = _LAYER + "mlp_moe."
#: In some published files, but the target's own are used.
_IGNORED = ("embed_tokens.weight", "lm_head.weight")


def load_head(folder: str | Path, dtype: torch.dtype = torch.float32) -> DraftHead:
    """Loads a head from a folder in the published layout.

    Args:
        folder: holds ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``.
        dtype: of the parameters.

    Returns:
        The head in evaluation mode, on the CPU.

    Raises:
        HeadCheckpointError: if a file is missing or damaged, or sizes disagree.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    spec = infer_spec(config, tensors, folder)
    head = DraftHead(spec)
    head.load_state_dict(_from_published(spec, tensors), strict=True)
    return head.to(dtype).eval().requires_grad_(False)


def read_spec(folder: str | Path) -> HeadSpec:
    """The sizes of a head, without building it."""
    folder = Path(folder)
    return infer_spec(_read_config(folder), _read_tensors(folder), folder)


def save_head(
    head: DraftHead, folder: str | Path, dtype: torch.dtype = torch.bfloat16, vocab_size: int | None = None
) -> None:
    """Writes ``config.json`` and ``model.safetensors`` in the published layout.

    Args:
        head: to be written.
        folder: made if it is not there.
        dtype: of the tensors.
        vocab_size: of the target, which vLLM's own EAGLE reads from the configuration.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec = head.spec
    tensors = {name: t.detach().to(dtype).contiguous().clone() for name, t in _to_published(head).items()}
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / "model.safetensors")
    config = spec.rope.to_diff_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.intermediate_size,
        "rms_norm_eps": spec.rms_norm_eps,
        "bias": spec.fc_bias,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if vocab_size is not None:
        config["vocab_size"] = vocab_size
    if spec.variant is not Variant.DENSE:
        config |= {"num_local_experts": spec.num_experts, "num_experts_per_tok": EXPERTS_PER_TOKEN}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def infer_spec(config: dict, tensors: dict[str, Tensor], source: str | Path) -> HeadSpec:
    """Infers every size from the tensors and compares it with the configuration.

    Raises:
        HeadCheckpointError: naming the tensor and both sizes.
    """

    def shape(name: str, ndim: int = 2) -> tuple[int, ...]:
        if name not in tensors:
            raise HeadCheckpointError(f"{source}: tensor {name!r} is missing; this is not a complete draft head")
        if tensors[name].ndim != ndim:
            raise HeadCheckpointError(
                f"{source}: {name!r} must have {ndim} dimensions, got shape {list(tensors[name].shape)}"
            )
        return tuple(tensors[name].shape)

    hidden, fused = shape("fc.weight")
    if fused != 2 * hidden:
        raise HeadCheckpointError(
            f"{source}: 'fc.weight' must be [H, 2H], got [{hidden}, {fused}]; heads that read several target "
            "layers (EAGLE-3) are not supported"
        )
    q_rows, kv_rows = shape(_LAYER + "self_attn.q_proj.weight")[0], shape(_LAYER + "self_attn.k_proj.weight")[0]
    if _LAYER + "mlp.gate_proj.weight" in tensors:
        variant, num_experts = Variant.DENSE, 1
        intermediate = shape(_LAYER + "mlp.gate_proj.weight")[0]
    elif _MOE + "gate.weight" in tensors:
        num_experts = len({n[len(_MOE) :].split(".")[1] for n in tensors if n.startswith(_MOE + "experts.")})
        if num_experts < EXPERTS_PER_TOKEN:
            raise HeadCheckpointError(f"{source}: a mixture needs at least two experts, got {num_experts}")
        gates = shape(_MOE + "gate.weight")[0]
        swiglu = _MOE + "experts.0.gate_proj.weight" in tensors
        variant = Variant.JAKIRO if swiglu else Variant.JAKIRO_STAR
        expected = num_experts + 2 if swiglu else num_experts
        if gates != expected:
            raise HeadCheckpointError(
                f"{source}: a {variant.value} head with {num_experts} experts needs a gate of {expected} rows, "
                f"got {gates}"
            )
        intermediate = shape(_MOE + ("experts.0.gate_proj.weight" if swiglu else "experts.0.fc.weight"))[0]
    else:
        raise HeadCheckpointError(
            f"{source}: neither '{_LAYER}mlp_moe' (jakiro, jakiro_star) nor '{_LAYER}mlp' (dense) is present; "
            "this is not a draft head"
        )

    num_heads = _count(config, "num_attention_heads", None, source)
    head_dim = _count(config, "head_dim", q_rows // num_heads, source)
    for what, rows, heads in (
        ("q_proj", q_rows, num_heads),
        ("k_proj", kv_rows, _count(config, "num_key_value_heads", num_heads, source)),
    ):
        if rows != heads * head_dim:
            raise HeadCheckpointError(
                f"{source}: {what} has {rows} rows, but config.json says {heads} heads of size {head_dim} "
                f"({heads * head_dim} rows); they must agree"
            )
    for key, found in (("hidden_size", hidden), ("num_local_experts", num_experts)):
        said = config.get(key)
        if said is not None and said != found and not (variant is Variant.DENSE and key == "num_local_experts"):
            raise HeadCheckpointError(f"{source}: config.json says {key} {_shown(said)}, the tensors say {found}")
    if config.get("num_hidden_layers", 1) != 1:
        raise HeadCheckpointError(
            f"{source}: a draft head has one layer, config.json says {_shown(config['num_hidden_layers'])}; "
            "is this a whole model?"
        )
    spec = HeadSpec(
        variant=variant,
        hidden_size=hidden,
        num_heads=num_heads,
        num_kv_heads=kv_rows // head_dim,
        head_dim=head_dim,
        intermediate_size=intermediate,
        num_experts=num_experts,
        fc_bias="fc.bias" in tensors,
        rms_norm_eps=_epsilon(config, source),
        rope=_rope_config(config, head_dim, source),
    )
    _check_complete(spec, tensors, source)
    return spec


def _count(config: dict, key: str, default: int | None, source: str | Path) -> int:
    """A positive integer of config.json."""
    value = default if config.get(key) is None else config[key]
    if type(value) is not int or value < 1:
        raise HeadCheckpointError(f"{source}: {key!r} in config.json must be a positive integer, got {_shown(value)}")
    return value


def _epsilon(config: dict, source: str | Path) -> float:
    value = 1e-6 if config.get("rms_norm_eps") is None else config["rms_norm_eps"]
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise HeadCheckpointError(
            f"{source}: 'rms_norm_eps' in config.json must be a number that is not negative, got {_shown(value)}"
        )
    return float(value)


def _shown(value: object) -> str:
    """A value from a file, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _rope_config(config: dict, head_dim: int, source: str | Path) -> LlamaConfig:
    """The rotary embedding, tried once: what it needs is known to transformers only."""
    keys = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings", "hidden_size")
    kept = {k: config[k] for k in keys if config.get(k) is not None}
    try:
        rope = LlamaConfig(num_attention_heads=config["num_attention_heads"], head_dim=head_dim, **kept)
        usable = bool(tabulate_rotary(rope, torch.arange(4)).isfinite().all())
        reason = "it is not finite"
    except Exception as error:  # nonsense surfaces as almost anything
        usable, reason = False, _reason(error)
    if not usable:
        raise HeadCheckpointError(f"{source}: the rotary embedding of config.json cannot be used ({reason})")
    return rope


def _reason(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")


def _expert_names(spec: HeadSpec) -> list[tuple[list[str], str]]:
    """Per expert: the names of the matrices before its non-linearity, and of the last one."""
    if spec.variant is Variant.DENSE:
        return [([f"{_LAYER}mlp.gate_proj.weight", f"{_LAYER}mlp.up_proj.weight"], f"{_LAYER}mlp.down_proj.weight")]
    prefixes = [f"{_MOE}experts.{i}." for i in range(spec.num_experts)]
    if spec.variant is Variant.JAKIRO:
        return [([p + "gate_proj.weight", p + "up_proj.weight"], p + "down_proj.weight") for p in prefixes]
    return [([p + "fc.weight"], p + "proj.weight") for p in prefixes]


def _published_shapes(spec: HeadSpec) -> dict[str, tuple[int, ...]]:
    c, q, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = _LAYER + "self_attn."
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (c, 2 * c),
        attention + "q_proj.weight": (q, c),
        attention + "k_proj.weight": (kv, c),
        attention + "v_proj.weight": (kv, c),
        attention + "o_proj.weight": (c, q),
        _LAYER + "post_attention_layernorm.weight": (c,),
    }
    if spec.fc_bias:
        shapes["fc.bias"] = (c,)
    if spec.num_gates:
        shapes[_MOE + "gate.weight"] = (spec.num_gates, c)
    for ups, down in _expert_names(spec):
        shapes |= {name: (spec.intermediate_size, c) for name in ups}
        shapes[down] = (c, spec.intermediate_size)
    return shapes


def _check_complete(spec: HeadSpec, tensors: dict[str, Tensor], source: str | Path) -> None:
    expected = _published_shapes(spec)
    for name, want in expected.items():
        if name not in tensors:
            raise HeadCheckpointError(f"{source}: tensor {name!r} is missing; this is not a complete draft head")
        if tuple(tensors[name].shape) != want:
            raise HeadCheckpointError(
                f"{source}: {name!r} must be {list(want)} beside the other tensors, got {list(tensors[name].shape)}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise HeadCheckpointError(f"{source}: {name!r} holds values that are not finite; the file is damaged")
    unknown = sorted(set(tensors) - set(expected) - set(_IGNORED))
    if unknown:
        raise HeadCheckpointError(f"{source}: unknown tensor {unknown[0]!r}; this is not a {spec.variant.value} head")


def _from_published(spec: HeadSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    attention = _LAYER + "self_attn."
    names = _expert_names(spec)
    ups = [[tensors[group[i]] for group, _ in names] for i in range(len(names[0][0]))]
    state = {
        "fc.weight": tensors["fc.weight"],
        "q_proj.weight": tensors[attention + "q_proj.weight"],
        "kv_proj.weight": torch.cat([tensors[f"{attention}{p}_proj.weight"] for p in "kv"]),
        "o_proj.weight": tensors[attention + "o_proj.weight"],
        "norm.weight": tensors[_LAYER + "post_attention_layernorm.weight"],
        "experts.up.weight": torch.cat([matrix for kind in ups for matrix in kind]),
        "experts.down.weight": torch.cat([tensors[down] for _, down in names], dim=1),
    }
    if spec.fc_bias:
        state["fc.bias"] = tensors["fc.bias"]
    if spec.num_gates:
        state["experts.gate.weight"] = tensors[_MOE + "gate.weight"]
    return state


def _to_published(head: DraftHead) -> dict[str, Tensor]:
    spec, attention = head.spec, _LAYER + "self_attn."
    k_weight, v_weight = head.kv_proj.weight.chunk(2)
    tensors = {
        "fc.weight": head.fc.weight,
        attention + "q_proj.weight": head.q_proj.weight,
        attention + "k_proj.weight": k_weight,
        attention + "v_proj.weight": v_weight,
        attention + "o_proj.weight": head.o_proj.weight,
        _LAYER + "post_attention_layernorm.weight": head.norm.weight,
    }
    if spec.fc_bias:
        tensors["fc.bias"] = head.fc.bias
    if head.experts.gate is not None:
        tensors[_MOE + "gate.weight"] = head.experts.gate.weight
    names = _expert_names(spec)
    ups = head.experts.up.weight.chunk(len(names[0][0]))  # gate and up of all experts, or fc alone
    downs = head.experts.down.weight.split(spec.intermediate_size, dim=1)
    for i, (group, down) in enumerate(names):
        for name, matrices in zip(group, ups, strict=True):
            tensors[name] = matrices.split(spec.intermediate_size)[i]
        tensors[down] = downs[i]
    return tensors


def _read_config(folder: Path) -> dict:
    if not folder.is_dir():
        raise HeadCheckpointError(f"head {str(folder)!r} is not a folder; give a folder in the published layout")
    path = folder / "config.json"
    if not path.is_file():
        raise HeadCheckpointError(f"{folder}: config.json is missing")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # undecodable, not JSON, numbers too long, nested too deep
        raise HeadCheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise HeadCheckpointError(f"{path} must hold an object, got {type(config).__name__}")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    for name in WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            return load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
        except pickle.UnpicklingError as error:
            # torch's own message advises to run the file's code.
            raise HeadCheckpointError(
                f"{path} cannot be read: it is damaged, or holds pickled objects that are not tensors, which are "
                "never loaded; get the head again, or as safetensors"
            ) from error
        except Exception as error:  # damaged bytes surface as almost anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
            raise HeadCheckpointError(f"{path} cannot be read, it may be damaged ({reason})") from error
    raise HeadCheckpointError(f"{folder}: no weights; expected {' or '.join(WEIGHT_FILES)}")


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """Loads tensors only: pickled code is never run."""
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError("it does not hold a dictionary of tensors")
    return loaded
