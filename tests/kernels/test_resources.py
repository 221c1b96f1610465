"""What every kernel takes of a GPU, compiled here for each architecture, against the checked-in table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from jakiro_vllm.kernels.aot import (
    ARCHITECTURES,
    LEAST_SHARED,
    SHARED_LIMITS,
    TABLE,
    Resources,
    Variant,
    compile_variant,
    differences,
    main,
    read_table,
    write_table,
)

pytest.importorskip("triton", reason="needs Triton")

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
KEY = ("walk", "N64", 90)
PLAIN = Resources(num_warps=4, num_stages=3, registers=40, shared=64, spills=0, triton="3.7.1")

#: One warp holds 64 KiB until the sum of all is known: 512 registers per thread, and there are 255.
TOY = """
import triton
import triton.language as tl
from jakiro_vllm.kernels.aot import Variant, compile_variant

@triton.jit
def toy_kernel(p, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    values = tl.load(p + offsets)
    tl.store(p + offsets, values / tl.sum(values, axis=0))

for size in (1024, 16384):
    variant = Variant("toy", toy_kernel, {"p": "*fp32"}, {"SIZE": size}, {"num_warps": 1}, ("p",))
    print(size, compile_variant(variant, 90).spills)
"""
#: Attention of wide heads on an sm_86 that is not there: ``launch_session`` stands in for it.
SMALL = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import launch_session
from triton.backends.compiler import GPUTarget
from jakiro_vllm.kernels.batch_attention import triton_kernel

properties = launch_session.Utils.get_device_properties(0) | {"max_shared_mem": int(sys.argv[2])}
launch_session.Utils.get_device_properties = staticmethod(lambda device: properties)
launch_session.Driver.get_current_target = lambda driver: GPUTarget("cuda", 86, 32)
launch_session.DIM = 256
launch_session.attend(1, 64, context_pages=1)
(config,) = triton_kernel._tuned_attend("wide").cache.values()
print(config.num_stages, "stages", launch_session.LAUNCHES["attend"], "launches")
"""
#: Memory accesses of the copy and the barrier, in order.
ORDER = r"""
import re
from jakiro_vllm.kernels.aot import compile_kernel
from jakiro_vllm.kernels.compaction.triton_kernel import variants

for variant in variants():
    for architecture in variant.architectures:
        text = compile_kernel(variant, architecture)[0].asm["ptx"]
        print(variant.name, *re.findall(r"\b(ld|st|bar)\.(?:global|sync)", text))
"""


def compiler(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python where Triton compiles; this process interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_variant_compiles_without_spilling_and_takes_what_the_table_says(tmp_path: Path) -> None:
    """With another Triton than the table's, figures differ: then spills and limits only are checked."""
    done = compiler("-m", "jakiro_vllm.kernels.aot", "--check", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[1-9]\d* compiled, 0 wrong$", done.stdout, re.MULTILINE)
    if "another Triton" in done.stdout:
        warnings.warn(done.stdout.strip().splitlines()[-1], stacklevel=1)


def test_the_table_has_every_kernel() -> None:
    kernels = {path.parent.name for path in KERNELS.glob("*/triton_kernel.py")}
    table = read_table(TABLE)
    assert {kernel for kernel, _, _ in table} == kernels
    assert {architecture for _, _, architecture in table} == set(SHARED_LIMITS)
    assert differences(table, table) == []


def choice(variant: str) -> str:
    """What a launch chooses a configuration for: a variant's name without what configurations set.

    Experts choose among the same ones for each 16-bit type and activation.
    """
    return re.sub(r"(?<=\d)x\d+.*| (bf16|fp16|swiglu|gelu|E\d+)\b", "", variant)


def test_small_gpus_have_a_configuration_for_everything() -> None:
    """By the oldest architecture in the table, which takes what they take."""
    shared: dict[tuple[str, str], dict[int, list[int]]] = {}
    for (kernel, variant, architecture), found in read_table(TABLE).items():
        shared.setdefault((kernel, choice(variant)), {}).setdefault(architecture, []).append(found.shared)
    assert len(shared["batch_attention", "bf16 D192 window softcap 64"][80]) == 2
    assert len(shared["experts", "activate 128"][80]) == 4
    for key, by_architecture in shared.items():
        assert min(by_architecture[min(by_architecture)]) <= LEAST_SHARED, key


def test_tuning_passes_over_what_does_not_fit(tmp_path: Path) -> None:
    """On a GPU with little shared memory, wide heads take the configuration with fewer stages."""
    script = tmp_path / "small.py"
    script.write_text(SMALL)
    done = compiler(str(script), str(Path(__file__).parent), str(LEAST_SHARED), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "stages", "2", "launches"]


def test_spills_are_seen(tmp_path: Path) -> None:
    """Negative control: a toy that holds more than the registers."""
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    done = compiler(str(script), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    small, large = (int(line.split()[1]) for line in done.stdout.splitlines())
    assert small == 0
    assert large > 0


def test_compaction_reads_all_rows_before_it_writes_one(tmp_path: Path) -> None:
    """Between its threads, that is: the interpreter has none and would not notice."""
    script = tmp_path / "order.py"
    script.write_text(ORDER)
    done = compiler(str(script), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines
    for line in lines:
        assert re.search(r"( ld)+ bar( st)+$", line), line


def test_interpreted_kernels_are_not_compiled() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        compile_variant(Variant("walk", None, {}, {}), 90)


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table = {KEY: PLAIN, ("walk", "N64, S7", 80): replace(PLAIN, registers=41)}
    write_table(table, tmp_path / "table.csv")
    assert read_table(tmp_path / "table.csv") == table


@pytest.mark.parametrize(
    ("found", "recorded", "sentences"),
    [
        ({KEY: PLAIN}, {KEY: PLAIN}, []),
        ({KEY: PLAIN}, {}, ["is not in the table"]),
        ({}, {KEY: PLAIN}, ["is in the table, but is no variant any more"]),
        ({KEY: PLAIN}, {KEY: replace(PLAIN, registers=41)}, ["takes .*registers=40.*, recorded are .*registers=41"]),
        ({KEY: PLAIN}, {KEY: replace(PLAIN, shared=65)}, ["shared=64.*shared=65"]),
        ({KEY: replace(PLAIN, spills=8)}, {KEY: replace(PLAIN, spills=8)}, ["spills 8 bytes"]),
        ({KEY: replace(PLAIN, shared=232449)}, {KEY: replace(PLAIN, shared=232449)}, ["more than 232448"]),
        ({KEY: PLAIN}, {KEY: replace(PLAIN, registers=41, triton="3.6.0")}, []),
        ({KEY: PLAIN}, {("walk", "N16", 90): replace(PLAIN, triton="3.6.0")}, []),
        ({KEY: replace(PLAIN, spills=8)}, {KEY: replace(PLAIN, triton="3.6.0")}, ["spills 8 bytes"]),
    ],
    ids=[
        "equal",
        "new variant",
        "old variant",
        "registers",
        "shared memory",
        "spills",
        "shared memory over the limit",
        "another Triton",
        "another Triton, other variants",
        "another Triton, spills",
    ],
)
def test_differences(
    found: dict[tuple[str, str, int], Resources],
    recorded: dict[tuple[str, str, int], Resources],
    sentences: list[str],
) -> None:
    wrong = differences(found, recorded)
    assert len(wrong) == len(sentences)
    assert all(re.search(sentence, line) for sentence, line in zip(sentences, wrong, strict=True))


@pytest.mark.parametrize(("check", "status"), [(False, 0), (True, 1)], ids=["write", "check"])
def test_the_command(
    check: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jakiro_vllm.kernels.aot.resources", lambda processes: {KEY: PLAIN})
    path = tmp_path / "table.csv"
    write_table({KEY: replace(PLAIN, registers=41)}, path)
    assert main(["--output", str(path), *(["--check"] if check else [])]) == status
    assert ("recorded are" in capsys.readouterr().out) == check
    assert read_table(path)[KEY].registers == (41 if check else 40), "--check must not write"


def test_limits_are_known_for_every_architecture() -> None:
    assert set(ARCHITECTURES) < set(SHARED_LIMITS)
