"""Where the head's training gets the target's last hidden states from: computed once and kept, or in every step.

Shapes: T tokens of a part, N its documents, C hidden size.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.training.documents import Shard, join_shards, load_shard
from jakiro_vllm.training.frozen import Target, head_spec
from jakiro_vllm.training.packing import Batch
from jakiro_vllm.training.settings import FeatureSettings
from jakiro_vllm.training.workers import Workers

__all__ = [
    "CachedFeatures",
    "FeatureSource",
    "StreamedFeatures",
    "Target",
    "cache_bytes",
    "cache_features",
    "choose_features",
    "fingerprint_documents",
    "head_spec",
    "place_features",
]

logger = logging.getLogger(__name__)

_CACHE_DTYPE = torch.bfloat16
_KEY = "features"


class FeatureSource(Protocol):
    """The features of the documents of one shard, or of several that were joined."""

    #: Whether reading waits for a disk, so that it pays to read ahead.
    reads_disk: bool

    def of(self, documents: Sequence[int]) -> list[Tensor]:
        """``[tokens, C]`` of each document, by index; on any device, of any floating dtype."""


class StreamedFeatures:
    """Computes features when they are asked for."""

    reads_disk = False

    def __init__(self, target: Target, documents: Shard, batch_tokens: int = 8192, longest: int | None = None) -> None:
        """Takes what to compute.

        Args:
            target: frozen.
            documents: of the whole training.
            batch_tokens: of a forward.
            longest: tokens of a document that are wanted; None for all.
        """
        self._target = target
        self._documents = documents
        self._batch_tokens = batch_tokens
        self._longest = longest

    def of(self, documents: Sequence[int]) -> list[Tensor]:
        """See `FeatureSource`."""
        return self._target.features(
            [self._documents.document(i)[: self._longest] for i in documents], self._batch_tokens
        )


class CachedFeatures:
    """Reads features that `cache_features` wrote."""

    reads_disk = True

    def __init__(self, files: Sequence[Path], parts: Sequence[Shard]) -> None:
        """Takes files that were checked.

        Args:
            files: one for each part.
            parts: documents; those of all parts are counted on.
        """
        self._files = list(files)
        self._offsets = [part.offsets for part in parts]
        self._firsts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        self._slices: dict[int, Any] = {}

    def of(self, documents: Sequence[int]) -> list[Tensor]:
        """See `FeatureSource`."""
        found = []
        for document in documents:
            part = bisect_right(self._firsts, document) - 1
            start, end = self._offsets[part][document - self._firsts[part] :][:2].tolist()
            found.append(self._slice(part)[start:end])
        return found

    def _slice(self, part: int) -> Any:
        """The part's tensor, of which nothing is read before a range is asked for."""
        if part not in self._slices:
            self._slices[part] = safe_open(self._files[part], framework="pt").get_slice(_KEY)
        return self._slices[part]


def place_features(batch: Batch, source: FeatureSource, device: torch.device) -> Tensor:
    """``[B, L, C]``: the features of a batch where its tokens are, 0 where there is padding."""
    documents = [place.document for places in batch.places for place in places]
    found = iter(source.of(documents))
    rows: Tensor | None = None
    for b, places in enumerate(batch.places):
        for place in places:
            own = next(found)[: place.length]
            if rows is None:
                rows = torch.zeros(*batch.tokens.shape, own.shape[-1], dtype=own.dtype, device=device)
            rows[b, place.start : place.start + place.length] = own.to(device, non_blocking=True)
    assert rows is not None, "a batch holds documents"
    return rows


def cache_bytes(tokens: int, hidden_size: int) -> int:
    """Size of a cache on disk, in bytes."""
    return tokens * hidden_size * _CACHE_DTYPE.itemsize


def choose_features(
    target: Target,
    parts: Sequence[Path | Shard],
    folder: Path,
    settings: FeatureSettings,
    longest: int | None = None,
) -> FeatureSource:
    """Decides between cache and stream, and fills the cache where it is chosen.

    Every worker calls this, and all choose alike.

    Args:
        target: frozen.
        parts: the answers, part by part, in the order in which they are joined.
        folder: of the cache.
        settings: which source, and how large a cache may be.
        longest: tokens of a document that a row of training holds; None for all.

    Raises:
        JakiroConfigError: if a cache is asked for and does not fit, or the folder holds other features.
    """
    shards = [_loaded(part) for part in parts]
    source = settings.source
    if source != "stream":
        problem = _size_problem(target, shards, folder, settings.limit_gib)
        # The free space may change between two workers' looks.
        if Workers.current().agree(problem is None):
            return cache_features(target, shards, folder, settings.batch_tokens)
        problem = problem or "another worker finds too little space"
        if source == "cache":
            raise JakiroConfigError(
                f"features cannot be cached: {problem}; raise features.limit_gib, free space, or set features.source "
                "to stream"
            )
        logger.info("features are computed in every step: %s", problem)
    return StreamedFeatures(target, join_shards(shards), settings.batch_tokens, longest)


def _size_problem(target: Target, parts: Sequence[Shard], folder: Path, limit_gib: float) -> str | None:
    """Why a cache does not fit, or None. What is there already needs no more space."""
    tokens = sum(len(part.tokens) for part in parts)
    missing = sum(len(part.tokens) for i, part in enumerate(parts) if not _file(folder, i).is_file())
    size, needed = (cache_bytes(count, target.hidden_size) / 2**30 for count in (tokens, missing))
    free = shutil.disk_usage(_existing(folder)).free / 2**30
    logger.info(
        "features of %s tokens: %.2f GiB, %.2f GiB of it to be written to %s, %.2f GiB free",
        f"{tokens:,}",
        size,
        needed,
        folder,
        free,
    )
    if size > limit_gib:
        return f"they take {size:.2f} GiB, and features.limit_gib is {limit_gib:g}"
    if needed > free:
        return f"they take {needed:.2f} GiB more, and {folder} has {free:.2f} GiB free"
    return None


def cache_features(
    target: Target, parts: Sequence[Path | Shard], folder: Path, batch_tokens: int = 8192
) -> CachedFeatures:
    """Writes a file of features for each part, unless it is there; workers share the parts.

    Args:
        target: frozen.
        parts: the answers, part by part.
        folder: of the files.
        batch_tokens: of a forward.

    Returns:
        The cache, when every worker has done its share.

    Raises:
        JakiroConfigError: if a file holds features of another target or of other documents, or is damaged.
    """
    workers = Workers.current()
    shards = [_loaded(part) for part in parts]
    files = [_file(folder, i) for i in range(len(shards))]
    stamps = [_stamp(target, shard) for shard in shards]
    for file, stamp in zip(files, stamps, strict=True):
        if file.is_file():
            _check_stamp(file, stamp)
    workers.barrier()  # nobody writes before all have looked
    missing = [i for i, file in enumerate(files) if i % workers.size == workers.rank and not file.is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(len(shards[i].tokens) for i in missing)
    with tqdm(total=total, unit="tok", unit_scale=True, desc="features", disable=not workers.is_first) as bar:
        for i in missing:
            features = torch.empty(len(shards[i].tokens), target.hidden_size, dtype=_CACHE_DTYPE)
            for first, group in _groups(shards[i], batch_tokens):
                own = torch.cat(target.features(group, batch_tokens)).to(_CACHE_DTYPE)
                features[first : first + len(own)] = own.cpu()
                bar.update(len(own))
            _write(features, files[i], stamps[i])
    workers.barrier()
    return CachedFeatures(files, shards)


def _groups(shard: Shard, batch_tokens: int) -> list[tuple[int, list[np.ndarray]]]:
    """Neighbouring documents, with their first token's index; enough for a few forwards that pad little."""
    groups: list[tuple[int, list[np.ndarray]]] = []
    filled = 0
    for i in range(len(shard)):
        document = shard.document(i)
        if not groups or filled + len(document) > 8 * batch_tokens:
            groups.append((int(shard.offsets[i]), []))
            filled = 0
        groups[-1][1].append(document)
        filled += len(document)
    return groups


def fingerprint_documents(shard: Shard) -> str:
    """Changes with any token and any boundary."""
    found = hashlib.sha256()
    for array in (shard.tokens, shard.offsets, shard.prompt_lengths):
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:32]


def _stamp(target: Target, shard: Shard) -> dict[str, str]:
    return {"target": target.name, "fingerprint": target.fingerprint, "documents": fingerprint_documents(shard)}


def _check_stamp(file: Path, stamp: dict[str, str]) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            found = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise JakiroConfigError(f"{file} is damaged ({error}); delete it and run again") from error
    if found.get("fingerprint") != stamp["fingerprint"]:
        raise JakiroConfigError(
            f"{file} holds features of target {found.get('target')!r} as it was, not of {stamp['target']!r} as it is "
            f"now; delete {file.parent} or choose another output"
        )
    if found.get("documents") != stamp["documents"]:
        raise JakiroConfigError(
            f"{file} holds features of other documents than these; delete {file.parent} or choose another output"
        )


def _write(features: Tensor, file: Path, stamp: dict[str, str]) -> None:
    """Writes a part; ``file`` either is not there or holds all of it."""
    partial = file.with_name(file.name + ".partial")
    save_file({_KEY: features}, partial, metadata=stamp)
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(partial, file)


def _file(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.safetensors"


def _loaded(part: Path | Shard) -> Shard:
    return load_shard(part) if isinstance(part, Path) else part


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
