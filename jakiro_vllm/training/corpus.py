"""The text of the embedded pair: the Python sources that a CPython installation carries.

Every machine that can run this project already has this text, so nothing is downloaded. A file belongs to
the held-out set by the hash of its path below the standard library, so the split is the same everywhere.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

# Tables and generated data: they compress well and teach a code model nothing.
_SKIPPED_PARTS = ("site-packages", "pydoc_data", "encodings", "__pycache__", "idlelib")
_MAX_FILE_BYTES = 200_000
_HELD_OUT_EVERY = 50

# A base model has no dialogue format; the chat endpoint simply continues the joined messages.
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@dataclass(frozen=True)
class Document:
    """One training text.

    Attributes:
        name: path below the standard library, with ``/`` between its parts.
        text: the source.
        held_out: whether training must never see it.
    """

    name: str
    text: str
    held_out: bool


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def python_sources(root: Path | None = None) -> list[Document]:
    """Reads the sources below ``root`` (default: the running interpreter's standard library).

    Args:
        root: folder to read.

    Returns:
        The documents in path order; about one file in 50 is held out.

    Raises:
        FileNotFoundError: if ``root`` holds no usable source.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part in _SKIPPED_PARTS for part in relative.parts):
            continue
        if not 200 <= path.stat().st_size <= _MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # the test suite carries sources in other encodings on purpose
        name = relative.as_posix()
        documents.append(Document(name, text, _digest(name) % _HELD_OUT_EVERY == 0))
    if not documents:
        raise FileNotFoundError(f"no Python sources below {root}; give a CPython standard library folder")
    return documents


def top_level_blocks(text: str) -> list[str]:
    """Splits a source at its top-level definitions, comments and decorators included.

    Returns:
        The blocks, in order; ``[text]`` if it does not parse.
    """
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return [text]
    lines = text.splitlines(keepends=True)
    starts = [0]
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            while first > 0 and lines[first - 1].startswith("#"):
                first -= 1
            if first > starts[-1]:
                starts.append(first)
    ends = [*starts[1:], len(lines)]
    blocks = ("".join(lines[a:b]).strip() + "\n" for a, b in zip(starts, ends, strict=True))
    return [block for block in blocks if len(block) > 40]


def training_texts(documents: list[Document]) -> Iterator[str]:
    """Yields training texts: half of the files whole, the other half definition by definition.

    The second half teaches the model to end its text where a definition ends.
    """
    for document in documents:
        if document.held_out:
            continue
        if _digest(document.name) // _HELD_OUT_EVERY % 2 == 0:
            yield document.text
        else:
            yield from top_level_blocks(document.text)


def train_tokenizer(texts: list[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE in which a run of indentation is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def encode_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int) -> np.ndarray:
    """Encodes the texts in a seeded order, each ended by ``END_OF_TEXT``.

    Returns:
        ``[T] uint16`` packed tokens.
    """
    order = np.random.default_rng(seed).permutation(len(texts))
    encoded = tokenizer([texts[i] for i in order], add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    return np.concatenate([np.asarray(ids + end, dtype=np.uint16) for ids in encoded])


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """Encodes texts: ``[tokens] uint32`` each."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [np.asarray(ids, dtype=np.uint32) for ids in encoded]


def cut_prompts(
    documents: Sequence[np.ndarray], count: int, shortest: int, longest: int, seed: int = 0
) -> list[np.ndarray]:
    """Cuts prompts at seeded random places, their lengths log-uniform.

    A document is drawn with a probability proportional to its tokens. Half of the prompts begin where their
    document begins, as most requests do; the others begin anywhere.

    Args:
        documents: ``[tokens] uint32`` each.
        count: prompts.
        shortest, longest: tokens of a prompt.
        seed: of the cuts.

    Returns:
        ``count`` prompts; behind each at least one token of its document is left.

    Raises:
        ValueError: if no document is long enough to be cut.
    """
    documents = [document for document in documents if len(document) > shortest]
    if not documents:
        raise ValueError(f"no document has more than {shortest} tokens; lower shortest or give more text")
    rng = np.random.default_rng(seed)
    sizes = np.asarray([len(document) for document in documents], dtype=np.float64)
    chosen = rng.choice(len(documents), size=count, p=sizes / sizes.sum())
    prompts = []
    for index in chosen:
        document = documents[index]
        length = min(round(np.exp(rng.uniform(np.log(shortest), np.log(longest)))), len(document) - 1)
        start = 0 if rng.random() < 0.5 else int(rng.integers(len(document) - length))
        prompts.append(document[start : start + length])
    return prompts
