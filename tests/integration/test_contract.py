"""What this package overrides, calls and reads inside vLLM is there, in every supported version.

``contracts/VERSION.json`` holds what a version has, recorded from its sources by ``packaging/record_contract.py``.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from vllm.v1.attention.backends import cpu_attn, triton_attn
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.spec_decode.metrics import SpecDecodingProm
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.integration import contract
from jakiro_vllm.integration.contract import ANSWERED_BY, check_installed, entries_of, inspect_installed, mismatch
from jakiro_vllm.integration.cpu_attention import TreeCPUAttentionMetadata
from jakiro_vllm.integration.gpu_attention import TreeTritonAttentionMetadata
from jakiro_vllm.integration.patches import PATCHES
from jakiro_vllm.integration.version import installed_vllm
from jakiro_vllm.integration.vllm_interface import ENTRIES, Entry, Need, Where

ROOT = Path(__file__).resolve().parent.parent.parent
INTEGRATION = ROOT / "jakiro_vllm" / "integration"
RECORDED = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "contracts").glob("*.json")}
RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
PLATFORMS = ("front", "cpu", "cuda")


@pytest.fixture(scope="module")
def recorder() -> ModuleType:
    """The recording script."""
    spec = importlib.util.spec_from_file_location("record_contract", ROOT / "packaging" / "record_contract.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- versions ----


def test_both_versions_are_recorded() -> None:
    assert {"0.32.0", "0.33.0"} <= set(RECORDED)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("version", RECORDED)
def test_every_version_has_what_is_needed(version: str, platform: str) -> None:
    reasons = [mismatch(entry, RECORDED[version].get(entry.path)) for entry in entries_of(platform)]
    assert [reason for reason in reasons if reason] == []


def test_the_record_of_the_installed_version_is_current(recorder: ModuleType) -> None:
    package, version = recorder.installed()
    assert version in RECORDED, f"vLLM {version} is not recorded: run make contract"
    assert recorder.record(package) == RECORDED[version], "the list or vLLM changed: run make contract"


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_installed_version_passes(platform: str) -> None:
    check_installed(platform)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_sources_and_running_vllm_tell_the_same(platform: str) -> None:
    """Two readings, by syntax tree and by inspection, that share no code."""
    recorded = RECORDED[installed_vllm()[1].public]
    for entry in entries_of(platform):
        found, key = inspect_installed(entry), ANSWERED_BY[entry.need]
        assert found is not None, entry.path
        names = recorded[entry.path][key]
        if key == "parameters":
            assert found[key] == names, entry.path
        else:
            assert set(found[key]) == set(names) & set(entry.names), entry.path


# ---- a difference is a sentence ----


def entry(path: str, need: Need, names: str) -> Entry:
    return Entry(path, need, tuple(names.split()), "walk trees", Where.BOTH)


WRONG = {
    "overridden": (
        entry(f"{RUNNER}._sample", Need.OVERRIDDEN, "self logits"),
        r"GPUModelRunner\._sample, needed to walk trees, takes \(self, logits, spec_decode_metadata\) instead of "
        r"\(self, logits\)",
    ),
    "called by position": (
        entry("vllm.config:get_layers_from_vllm_config", Need.CALLED, "layer_type vllm_config"),
        r"takes \(vllm_config, layer_type, layer_names=\) instead of \(layer_type, vllm_config\)",
    ),
    "called by name": (
        entry("vllm.v1.outputs:SamplerOutput", Need.CALLED, "* sampled_token_ids logprobs_tensors ranks"),
        r"takes \(sampled_token_ids, logprobs_tensors\) instead of",
    ),
    "called with too little": (
        entry("vllm.v1.outputs:SamplerOutput", Need.CALLED, "* sampled_token_ids"),
        r"takes \(sampled_token_ids, logprobs_tensors\) instead of",
    ),
    "attribute": (
        entry("vllm.v1.sample.metadata:SamplingMetadata", Need.ATTRIBUTES, "generators tree"),
        r"SamplingMetadata has no tree, needed to walk trees",
    ),
    "pinned value": (
        entry("vllm.v1.sample.sampler", Need.ATTRIBUTES, "_SAMPLING_EPS=0.5"),
        r"vllm\.v1\.sample\.sampler has no _SAMPLING_EPS = 0\.5",
    ),
    "stores": (
        entry(f"{RUNNER}.__init__", Need.STORES, "positions trees"),
        r"GPUModelRunner\.__init__ does not assign trees",
    ),
    "refers": (
        entry(f"{RUNNER}.sample_tokens", Need.REFERS, "_sample _walk"),
        r"GPUModelRunner\.sample_tokens does not use _walk",
    ),
    "no such name": (
        entry(f"{RUNNER}._walk", Need.CALLED, "self"),
        r"it has no vllm\.v1\.worker\.gpu_model_runner\.GPUModelRunner\._walk, needed to walk trees",
    ),
    "no such module": (entry("vllm.v1.trees:walk", Need.CALLED, ""), r"it has no vllm\.v1\.trees\.walk"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_vllm_lacks_is_said(name: str, recorder: ModuleType) -> None:
    wrong, sentence = WRONG[name]
    with pytest.raises(JakiroConfigError, match=sentence) as refusal:
        check_installed("cpu", [wrong])
    text = str(refusal.value)
    _, version = installed_vllm()
    assert f"{version}: " in text
    assert text.endswith("install a supported vLLM, or a jakiro-vllm made for this one")
    # The same from its sources.
    package, _ = recorder.installed()
    assert mismatch(wrong, recorder.Sources(package).record(wrong)) is not None


@pytest.mark.parametrize("need", Need, ids=lambda need: need.value)
def test_every_entry_can_fail(need: Need) -> None:
    """A version without one of an entry's names, or with another parameter, is refused."""
    recorded = RECORDED["0.32.0"]
    for e in (e for e in ENTRIES if e.need is need):
        assert mismatch(e, None) is not None
        key = ANSWERED_BY[need]
        if key == "parameters":
            assert mismatch(e, {key: [*recorded[e.path][key], "trees"]}) is not None
        for name in e.names:
            if name != "*":
                without = [known for known in recorded[e.path][key] if known.rstrip("=") != name]
                assert mismatch(e, {key: without}) is not None, f"{e.path} without {name}"


def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def _sample(self: Any, logits: Any, trees: Any) -> None: ...

    monkeypatch.setattr(GPUModelRunner, "_sample", _sample)
    with pytest.raises(JakiroConfigError, match=r"_sample, needed to walk trees with vLLM's sampler, takes"):
        check_installed("cpu")


def test_a_runner_class_that_vllm_imports_elsewhere_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def init_device(self: Any) -> None:
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        self.model_runner = CPUModelRunner(self.vllm_config, None)

    monkeypatch.setattr(cpu_worker.CPUWorker, "init_device", init_device)
    with pytest.raises(JakiroConfigError, match="init_device does not use CPUModelRunner"):
        check_installed("cpu")


def test_a_missing_dependency_of_vllm_is_not_taken_for_another_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(contract.importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="triton"):
        check_installed("cuda")


def test_an_unknown_platform_is_refused() -> None:
    with pytest.raises(ValueError, match="front, cpu, cuda, got 'tpu'"):
        check_installed("tpu")


# ---- recording ----

MODULES = {
    "__init__": "from .core import Runner as PublicRunner",
    "core": """
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar
from vllm.base import Base
from vllm.other import helper
if TYPE_CHECKING:
    from vllm.elsewhere import Ghost
try:
    LIMIT = 1e-5
except ImportError:
    LIMIT = 2.0

@dataclass
class Fields:
    kind: ClassVar[str] = "fields"
    tokens: list
    ranks: list | None = None

class Runner(Base):
    mode = False
    def stage(self, rows, *, fast=False, **rest):
        def inner():
            helper(self.used)
        self.kept, (self.first, rows.second) = rows, rows
        rows = local(rows)
    @property
    def shown(self): ...

@cache
def choose(a, b=1, *more): ...
""",
    "base": "class Base:\n    def inherited(self): ...\n",
    "other": "def helper(x): ...\n",
}

#: path, need, names asked for, what is recorded
READINGS = (
    ("vllm:PublicRunner.stage", Need.OVERRIDDEN, "", ["self", "rows", "fast=", "**rest"]),
    ("vllm.core:Runner.inherited", Need.CALLED, "", ["self"]),
    ("vllm.core:choose", Need.CALLED, "", ["a", "b=", "*more"]),
    ("vllm.core:Fields", Need.CALLED, "", ["tokens", "ranks="]),
    ("vllm.core:Runner", Need.ATTRIBUTES, "mode shown inherited kept", ["mode", "shown", "inherited"]),
    ("vllm.core:Runner", Need.ATTRIBUTES, "mode=False mode=True", ["mode=False"]),
    ("vllm.core", Need.ATTRIBUTES, "LIMIT=1e-05 helper Ghost gone", ["LIMIT=1e-05", "helper", "Ghost"]),
    ("vllm.core:choose", Need.ATTRIBUTES, "cache_clear other", ["cache_clear"]),
    ("vllm.core:Runner.stage", Need.STORES, "kept first second used", ["first", "kept", "second"]),
    ("vllm.core:Runner.stage", Need.REFERS, "helper used local rows", ["helper", "local", "used"]),
    ("vllm.core:Runner", Need.REFERS, "helper rows", ["helper"]),
)


@pytest.mark.parametrize(("path", "need", "asked", "expected"), READINGS)
def test_sources_are_read(
    recorder: ModuleType, tmp_path: Path, path: str, need: Need, asked: str, expected: list[str]
) -> None:
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert recorder.Sources(tmp_path).record(entry(path, need, asked)) == {ANSWERED_BY[need]: expected}


@pytest.mark.parametrize("path", ["vllm.gone:x", "vllm.core:gone", "vllm.core:Runner.gone", "vllm.core:LIMIT.gone"])
def test_what_sources_lack_is_not_recorded(recorder: ModuleType, tmp_path: Path, path: str) -> None:
    (tmp_path / "core.py").write_text(MODULES["core"])
    assert recorder.Sources(tmp_path).record(entry(path, Need.CALLED, "")) is None


def test_a_record_is_the_same_whatever_the_order(recorder: ModuleType) -> None:
    found = RECORDED["0.33.0"]
    text = recorder.render(dict(reversed(found.items())))
    assert text == recorder.render(found)
    assert json.loads(text) == found


# ---- the list is complete ----

#: Names that annotations use, and no more.
ONLY_ANNOTATED = {"vllm.v1.attention.backend.CommonAttentionMetadata"}


def test_every_import_of_vllm_is_listed() -> None:
    listed = {e.path.replace(":", ".") for e in ENTRIES}
    listed |= {f"{e.path}.{name}" for e in ENTRIES if ":" not in e.path for name in e.names}  # of modules
    imported = set()
    for path in INTEGRATION.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    unlisted = {name for name in imported - ONLY_ANNOTATED if not any(f"{e}.".startswith(f"{name}.") for e in listed)}
    assert unlisted == set()


def our_classes() -> list[type]:
    """Classes of this package that derive from vLLM's."""
    found = []
    for path in sorted(INTEGRATION.glob("*.py")):
        module = importlib.import_module(f"jakiro_vllm.integration.{path.stem}")
        classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
        found += [c for c in classes if any(base.__module__.startswith("vllm.") for base in c.__mro__)]
    return found


def test_our_classes_are_found() -> None:
    names = {c.__name__ for c in our_classes()}
    assert {"JakiroCPUModelRunner", "JakiroCPUWorker", "JakiroGPUModelRunner", "JakiroGPUWorker"} <= names


@pytest.mark.parametrize("cls", our_classes(), ids=lambda cls: cls.__name__)
def test_every_override_is_listed(cls: type) -> None:
    theirs = [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]
    ours = [base for base in cls.__mro__ if base.__module__.startswith("jakiro_vllm.")]
    listed = set()
    for e in ENTRIES:
        owner, _, name = e.path.partition(":")[2].rpartition(".")
        if e.need in (Need.OVERRIDDEN, Need.CALLED) and owner in {base.__qualname__ for base in theirs}:
            listed.add(name)
        if e.need is Need.ATTRIBUTES and name in {base.__qualname__ for base in theirs}:
            listed |= {attribute.partition("=")[0] for attribute in e.names}
    overridden = {
        name
        for base in ours
        for name in vars(base)
        if not (name.startswith("__") or name.startswith("_abc")) and any(name in vars(their) for their in theirs)
    }
    assert overridden - listed == set()


def test_every_attribute_of_the_runner_is_listed() -> None:
    """What the mixins read of ``self`` is their own, or listed."""
    files = [INTEGRATION / name for name in ("runner.py", "cpu_runner.py", "gpu_runner.py")]
    classes = [n for f in files for n in ast.parse(f.read_text()).body if isinstance(n, ast.ClassDef)]
    mixins = [c for c in classes if c.name != "Step"]
    own, used = set(), set()
    for cls in mixins:
        for node in cls.body:
            if isinstance(node, ast.FunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.Assign):
                own |= {ast.unparse(target) for target in node.targets}
            elif isinstance(node, ast.AnnAssign) and node.value:
                own.add(ast.unparse(node.target))
        for node in ast.walk(cls):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                (used if isinstance(node.ctx, ast.Load) else own).add(node.attr)
    listed = {name for e in ENTRIES if e.path.startswith(RUNNER) and e.need is Need.STORES for name in e.names}
    listed |= {e.path.rpartition(".")[2] for e in ENTRIES if e.path.startswith(RUNNER)}
    assert {"positions", "input_batch", "sampler", "max_num_tokens"} <= used - own
    assert used - own - listed == set()


# ---- what a signature does not show ----


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (TreeCPUAttentionMetadata, cpu_attn.CPUAttentionMetadata),
        (TreeTritonAttentionMetadata, triton_attn.TritonAttentionMetadata),
    ],
    ids=["cpu", "cuda"],
)
def test_metadata_can_be_copied_field_by_field(ours: Any, theirs: Any) -> None:
    assert {f.name for f in dataclasses.fields(ours)} == {f.name for f in dataclasses.fields(theirs)} | {"trees"}
    assert all(f.init for f in dataclasses.fields(theirs))
    assert "__slots__" not in vars(theirs)


def test_prometheus_counters_are_a_replaceable_class() -> None:
    assert issubclass(PrometheusStatLogger._spec_decoding_cls, SpecDecodingProm)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_patches_apply_twice(patch: Any) -> None:
    patch.apply()
    first = getattr(patch.target(), patch.attribute)
    patch.apply()
    assert getattr(patch.target(), patch.attribute) is first


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_patches_and_list_agree(patch: Any) -> None:
    path = f"{patch.target().__module__}:{patch.target().__qualname__}.{patch.attribute}"
    assert {e.path: e.names for e in entries_of("front") if e.need is Need.OVERRIDDEN}[path] == patch.parameters


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_patch_refuses_another_signature(patch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "target", classmethod(lambda cls: type("Other", (), {patch.attribute: lambda a, b: a})))
    with pytest.raises(RuntimeError, match="install a supported vLLM"):
        patch.apply()
