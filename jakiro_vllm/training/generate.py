"""The target answers itself: continuations of training prefixes, the text a draft head learns from.

A head is judged on text that the target writes, not on text that people wrote, so it is trained on the former.
Prefixes come from the training texts only. Generation runs in vLLM's offline engine, in chunks that are
written as they finish: an interrupted run resumes at the first missing chunk, and because every request has
its own seed the result is the same as without the interruption.

Shapes: N documents, T packed tokens.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from jakiro_vllm.training.corpus import python_sources, training_texts

logger = logging.getLogger(__name__)

_SHARD_KEYS = ("tokens", "offsets", "prompt_lengths")


@dataclass(frozen=True)
class GenerationRecipe:
    """What the target is asked.

    Attributes:
        num_prompts: N.
        shortest_prompt, longest_prompt: prompt lengths in tokens are log-uniform between these.
        new_tokens: longest continuation; the end of text ends it earlier.
        temperature: of every second request; the others are greedy.
        chunk: prompts per part file, the unit of resumption.
        max_num_seqs: requests that the engine runs at once.
        seed: of the cuts and of sampling.
    """

    num_prompts: int = 2048
    shortest_prompt: int = 16
    longest_prompt: int = 512
    new_tokens: int = 256
    temperature: float = 0.8
    chunk: int = 512
    max_num_seqs: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Shard:
    """Documents, each a prompt and its continuation.

    Attributes:
        tokens: ``[T] uint16`` all documents, one after the other.
        offsets: ``[N + 1] int64`` where each document starts; the last is T.
        prompt_lengths: ``[N] int64`` tokens of each document that were given, not generated.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def document(self, index: int) -> np.ndarray:
        """``[tokens of the document] uint16``."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def num_generated(self) -> int:
        """Tokens that the target wrote."""
        return len(self.tokens) - int(self.prompt_lengths.sum())


def pack_documents(prompts: Sequence[np.ndarray], continuations: Sequence[Sequence[int]]) -> Shard:
    """Joins prompts and continuations of the same order to a shard."""
    pieces, lengths = [], [0]
    for prompt, continuation in zip(prompts, continuations, strict=True):
        pieces += [np.asarray(prompt, dtype=np.uint16), np.asarray(continuation, dtype=np.uint16)]
        lengths.append(len(prompt) + len(continuation))
    return Shard(
        np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint16),
        np.cumsum(lengths, dtype=np.int64),
        np.asarray([len(prompt) for prompt in prompts], dtype=np.int64),
    )


def join_shards(shards: Sequence[Shard]) -> Shard:
    """Concatenates shards."""
    ends = np.cumsum([0, *(len(s.tokens) for s in shards)])
    offsets = [s.offsets[:-1] + end for s, end in zip(shards, ends[:-1], strict=True)]
    return Shard(
        np.concatenate([s.tokens for s in shards]),
        np.concatenate([*offsets, ends[-1:]]).astype(np.int64),
        np.concatenate([s.prompt_lengths for s in shards]),
    )


def save_shard(shard: Shard, path: Path) -> None:
    """Writes a shard; ``path`` either does not change or holds all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, tokens=shard.tokens, offsets=shard.offsets, prompt_lengths=shard.prompt_lengths)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_shard(path: Path) -> Shard:
    """Reads a shard.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not a shard, or its offsets do not fit its tokens.
    """
    with np.load(path) as file:
        missing = sorted(set(_SHARD_KEYS) - set(file.files))
        if missing:
            raise ValueError(f"{path} is not a shard, it lacks {', '.join(missing)}; delete it and generate again")
        shard = Shard(*(file[key] for key in _SHARD_KEYS))
    if len(shard.offsets) != len(shard) + 1 or shard.offsets[-1] != len(shard.tokens):
        raise ValueError(
            f"{path}: {len(shard.tokens)} tokens and {len(shard)} documents do not fit its offsets; "
            "delete it and generate again"
        )
    return shard


def cut_prompts(documents: Sequence[np.ndarray], recipe: GenerationRecipe) -> list[np.ndarray]:
    """Cuts prompts at seeded random places.

    A document is drawn with a probability proportional to its tokens. Half of the prompts begin where their
    document begins, as most requests do; the others begin anywhere.

    Args:
        documents: ``[tokens] uint16`` each, training texts only.
        recipe: how many and how long.

    Returns:
        ``num_prompts`` prompts of at least one token each.

    Raises:
        ValueError: if no document is long enough to be cut.
    """
    documents = [d for d in documents if len(d) > recipe.shortest_prompt]
    if not documents:
        raise ValueError(
            f"no document has more than {recipe.shortest_prompt} tokens; lower shortest_prompt or give more text"
        )
    rng = np.random.default_rng(recipe.seed)
    sizes = np.asarray([len(d) for d in documents], dtype=np.float64)
    chosen = rng.choice(len(documents), size=recipe.num_prompts, p=sizes / sizes.sum())
    low, high = np.log(recipe.shortest_prompt), np.log(recipe.longest_prompt)
    prompts = []
    for index in chosen:
        document = documents[index]
        # A continuation needs a text that goes on, so at least one token stays behind the cut.
        length = min(round(np.exp(rng.uniform(low, high))), len(document) - 1)
        start = 0 if rng.random() < 0.5 else int(rng.integers(len(document) - length))
        prompts.append(document[start : start + length])
    return prompts


def encode_documents(target: Path, texts: Sequence[str]) -> list[np.ndarray]:
    """Encodes texts with the target's tokenizer: ``[tokens] uint16`` each."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [np.asarray(ids, dtype=np.uint16) for ids in encoded]


def is_complete(output: Path, recipe: GenerationRecipe) -> bool:
    """Whether ``output`` holds everything that ``recipe`` asks for."""
    return _matches(output, recipe) and all((output / name).is_file() for name in _part_names(recipe))


def load_generated(output: Path, recipe: GenerationRecipe) -> Shard:
    """Reads a finished generation."""
    return join_shards([load_shard(output / name) for name in _part_names(recipe)])


def generate(target: Path, documents: Sequence[np.ndarray], output: Path, recipe: GenerationRecipe) -> Shard:
    """Lets the target continue prompts, or resumes doing so.

    Args:
        target: folder of the target.
        documents: ``[tokens] uint16`` each, where prompts are cut from; training texts only.
        output: folder of the part files.
        recipe: what to ask.

    Returns:
        All documents.

    Raises:
        ValueError: if ``output`` was begun with another recipe.
    """
    output.mkdir(parents=True, exist_ok=True)
    settings = output / "recipe.json"
    if not settings.exists():
        settings.write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    elif not _matches(output, recipe):
        raise ValueError(f"{output} was begun with another recipe; delete it or choose another folder")
    prompts = cut_prompts(documents, recipe)
    missing = [i for i, name in enumerate(_part_names(recipe)) if not (output / name).is_file()]
    if missing:
        _run_engine(target, prompts, output, recipe, missing)
    return load_generated(output, recipe)


def _part_names(recipe: GenerationRecipe) -> list[str]:
    return [f"part-{i:04d}.npz" for i in range(-(-recipe.num_prompts // recipe.chunk))]


def _matches(output: Path, recipe: GenerationRecipe) -> bool:
    settings = output / "recipe.json"
    return settings.is_file() and json.loads(settings.read_text()) == asdict(recipe)


def _configure_engine() -> None:
    """Sets what vLLM reads from the environment, where the user has not; before vLLM is imported."""
    cores = sorted(os.sched_getaffinity(0))
    # One process: nothing else runs meanwhile, so the engine may have every core and needs no second process.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def _run_engine(
    target: Path, prompts: list[np.ndarray], output: Path, recipe: GenerationRecipe, missing: list[int]
) -> None:
    _configure_engine()
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(
        model=str(target),
        dtype="float32",
        enforce_eager=True,  # compiling takes longer than it saves in a few minutes
        max_num_seqs=recipe.max_num_seqs,
        max_model_len=recipe.longest_prompt + recipe.new_tokens,
        # vLLM rewinds the generator of a seeded request whose prompt it cuts, which CPU generators cannot do.
        enable_chunked_prefill=False,
        seed=recipe.seed,
        disable_log_stats=True,
    )
    started, done = time.monotonic(), 0
    names = _part_names(recipe)
    for count, part in enumerate(missing, start=1):
        first = part * recipe.chunk
        asked = prompts[first : first + recipe.chunk]
        params = [
            SamplingParams(
                temperature=recipe.temperature if (first + i) % 2 else 0.0,
                seed=recipe.seed + first + i if (first + i) % 2 else None,
                max_tokens=recipe.new_tokens,
                detokenize=False,
            )
            for i in range(len(asked))
        ]
        inputs = [TokensPrompt(prompt_token_ids=prompt.tolist()) for prompt in asked]
        answers = engine.generate(inputs, params, use_tqdm=False)
        shard = pack_documents(asked, [list(answer.outputs[0].token_ids) for answer in answers])
        save_shard(shard, output / names[part])
        done += shard.num_generated
        rate = done / (time.monotonic() - started)
        left = (len(missing) - count) * done / count / rate / 60
        logger.info("generated %d/%d parts, %.0f tokens/s, %.0f min left", count, len(missing), rate, left)


def main() -> None:
    """Command line of this step; a process of its own, since vLLM pins the threads of the one it runs in."""
    parser = argparse.ArgumentParser(description="Let a target continue prefixes of the training text.")
    parser.add_argument("--target", type=Path, required=True, help="folder of the target")
    parser.add_argument("--output", type=Path, required=True, help="folder of the part files; resumed if it exists")
    for field in fields(GenerationRecipe):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default, help="default: %(default)s")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = GenerationRecipe(**{field.name: getattr(args, field.name) for field in fields(GenerationRecipe)})
    documents = encode_documents(args.target, list(training_texts(python_sources())))
    started = time.monotonic()
    shard = generate(args.target, documents, args.output, recipe)
    logger.info(
        "%d documents, %d prompt and %d generated tokens, %.0f s",
        len(shard),
        shard.prompt_lengths.sum(),
        shard.num_generated,
        time.monotonic() - started,
    )


if __name__ == "__main__":
    main()
