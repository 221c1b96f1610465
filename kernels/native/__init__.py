"""The kernels' C++: builds it, keeps it, loads it.

The sources ``native.cpp`` of all rooms become one library. It is built on the machine that runs it, for that machine's
instruction set, once: it is kept in the user's cache under a name that changes with the sources, the compiler, the flags
and the processor. It needs a C++ compiler and nothing else, no headers of Python or torch; where there is none, PyTorch
does the work.

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
from typing import Any

import torch

logger = logging.getLogger(__name__)

HEADERS = Path(__file__).parent
SOURCES = tuple(sorted(HEADERS.parent.glob("*/native.cpp")))
COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-fopenmp", "-w")
#: As ``with_dtype`` in vectors.h numbers them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

POINTER, INTEGER, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def arguments(*fields: tuple[str, type[Any]]) -> type[ctypes.Structure]:
    """The type of a function's only argument, a structure; the one of the same name in native.cpp has these fields.

    Args:
        fields: names, several of one type separated by spaces, and that type.
    """
    each = [(name, kind) for names, kind in fields for name in names.split()]
    return type("Call", (ctypes.Structure,), {"_fields_": each})


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, built if need be, or None where that is impossible, which is logged once."""
    found = compiler()
    if found is None:
        logger.warning(
            "No C++ compiler (%s) found: trees are drafted and attended to in PyTorch, 2-4x slower", COMPILERS[0]
        )
        return None
    try:
        return ctypes.CDLL(str(build(found)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.warning("The CPU kernels cannot be built, so PyTorch does their work: %s", reason)
        return None


def prepare() -> bool:
    """Builds and loads the compiled kernels now, so that no request waits for them; some seconds, once per machine.

    Returns:
        Whether there are any; a warning says why not.
    """
    return library() is not None


def compiler() -> str | None:
    """Path of a C++ compiler."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def build(compiler: str) -> Path:
    """Path of the library, which is compiled unless the cache has it.

    Raises:
        OSError: if nothing can be written.
        subprocess.CalledProcessError: if the compiler fails.
    """
    texts = [path.read_bytes() for path in (*sorted(HEADERS.glob("*.h")), *SOURCES)]
    key = hashlib.sha256()
    for part in (*texts, os.path.realpath(compiler).encode(), " ".join(FLAGS).encode(), _processor()):
        key.update(hashlib.sha256(part).digest())
    name = f"kernels-{key.hexdigest()[:16]}.so"
    folder = _cache_folder()
    if folder is None:
        # Removed when the process ends; meanwhile it is the process's own.
        folder = Path(_process_folder().name)
    built = folder / name
    if not _is_private_file(built):
        with tempfile.TemporaryDirectory(dir=folder) as work:
            compiled = [Path(work, f"{number}.o") for number in range(len(SOURCES))]
            linked = Path(work, "native.so")
            for source, target in zip(SOURCES, compiled, strict=True):
                _run(compiler, *FLAGS, f"-I{HEADERS}", "-c", "-o", target, source)
            # Linked without -fopenmp: the OpenMP runtime must be the one that torch has loaded, whose threads
            # vLLM has bound to cores; a second one would compete with them.
            _run(compiler, "-shared", "-o", linked, *compiled)
            linked.chmod(0o700)
            os.replace(linked, built)  # whole or not at all, whoever else is at it
    return built


def _run(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)


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
        "The CPU kernels are built for this process only, because another user could write into its cache: "
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
