"""The command ``jakiro-vllm``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jakiro_vllm import __version__
from jakiro_vllm.errors import HeadCheckpointError, JakiroError

if TYPE_CHECKING:
    from jakiro_vllm.draft.fit import TargetSizes

_SPECULATION_FLAGS = ("--speculative-model", "--speculative-config", "-sc", "--spec-model", "--spec-method")
_TARGET_FLAGS = ("--model", "--config", "-h", "--help", "--help=all")


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["serve"]:  # everything after it is vLLM's
        return serve(argv[1:])
    parser = argparse.ArgumentParser(prog="jakiro-vllm", description="Token-tree speculative decoding for vLLM.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="vllm serve with trees: [TARGET] [any flag of vllm serve]", add_help=False)
    inspect = commands.add_parser("inspect", help="print what a draft head is, and whether it fits a target")
    inspect.add_argument("head", metavar="HEAD", help="a folder, a Hugging Face name, or 'jakiro' with --target")
    inspect.add_argument("--target", help="folder or Hugging Face name of the target")
    demo = commands.add_parser("demo", help="serve the embedded pair, with and without trees, and compare")
    demo.add_argument("--output", type=Path, default=Path("demo.json"), help="where the figures go")
    demo.add_argument("--max-tokens", type=int, default=128, help="length of each completion")
    train = commands.add_parser("train", help="train a draft head for a target")
    if argv[:1] == ["train"]:  # reading its many settings takes a while
        from jakiro_vllm.training.command import add_arguments

        add_arguments(train)
    args = parser.parse_args(argv)
    try:
        if args.command == "train":
            from jakiro_vllm.training.command import run

            return run(args)
        if args.command == "inspect":
            return inspect_head(args.head, args.target)
        from jakiro_vllm.demo import run_demo

        return run_demo(args.output, args.max_tokens)
    except JakiroError as error:
        print(f"jakiro-vllm: {error}", file=sys.stderr)
        return 1


def serve(arguments: list[str]) -> int:
    """Replaces this process by ``vllm serve`` with trees.

    The target comes first, as in ``vllm serve TARGET``; without one the embedded target is served. Without a
    flag that says otherwise it drafts with the target's published head.
    """
    from jakiro_vllm.draft.registry import EMBEDDED_TARGET
    from jakiro_vllm.environment import server_environment

    flags = {argument.split("=")[0].replace("_", "-") for argument in arguments if argument.startswith("-")}
    if (not arguments or arguments[0].startswith("-")) and not flags.intersection(_TARGET_FLAGS):
        arguments = [str(EMBEDDED_TARGET), *arguments]
    if not flags.intersection(_SPECULATION_FLAGS):
        arguments = [*arguments, "--speculative-model", "jakiro"]
    command = [str(Path(sys.executable).parent / "vllm"), "serve", *arguments]
    os.execve(command[0], command, server_environment())


def inspect_head(name: str, target: str | None) -> int:
    """Prints a head's sizes; with a target, compares them.

    Raises:
        HeadCheckpointError: if the head is unreadable or does not fit.
    """
    from jakiro_vllm.draft.candidates import resolve_policy
    from jakiro_vllm.draft.checkpoint import load_head
    from jakiro_vllm.draft.fit import check_fit
    from jakiro_vllm.draft.registry import locate_head

    if name == "jakiro" and target is None:
        raise HeadCheckpointError("head 'jakiro' means the published head of a target: name it with --target")
    folder = locate_head(name, target or "")
    head = load_head(folder)
    spec = head.spec
    rows = {
        "head": str(folder),
        "variant": spec.variant.value,
        "parameters": f"{sum(p.numel() for p in head.parameters()):,}",
        "hidden size": spec.hidden_size,
        "experts": f"{spec.num_experts} of intermediate size {spec.intermediate_size}",
        "attention": f"{spec.num_heads} heads, {spec.num_kv_heads} KV heads, head size {spec.head_dim}",
        "levels of the last forward": 2 if spec.has_contrast else 1,
        "candidates": resolve_policy("auto", spec),
    }
    if target is not None:
        sizes = read_target_sizes(target)
        check_fit(spec, str(folder), sizes)
        rows["fits"] = f"{target} (hidden size {sizes.hidden_size}, {sizes.num_kv_heads} KV heads of {sizes.head_dim})"
    width = max(len(key) for key in rows)
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")
    return 0


def read_target_sizes(target: str) -> TargetSizes:
    """Reads a target's sizes from its configuration.

    Raises:
        HeadCheckpointError: if there is none.
    """
    from transformers import AutoConfig

    from jakiro_vllm.draft.fit import TargetSizes

    try:
        config = AutoConfig.from_pretrained(target).get_text_config()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HeadCheckpointError(
            f"target {target!r} cannot be read ({reason}); give a folder or a hub name"
        ) from error
    heads = config.num_attention_heads
    return TargetSizes(
        name=target,
        hidden_size=config.hidden_size,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


if __name__ == "__main__":
    sys.exit(main())
