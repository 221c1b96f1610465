"""Builds, loads and calls the compiled kernel, ``native.cpp``.

The library is built on the machine that runs it, for that machine's instruction set, once: it is kept in the
user's cache under a name that changes with the source, the compiler, the flags and the processor. It needs a
C++ compiler and nothing else, no headers of Python or torch; where there is none, ``cpu_kernel`` does the work.

The name can be guessed, so a library is loaded only from where nobody else could have put it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from . import TreeJobs

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.cpp")
COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-fopenmp", "-w")
#: Head sizes and page sizes are read in pieces of this many numbers.
UNIT = 16
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LAYOUTS = {"vec": 0, "amx": 1}
ERRORS = {
    1: (MemoryError, "tree_attention ran out of memory"),
    2: (ValueError, "KV layout 'amx' holds bfloat16 only"),
    3: (ValueError, "a tree has at most 64 nodes"),
}

_TENSORS = ("query", "pages", "keys", "values", "out")
_JOBS = ("context_lens", "row_starts", "row_counts", "node_starts", "node_counts")
_ADDRESSES = (*_JOBS, "ancestors", "depths")
_NUMBERS = ("jobs", "heads", "kv_heads", "dim", "block", "window", "threads", "dtype", "layout")


def _fields() -> list[tuple[str, type[Any]]]:
    fields: list[tuple[str, type[Any]]] = []
    for name in _TENSORS:
        fields += [(name, ctypes.c_void_p), (f"{name}_row", ctypes.c_int64), (f"{name}_head", ctypes.c_int64)]
    fields += [("tables", ctypes.c_void_p), ("table_row", ctypes.c_int64)]
    fields += [(name, ctypes.c_void_p) for name in _ADDRESSES]
    fields += [(name, ctypes.c_int64) for name in _NUMBERS]
    return [*fields, ("scale", ctypes.c_float), ("softcap", ctypes.c_float)]


class Call(ctypes.Structure):
    """The arguments; ``Call`` in native.cpp."""

    _fields_ = _fields()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, built if need be, or None where that is impossible, which is logged once."""
    found = compiler()
    if found is None:
        logger.warning("No C++ compiler (%s) found: attention of trees runs in PyTorch, 2-4x slower", COMPILERS[0])
        return None
    try:
        return load(build(found))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.warning("The tree attention kernel cannot be built, so PyTorch does its work: %s", reason)
        return None


def compiler() -> str | None:
    """Path of a C++ compiler."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def load(path: Path) -> ctypes.CDLL:
    """Loads a library.

    Raises:
        OSError: if it lacks something, as when the process has no OpenMP runtime.
    """
    loaded = ctypes.CDLL(str(path))
    loaded.tree_attention.argtypes = [ctypes.POINTER(Call)]
    loaded.tree_attention.restype = ctypes.c_int
    return loaded


def build(compiler: str) -> Path:
    """Path of the library, which is compiled unless the cache has it.

    Raises:
        OSError: if nothing can be written.
        subprocess.CalledProcessError: if the compiler fails.
    """
    key = hashlib.sha256()
    for part in (SOURCE.read_bytes(), os.path.realpath(compiler).encode(), " ".join(FLAGS).encode(), _processor()):
        key.update(hashlib.sha256(part).digest())
    name = f"tree_attention-{key.hexdigest()[:16]}.so"
    folder = _cache_folder()
    if folder is None:
        # Removed when the process ends; meanwhile it is the process's own.
        folder = Path(_process_folder().name)
    built = folder / name
    if not _is_private_file(built):
        with tempfile.TemporaryDirectory(dir=folder) as work:
            compiled, linked = Path(work, "native.o"), Path(work, "native.so")
            # Linked without -fopenmp: the OpenMP runtime must be the one that torch has loaded, whose threads
            # vLLM has bound to cores; a second one would compete with them.
            for command in (
                [compiler, *FLAGS, "-c", "-o", compiled, SOURCE],
                [compiler, "-shared", "-o", linked, compiled],
            ):
                subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
            linked.chmod(0o700)
            os.replace(linked, built)  # whole or not at all, whoever else is at it
    return built


def _cache_folder() -> Path | None:
    """The user's cache, made if need be and closed to others; None if others could write there all the same.

    Raises:
        OSError: if it cannot be made.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    if not base.is_absolute():  # the XDG specification has relative paths ignored
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    folder = base / "jakiro_vllm"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.resolve()
    if folder.stat().st_uid == os.geteuid():
        folder.chmod(0o700)  # an earlier version, or a lenient umask, may have left it open
    open_to_others = next(filter(_open_to_others, (folder, *folder.parents)), None)
    if open_to_others is None:
        return folder
    logger.warning(
        "The tree attention kernel is built for this process only, because another user could write into its cache: "
        "%s; close that folder, or point XDG_CACHE_HOME elsewhere",
        open_to_others,
    )
    return None


def _open_to_others(folder: Path) -> bool:
    """Whether a user other than this one and root could put something into a folder, or replace what is there."""
    status = folder.stat()
    if status.st_uid not in (0, os.geteuid()):
        return True
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)) and not status.st_mode & stat.S_ISVTX


def _is_private_file(path: Path) -> bool:
    """Whether this user alone can have written a file; no if there is none."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_uid == os.geteuid()
        and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


@functools.cache
def _process_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder of this process, which only its user may enter."""
    return tempfile.TemporaryDirectory(prefix="jakiro_vllm-")


def _processor() -> bytes:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    facts = {line for line in lines if line.split(":")[0].strip() in names}
    return "\n".join([platform.machine(), *sorted(facts)]).encode()


def fits(query: Tensor, pages: Tensor, tree_keys: Tensor, tree_values: Tensor, out: Tensor) -> bool:
    """Whether the kernel can read and write these tensors as they lie."""
    block, width = pages.shape[2:]
    return (
        query.dtype in DTYPES
        and query.shape[2] % UNIT == 0
        and block % UNIT == 0
        and pages.stride(2) == width
        and all(x.stride(-1) == 1 for x in (query, pages, tree_keys, tree_values, out))
        and all(x.dtype == query.dtype for x in (tree_keys, tree_values, out))
    )


def step_arguments(jobs: TreeJobs, ancestors: Tensor, depths: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
    """What all layers of a step share: ``(tensors to hold on to, arguments from tables to depths)``."""
    tables = jobs.block_tables.to(torch.int32)
    tables = tables if tables.stride(1) == 1 else tables.contiguous()
    indices = [getattr(jobs, name) for name in _JOBS]
    held = [x.to(torch.int64).contiguous() for x in (*indices, ancestors, depths)]
    return [tables, *held], (tables.data_ptr(), tables.stride(0), *(x.data_ptr() for x in held))


def attend(
    library: ctypes.CDLL,
    query: Tensor,
    pages: Tensor,
    layout: str,
    jobs: TreeJobs,
    tree_keys: Tensor,
    tree_values: Tensor,
    ancestors: Tensor,
    depths: Tensor,
    scale: float,
    softcap: float,
    window: int,
    out: Tensor,
) -> None:
    """Attends; see ``tree_attention`` for the arguments, of which ``fits`` must hold.

    Raises:
        ValueError: if a tree has more than 64 nodes, or the layout does not exist in the dtype.
        MemoryError: if the threads' working memory cannot be had.
    """
    _, shared = jobs.shared(step_arguments, ancestors, depths)
    error = library.tree_attention(
        Call(
            *(query.data_ptr(), query.stride(0), query.stride(1)),
            *(pages.data_ptr(), pages.stride(0), pages.stride(1)),
            *(tree_keys.data_ptr(), tree_keys.stride(0), tree_keys.stride(1)),
            *(tree_values.data_ptr(), tree_values.stride(0), tree_values.stride(1)),
            *(out.data_ptr(), out.stride(0), out.stride(1)),
            *shared,
            *(jobs.row_counts.numel(), query.shape[1], pages.shape[1], query.shape[2], pages.shape[2]),
            *(window, torch.get_num_threads(), DTYPES[query.dtype], LAYOUTS[layout]),
            *(scale, softcap),
        )
    )
    if error:
        kind, message = ERRORS[error]
        raise kind(message)
