"""A pair that computes the embedded pair's function at the cost of a larger one.

    .venv/bin/python benchmarks/cost_scaled.py --shape 1B --output build/pair-1B

What a speculative decoder gains depends on how well the head foresees its target and on what each forward costs. A
machine that can neither train nor download a 1B pair can still measure both honestly: the same tokens and the same
acceptance, at the cost of 1B parameters. The vocabulary stays the small one, so the LM head, which a draft pays more
often than a verification, is cheaper than a real pair's; reports must say that a pair is cost-scaled.

Wider: residual stream, heads and MLPs are padded with zeros; an RMSNorm over H' instead of H dimensions divides by
less, so its weights are multiplied by sqrt(H / H') and its epsilon by H / H'. Deeper: further layers are copies of the
first ones that add zero. Multiplications by zero cost what others do.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jakiro_vllm.draft.checkpoint import read_spec
from jakiro_vllm.draft.head import Variant
from jakiro_vllm.draft.registry import EMBEDDED_HEAD, EMBEDDED_TARGET

WEIGHTS = "model.safetensors"
#: Intermediate size of all experts together, in hidden sizes; GELU experts have two matrices where others have three.
MLP_WIDTH = {Variant.JAKIRO: 2, Variant.JAKIRO_STAR: 3, Variant.DENSE: 2}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like target; its head size stays the small pair's.

    Attributes:
        hidden: H'.
        layers: of the target.
        intermediate: of a layer's MLP.
        heads: query heads.
        kv_heads: KV heads.
    """

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int


#: With 64 dimensions per head, as many bytes of weights and KV per token as the models that give the names.
SHAPES = {
    "0.5B": Shape(896, 24, 4864, 14, 2),
    "1B": Shape(2048, 16, 8192, 32, 8),
    "8B": Shape(4096, 32, 14336, 64, 16),
}


class Padding:
    """Places the tensors of a small model in those of a large one."""

    def __init__(self, config: dict[str, Any], shape: Shape) -> None:
        """Checks that everything fits.

        Args:
            config: the small model's config.json.
            shape: the large sizes.

        Raises:
            ValueError: if a size would shrink, or query heads would change their KV head.
        """
        self.hidden, self.large = config["hidden_size"], shape.hidden
        self.dim = config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        group, large_group = heads // kv_heads, shape.heads // shape.kv_heads
        for what, small, large in (
            ("hidden size", self.hidden, shape.hidden),
            ("KV heads", kv_heads, shape.kv_heads),
            ("query heads per KV head", group, large_group),
        ):
            if small > large:
                raise ValueError(f"{what} cannot shrink from {small} to {large}; choose a larger shape")
        # Query head i reads KV head i // group; in the large model it must read the same one.
        self.query_heads = [i // group * large_group + i % group for i in range(heads)]
        self.kv_heads = list(range(kv_heads))
        self.rows = {"q": shape.heads * self.dim, "kv": shape.kv_heads * self.dim}

    def stream(self, x: Tensor, axis: int) -> Tensor:
        """Pads the residual stream's axis."""
        return _pad(x, axis, self.large)

    def norm(self, weight: Tensor) -> Tensor:
        """In float32, where the factor changes nothing but the exponent or the last bit."""
        return self.stream(weight.float() * (self.hidden / self.large) ** 0.5, 0)

    def fused(self, weight: Tensor) -> Tensor:
        """``[H, 2 H]``, which reads an embedding and a feature side by side."""
        halves = [self.stream(half, 1) for half in weight.chunk(2, dim=1)]
        return self.stream(torch.cat(halves, dim=1), 0)

    def attention(self, weight: Tensor, name: str) -> Tensor:
        """A projection, its heads where their KV heads are."""
        axis = 1 if name == "o_proj" else 0
        places, rows = (self.kv_heads, "kv") if name in ("k_proj", "v_proj") else (self.query_heads, "q")
        sizes = list(weight.shape)
        sizes[axis] = self.rows[rows]
        padded = weight.new_zeros(sizes)
        for i, place in enumerate(places):
            padded.narrow(axis, place * self.dim, self.dim).copy_(weight.narrow(axis, i * self.dim, self.dim))
        return self.stream(padded, 1 - axis)

    def mlp(self, weight: Tensor, name: str, intermediate: int) -> Tensor:
        """A matrix into or out of an MLP."""
        axis = 1 if name in ("down_proj", "proj") else 0
        return self.stream(_pad(weight, axis, intermediate), 1 - axis)

    def layer_tensor(self, name: str, weight: Tensor, intermediate: int) -> Tensor:
        """Any tensor of a decoder layer, of the target or of a head."""
        owner, leaf = name.split(".")[-3:-1]
        if leaf.endswith("layernorm"):
            return self.norm(weight)
        if owner == "self_attn":
            return self.attention(weight, leaf)
        if leaf == "gate":
            return self.stream(weight, 1)
        return self.mlp(weight, leaf, intermediate)


def _pad(x: Tensor, axis: int, size: int) -> Tensor:
    padded = x.new_zeros([size if i == axis else n for i, n in enumerate(x.shape)])
    padded.narrow(axis, 0, x.shape[axis]).copy_(x)
    return padded


def scale_target(source: Path, output: Path, shape: Shape) -> None:
    """Writes the target, one file per layer.

    Args:
        source: a Llama checkpoint without biases.
        output: made if it is not there.
        shape: its new sizes.
    """
    output.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    padding, small = Padding(config, shape), load_file(source / "model.safetensors")
    index: dict[str, str] = {}

    def write(name: str, tensors: dict[str, Tensor]) -> None:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, output / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    outside = {name: x for name, x in small.items() if ".layers." not in name}
    write(
        "outside.safetensors",
        {n: padding.norm(x) if n == "model.norm.weight" else padding.stream(x, 1) for n, x in outside.items()},
    )
    count = config["num_hidden_layers"]
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer % count}."
        tensors = {
            f"model.layers.{layer}.{name.removeprefix(prefix)}": padding.layer_tensor(name, x, shape.intermediate)
            for name, x in small.items()
            if name.startswith(prefix)
        }
        if layer >= count:
            for name, tensor in tensors.items():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    tensor.zero_()
        write(f"layer-{layer}.safetensors", tensors)
    total = sum((output / name).stat().st_size for name in set(index.values()))
    listing = {"metadata": {"total_size": total}, "weight_map": index}
    (output / "model.safetensors.index.json").write_text(json.dumps(listing))
    _write_config(config, shape, output, {"num_hidden_layers": shape.layers, "intermediate_size": shape.intermediate})
    for file in _companions(source):
        shutil.copyfile(file, output / file.name)


def scale_head(source: Path, output: Path, shape: Shape) -> None:
    """Writes the head; its experts together get as many parameters as those of published heads of that hidden size.

    Those have two experts, whose intermediate size is the hidden size. Heads of other variants and numbers of experts
    get as many, so that heads with equal parameters still have them.

    Args:
        source: a head in the published layout.
        output: made if it is not there.
        shape: the target's new sizes.
    """
    output.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    padding, small = Padding(config, shape), load_file(source / WEIGHTS)
    spec = read_spec(source)
    intermediate = max(shape.hidden * MLP_WIDTH[spec.variant] // spec.num_experts, spec.intermediate_size)
    outside: dict[str, Callable[[Tensor], Tensor]] = {
        "fc.weight": padding.fused,
        "fc.bias": lambda bias: padding.stream(bias, 0),
    }
    large = {
        name: outside[name](x) if name in outside else padding.layer_tensor(name, x, intermediate)
        for name, x in small.items()
    }
    save_file({name: x.contiguous() for name, x in large.items()}, output / WEIGHTS, {"format": "pt"})
    _write_config(config, shape, output, {"intermediate_size": intermediate})


def _write_config(config: dict[str, Any], shape: Shape, output: Path, more: dict[str, int]) -> None:
    sizes = {
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": config["rms_norm_eps"] * config["hidden_size"] / shape.hidden,
    }
    (output / "config.json").write_text(json.dumps(config | sizes | more, indent=2, sort_keys=True) + "\n")


def _companions(source: Path) -> Iterator[Path]:
    """Tokenizer and generation settings."""
    for file in sorted(source.iterdir()):
        if file.suffix in (".json", ".jinja") and file.name not in ("config.json", "training.json"):
            yield file


def scale_pair(target: Path, head: Path, output: Path, shape: Shape) -> None:
    """Writes ``output/target`` and ``output/head``."""
    scale_target(target, output / "target", shape)
    scale_head(head, output / "head", shape)
    (output / "shape.json").write_text(json.dumps(asdict(shape)) + "\n")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--target", type=Path, default=EMBEDDED_TARGET)
    parser.add_argument("--head", type=Path, default=EMBEDDED_HEAD)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    scale_pair(args.target, args.head, args.output, SHAPES[args.shape])
    return 0


if __name__ == "__main__":
    sys.exit(main())
