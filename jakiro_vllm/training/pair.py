"""Makes the embedded pair: a small code model, and a Jakiro head trained on what that model writes.

``python -m jakiro_vllm.training.pair --work DIR`` needs no network: the text is the Python standard library of
the interpreter that runs it. The head is trained as ``jakiro-vllm train`` trains any; every phase resumes after an
interruption and is skipped once complete.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from jakiro_vllm.training.answers import answer_in_subprocess
from jakiro_vllm.training.corpus import (
    cut_prompts,
    encode_documents,
    encode_stream,
    python_sources,
    train_tokenizer,
    training_texts,
)
from jakiro_vllm.training.data import Prompts, are_saved, save_prompts
from jakiro_vllm.training.export import is_exported
from jakiro_vllm.training.phases import fit
from jakiro_vllm.training.resume import begin
from jakiro_vllm.training.settings import TrainSettings
from jakiro_vllm.training.target import TargetRecipe, train_target

logger = logging.getLogger(__name__)

EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"
_SUFFIXES = (".json", ".safetensors", ".jinja")


@dataclass(frozen=True)
class PairRecipe:
    """Recipes of the phases, made for two cores.

    Attributes:
        target: of the target.
        prompts: stretches of the training text that the target continues.
        held_out_prompts: stretches of files that no training has seen.
        shortest_prompt, longest_prompt: tokens of a prompt.
        head: settings of the head's training, as in a file of ``jakiro-vllm train``.
    """

    target: TargetRecipe = TargetRecipe()
    prompts: int = 4096
    held_out_prompts: int = 64
    shortest_prompt: int = 16
    longest_prompt: int = 256
    head: dict[str, Any] | None = None

    def settings(self, work: Path) -> TrainSettings:
        """Of the head's training."""
        return TrainSettings.model_validate(
            {
                "target": str(work / "target"),
                "output": work / "head",
                "data": {"sources": ["the Python standard library"], "longest_prompt": self.longest_prompt},
                **(HEAD if self.head is None else self.head),
            }
        )


#: Far fewer steps than the reference, so Muon at a high rate; more weight on the tokens, which are what verification
#: compares; a contrastive output that hardly disturbs the mixture; embeddings scaled to the features, which are 16
#: times as large; wide experts, which cost a draft little beside its LM head; and a last part that learns from the
#: head's own features.
HEAD: dict[str, Any] = {
    "generation": {"new_tokens": 256, "temperatures": [0.0, 0.8], "part": 512},
    "head": {"intermediate_size": 768},
    "optimizer": {
        "epochs": 3.0,
        "rows": 8,
        "row_length": 512,
        "lr": 2e-3,
        "muon_lr": 5e-3,
        "weight_decay": 0.0,
        "schedule": "linear",
        "warmup_steps": 30,
        "clip_value": 100.0,
        "balance_inputs": True,
        "feature_noise": 0.1,
        "rollout": [{"share": 0.6, "steps": 1}, {"share": 0.4, "steps": 2}],
        "loss": {"token": 1.0, "right_trunk": 0.1, "right_order": 1.0},
        "compile": False,
    },
    "evaluation": {"prompts": 64, "width": 4},
}


def make_target(work: Path, recipe: PairRecipe) -> None:
    """Trains ``work/target`` with its tokenizer, unless it is there."""
    output = work / "target"
    if is_exported(output):
        logger.info("target: complete, skipped")
        return
    documents = python_sources()
    texts = list(training_texts(documents))
    tokenizer = train_tokenizer(texts)
    seed = recipe.target.seed
    held_out = encode_stream(tokenizer, [d.text for d in documents if d.held_out], seed)
    train_target(tokenizer, encode_stream(tokenizer, texts, seed), held_out, output, recipe.target)


def make_answers(work: Path, recipe: PairRecipe) -> None:
    """Lets the target continue stretches of text, unless it has."""
    settings = recipe.settings(work)
    material = work / "material"
    asked = {
        name: getattr(recipe, name) for name in ("prompts", "held_out_prompts", "shortest_prompt", "longest_prompt")
    }
    begin(material, asked | {"generation": settings.generation.model_dump(mode="json")})
    if not are_saved(material / "prompts"):
        tokenizer = AutoTokenizer.from_pretrained(work / "target")
        documents = python_sources()
        train = encode_documents(tokenizer, list(training_texts(documents)))
        held_out = encode_documents(tokenizer, [d.text for d in documents if d.held_out])
        lengths = recipe.shortest_prompt, recipe.longest_prompt
        prompts = Prompts(
            cut_prompts(train, recipe.prompts, *lengths), cut_prompts(held_out, recipe.held_out_prompts, *lengths)
        )
        save_prompts(prompts, material / "prompts")
    answer_in_subprocess(material, settings)


def make_head(work: Path, recipe: PairRecipe) -> None:
    """Trains ``work/head``, unless it is there."""
    settings = recipe.settings(work)
    if is_exported(settings.output):
        logger.info("head: complete, skipped")
        return
    fit(settings, work / "material")


def publish(work: Path, output: Path) -> None:
    """Copies the finished target and head to ``output``; each folder there is replaced as a whole."""
    for name in ("target", "head"):
        partial, final = output / f"{name}.partial", output / name
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in sorted((work / name).iterdir()):
            if file.suffix in _SUFFIXES:
                shutil.copyfile(file, partial / file.name)
        if name == "head":
            _forget_folders(partial / "training.json")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    size = sum(file.stat().st_size for name in ("target", "head") for file in (output / name).iterdir())
    logger.info("published to %s, %.1f MiB", output, size / 2**20)


def _forget_folders(record: Path) -> None:
    """Takes the machine's folders out of what is published."""
    facts = json.loads(record.read_text())
    facts["settings"]["target"] = "the embedded target"
    record.write_text(json.dumps(facts, indent=2) + "\n")


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
        ("answers", make_answers),
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
        description="Train the embedded pair: a small code model, and a Jakiro draft head for it. Needs no network.",
        epilog="Run the same command again after an interruption: it resumes. "
        "Results depend on the Python version, whose standard library is the training text.",
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of intermediate results, some gigabytes")
    parser.add_argument(
        "--output", type=Path, default=EMBEDDED, help="folder that receives target/ and head/ (%(default)s)"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    make_pair(args.work, args.output)


if __name__ == "__main__":
    main()
