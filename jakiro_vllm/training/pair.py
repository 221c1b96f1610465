"""Makes the embedded pair: a small code model, and a Jakiro head trained on what that model writes.

``python -m jakiro_vllm.training.pair --work DIR`` needs no network: the text is the Python standard library of
the interpreter that runs it. Every phase resumes after an interruption and is skipped once complete.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from jakiro_vllm.training.corpus import encode_stream, python_sources, train_tokenizer, training_texts
from jakiro_vllm.training.evaluate import greedy_documents, prefixes
from jakiro_vllm.training.generate import GenerationRecipe, Shard, encode_documents, is_complete, load_generated
from jakiro_vllm.training.head import HeadRecipe, head_spec, train_head
from jakiro_vllm.training.losses import LossWeights
from jakiro_vllm.training.target import TargetRecipe, train_target

logger = logging.getLogger(__name__)

EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"
#: Written last by a phase that makes a model, so its presence means that the model is complete.
_RECORD = "training.json"
_SUFFIXES = (".json", ".safetensors", ".jinja")


@dataclass(frozen=True)
class PairRecipe:
    """Recipes of the phases, chosen to fit two cores for two hours.

    Attributes:
        target: of the target.
        generation: of the text that the head learns from.
        head: of the head. Far fewer steps than the reference, so a far higher learning rate; more weight on
            the tokens, which are what verification compares; and a last quarter that learns from its own features.
        held_out_prompts, held_out_prompt_tokens, held_out_new_tokens: the text that the head is measured on.
    """

    target: TargetRecipe = TargetRecipe()
    generation: GenerationRecipe = GenerationRecipe()
    head: HeadRecipe = HeadRecipe(
        epochs=2.0,
        rows_per_step=5,
        row_length=768,
        lr=2e-3,
        warmup_steps=50,
        feature_noise=0.1,
        rollout=((0.75, 1), (0.25, 2)),
        loss=LossWeights(token=1.0),
    )
    held_out_prompts: int = 64
    held_out_prompt_tokens: int = 128
    held_out_new_tokens: int = 128


def make_target(work: Path, recipe: PairRecipe) -> None:
    """Trains ``work/target`` with its tokenizer, unless it is there."""
    output = work / "target"
    if (output / _RECORD).is_file():
        logger.info("target: complete, skipped")
        return
    documents = python_sources()
    texts = list(training_texts(documents))
    tokenizer = train_tokenizer(texts)
    seed = recipe.target.seed
    held_out = encode_stream(tokenizer, [d.text for d in documents if d.held_out], seed)
    train_target(tokenizer, encode_stream(tokenizer, texts, seed), held_out, output, recipe.target)


def make_generation(work: Path, recipe: PairRecipe) -> None:
    """Lets the target write ``work/generated``, unless it is there.

    In a process of its own: vLLM pins the threads of the process it runs in, which would slow the next phase.

    Raises:
        subprocess.CalledProcessError: if generation fails; its own output says why.
    """
    output = work / "generated"
    if is_complete(output, recipe.generation):
        logger.info("generation: complete, skipped")
        return
    command = [sys.executable, "-m", "jakiro_vllm.training.generate"]
    settings = {"target": work / "target", "output": output} | asdict(recipe.generation)
    for name, value in settings.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    subprocess.run(command, check=True)


def make_head(work: Path, recipe: PairRecipe) -> None:
    """Trains ``work/head``, unless it is there."""
    output = work / "head"
    if (output / _RECORD).is_file():
        logger.info("head: complete, skipped")
        return
    target = LlamaForCausalLM.from_pretrained(work / "target", dtype=torch.float32).eval()
    train_head(
        target,
        head_spec(target.config),
        load_generated(work / "generated", recipe.generation),
        held_out_documents(target, work / "target", recipe),
        output,
        recipe.head,
    )


def held_out_documents(target: LlamaForCausalLM, folder: Path, recipe: PairRecipe) -> Shard:
    """The target's greedy continuations of held-out prefixes.

    Args:
        target: the model, in the precision to run it in.
        folder: where its tokenizer is.
        recipe: how many and how long.
    """
    documents = encode_documents(folder, [d.text for d in python_sources() if d.held_out])
    prompts = prefixes(documents, recipe.held_out_prompts, recipe.held_out_prompt_tokens)
    return greedy_documents(target, prompts, recipe.held_out_new_tokens)


def publish(work: Path, output: Path) -> None:
    """Copies the finished target and head to ``output``; each folder there is replaced as a whole."""
    for name in ("target", "head"):
        partial, final = output / f"{name}.partial", output / name
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in sorted((work / name).iterdir()):
            if file.suffix in _SUFFIXES:
                shutil.copyfile(file, partial / file.name)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    size = sum(file.stat().st_size for name in ("target", "head") for file in (output / name).iterdir())
    logger.info("published to %s, %.1f MiB", output, size / 2**20)


def make_pair(work: Path, output: Path, recipe: PairRecipe = PairRecipe()) -> None:
    """Runs every phase that is not complete, publishes the pair and logs what each phase took.

    Args:
        work: folder of intermediate results; keep it to resume.
        output: folder that receives ``target`` and ``head``.
        recipe: recipes of the phases.
    """
    work.mkdir(parents=True, exist_ok=True)
    phases: list[tuple[str, Callable[[Path, PairRecipe], None]]] = [
        ("target", make_target),
        ("generation", make_generation),
        ("head", make_head),
    ]
    minutes = []
    for name, phase in phases:
        started = time.monotonic()
        phase(work, recipe)
        minutes.append((name, (time.monotonic() - started) / 60))
    publish(work, output)
    logger.info(
        "%s, %.1f min in all",
        ", ".join(f"{name} {spent:.1f} min" for name, spent in minutes),
        sum(spent for _, spent in minutes),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jakiro_vllm.training.pair",
        description="Train the embedded pair: a small code model, and a Jakiro draft head for it. "
        "Made to fit two hours on two cores; needs no network.",
        epilog="Run the same command again after an interruption: it resumes. "
        "Results depend on the Python version, whose standard library is the training text.",
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of intermediate results, about 100 MB")
    parser.add_argument(
        "--output", type=Path, default=EMBEDDED, help="folder that receives target/ and head/ (%(default)s)"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    make_pair(args.work, args.output)


if __name__ == "__main__":
    main()
