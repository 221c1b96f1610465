"""Ahead-of-time compilation of the Triton kernels: what each one takes of a GPU, found without one.

``python -m jakiro_vllm.kernels.aot`` compiles every variant of every kernel for every architecture and writes
``docs/results/kernel_resources.csv``; with ``--check`` it compares with that file instead.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import importlib.util
import io
import multiprocessing
import pkgutil
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: Bytes of shared memory that a program may have on the GPUs with the least: sm_86, sm_89 and sm_120.
LEAST_SHARED = 99 << 10
#: Compute capability, and bytes of shared memory that a program may have on it.
SHARED_LIMITS = {80: 163 << 10, 89: LEAST_SHARED, 90: 227 << 10, 100: 227 << 10}
#: What is compiled for unless a variant says otherwise. Kernels take as much on sm_86 and sm_89 as on sm_80.
ARCHITECTURES = (80, 90, 100)
#: The checked-in table; in a source tree, folder kernels/ lies beside docs/.
TABLE = Path(__file__).resolve().parent.parent / "docs" / "results" / "kernel_resources.csv"
PROCESSES = 2


@dataclass(frozen=True)
class Variant:
    """One kernel with the constants of one launch.

    Attributes:
        name: of the operation and what distinguishes this variant, such as ``walk`` or ``attention bf16 D128``.
        function: the jitted function.
        signature: Triton type of each run-time argument, such as ``*bf16`` or ``i32``.
        constants: value of each ``tl.constexpr`` argument.
        options: ``num_warps`` and ``num_stages``.
        aligned: arguments that are multiples of 16 in every launch, pointers included.
        architectures: that the variant is launched on.
    """

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    architectures: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a GPU, per program unless it says thread.

    Attributes:
        num_warps: 32 threads each.
        num_stages: of software pipelining.
        registers: per thread.
        shared: bytes of shared memory.
        spills: bytes per thread that did not fit the registers, stored or loaded, whichever are more.
        triton: version that compiled it.
    """

    num_warps: int
    num_stages: int
    registers: int
    shared: int
    spills: int
    triton: str


#: A row of the table: kernel, variant, architecture.
Key = tuple[str, str, int]


def compile_kernel(variant: Variant, architecture: int) -> tuple[Any, str]:
    """Compiles a kernel as a launch on that architecture would, with Triton's own ptxas.

    Args:
        variant: what is launched.
        architecture: compute capability, such as 90.

    Returns:
        Triton's compiled kernel, and what ptxas said.

    Raises:
        RuntimeError: where Triton interprets kernels.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so kernels are interpreted, not compiled: unset it")
    function = variant.function
    while not isinstance(function, triton.JITFunction):  # tuned
        function = function.fn
    names = function.arg_names
    source = ASTSource(
        function,
        {name: "constexpr" if name in variant.constants else variant.signature[name] for name in names},
        variant.constants,
        {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    log = io.StringIO()
    # ptxas reports while it compiles, so Triton's cache must not answer in its place.
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=variant.options)
    return compiled, log.getvalue()


def compile_variant(variant: Variant, architecture: int) -> Resources:
    """Compiles a kernel and tells what it takes; see ``compile_kernel``.

    Raises:
        RuntimeError: where Triton interprets kernels, and where ptxas did not report.
    """
    compiled, log = compile_kernel(variant, architecture)
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        raise RuntimeError(f"ptxas did not tell the registers of {variant.name}, but: {log!r}")
    return Resources(
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=max(int(count) for count in registers),
        shared=compiled.metadata.shared,
        spills=max(int(count) for pair in spills for count in pair),
        triton=compiled.metadata.triton_version,
    )


def all_variants() -> dict[str, list[Variant]]:
    """The variants of every kernel that has any, by the kernel's folder."""
    found = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        name = f"{__package__}.{module.name}"
        if module.ispkg and importlib.util.find_spec(f"{name}.triton_kernel"):
            found[module.name] = importlib.import_module(f"{name}.triton_kernel").variants()
    return found


def resources(processes: int = PROCESSES) -> dict[Key, Resources]:
    """Compiles everything.

    Args:
        processes: that compile at the same time.

    Raises:
        RuntimeError: where two variants of a kernel have one name, or one does not compile.
    """
    work: dict[Key, Variant] = {}
    for kernel, variants in all_variants().items():
        for variant in variants:
            for architecture in variant.architectures:
                key = kernel, variant.name, architecture
                if key in work:
                    raise RuntimeError(f"two variants of kernel {kernel} are called {variant.name!r}")
                work[key] = variant
    # Jitted functions cannot be sent to a process, but a forked one has them.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _hold, (work,)) as pool:
        return dict(zip(work, pool.map(_compile, work), strict=True))


def write_table(table: dict[Key, Resources], path: Path) -> None:
    """Writes a CSV, one row per kernel, variant and architecture."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kernel", "variant", "architecture", *Resources.__dataclass_fields__])
        for key, found in sorted(table.items()):
            writer.writerow([*key, *asdict(found).values()])


def read_table(path: Path) -> dict[Key, Resources]:
    """Reads what ``write_table`` wrote."""
    table = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            numbers = {name: int(row[name]) for name in Resources.__dataclass_fields__ if name != "triton"}
            key = row["kernel"], row["variant"], int(row["architecture"])
            table[key] = Resources(**numbers, triton=row["triton"])
    return table


def differences(found: dict[Key, Resources], recorded: dict[Key, Resources]) -> list[str]:
    """What is wrong with a table, a sentence each.

    Spilled registers always are, and more shared memory than there is. The rest is compared with a table of the
    same Triton only, since another compiler has other figures.

    Args:
        found: compiled now.
        recorded: the checked-in table.
    """
    wrong = [f"{_title(key)} spills {now.spills} bytes" for key, now in found.items() if now.spills]
    wrong += [
        f"{_title(key)} needs {now.shared} bytes of shared memory, more than {SHARED_LIMITS[key[2]]}"
        for key, now in found.items()
        if now.shared > SHARED_LIMITS[key[2]]
    ]
    if not comparable(found, recorded):
        return wrong
    for key in sorted(found.keys() | recorded.keys()):
        if key not in recorded:
            wrong.append(f"{_title(key)} is not in the table")
        elif key not in found:
            wrong.append(f"{_title(key)} is in the table, but is no variant any more")
        elif found[key] != recorded[key]:
            wrong.append(f"{_title(key)} takes {found[key]}, recorded are {recorded[key]}")
    return wrong


def comparable(found: dict[Key, Resources], recorded: dict[Key, Resources]) -> bool:
    """Whether both tables were made by the same Triton."""
    return len({entry.triton for entry in (*found.values(), *recorded.values())}) <= 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the table; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m jakiro_vllm.kernels.aot", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    parser.add_argument("--output", type=Path, default=TABLE, help="the CSV file (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="compile so many at once")
    options = parser.parse_args(arguments)

    found = resources(options.processes)
    recorded = read_table(options.output) if options.check else found
    wrong = differences(found, recorded)
    print("\n".join([*wrong, f"{len(found)} compiled, {len(wrong)} wrong"]))
    if not comparable(found, recorded):
        print("the table was made by another Triton, so only compilation, spills and limits were checked")
    if not options.check:
        write_table(found, options.output)
    return 1 if wrong else 0


def _title(key: Key) -> str:
    kernel, variant, architecture = key
    return f"{kernel} [{variant}] on sm_{architecture}"


_work: dict[Key, Variant] = {}


def _hold(work: dict[Key, Variant]) -> None:
    """Gives a process the variants."""
    _work.update(work)


def _compile(key: Key) -> Resources:
    try:
        return compile_variant(_work[key], key[2])
    except Exception as error:
        # An error of the compiler may hold what cannot be sent back.
        raise RuntimeError(f"{_title(key)} does not compile: {type(error).__name__}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
