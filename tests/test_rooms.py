"""Imports follow the data flow: a room knows only the rooms before it, and few know vLLM."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "jakiro_vllm"

#: What each room may import of this package, itself aside. ``kernels`` is installed as jakiro_vllm.kernels.
ALLOWED = {
    "kernels": set(),
    "errors": set(),
    "config": {"errors"},
    "draft": {"config", "errors", "kernels"},
    "tree": {"config", "errors", "kernels"},
    "transfer": set(),
    "cache": {"transfer", "tree", "kernels"},
    "decode": {"cache", "config", "draft", "errors", "kernels", "transfer", "tree"},
    "training": {"cache", "config", "decode", "draft", "errors", "kernels", "tree"},
    "environment": set(),
    "integration": {"cache", "config", "decode", "draft", "environment", "errors", "kernels", "transfer", "tree"},
    "server": {"environment", "errors"},
    "demo": {"draft", "server"},
    "storm": {"draft", "errors", "server"},
    "cli": {"config", "demo", "draft", "environment", "errors", "training"},
}
#: Who may import vLLM. Training uses its public door only.
VLLM_ROOMS = {"integration", "cli", "demo", "server", "storm"}
PUBLIC_VLLM = {"training": {"vllm.LLM", "vllm.SamplingParams"}}


def room_of(path: Path) -> str:
    """The room that a source file belongs to."""
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "kernels":
        return "kernels"
    return relative.parts[1].removesuffix(".py")


def sources() -> list[Path]:
    """Every module but the package's own ``__init__``, which has the version only."""
    found = [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    return sorted(path for path in found if path != ROOT / PACKAGE / "__init__.py")


def imports(source: str, module: str) -> set[str]:
    """Dotted names that a module imports, inside functions and for type checkers too.

    ``from a.b import c`` counts as ``a.b.c``; relative imports are resolved.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                base = ".".join([*package, base]).rstrip(".")
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return names


def module_of(path: Path) -> str:
    """The dotted name under which a file is installed; a package's ``__init__`` counts as a module in it."""
    relative = path.relative_to(ROOT).with_suffix("")
    name = ".".join(relative.parts)
    return f"{PACKAGE}.{name}" if relative.parts[0] == "kernels" else name


def violations(source: str, module: str, room: str) -> list[str]:
    """What a module must not import."""
    found = []
    for name in sorted(imports(source, module)):
        parts = name.split(".")
        if parts[0] == "kernels":
            found.append(f"{name}: installed as {PACKAGE}.kernels; this is Hugging Face's package")
        elif parts[0] == PACKAGE:
            other = parts[1] if len(parts) > 1 and parts[1] != "__version__" else None
            if other and other != room and other not in ALLOWED[room]:
                found.append(f"{name}: room {room} comes before room {other}")
        elif parts[0] == "vllm" and room not in VLLM_ROOMS and name not in PUBLIC_VLLM.get(room, set()):
            found.append(f"{name}: room {room} does not know vLLM")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_data_flow(path: Path) -> None:
    assert room_of(path) in ALLOWED, "a new room needs a line in ALLOWED"
    assert violations(path.read_text(), module_of(path), room_of(path)) == []


def test_every_room_is_scanned() -> None:
    assert set(ALLOWED) == {room_of(path) for path in sources()}


def test_training_never_imports_integration() -> None:
    assert "integration" not in ALLOWED["training"]
    assert all("integration" not in allowed for room, allowed in ALLOWED.items() if room != "cli")


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("tree", "from jakiro_vllm.draft.head import DraftHead"),
        ("tree", "from jakiro_vllm import decode"),
        ("cache", "import jakiro_vllm.config"),
        ("decode", "def f():\n    from jakiro_vllm.integration import runner"),
        ("decode", "import vllm"),
        ("draft", "if TYPE_CHECKING:\n    from vllm.config import VllmConfig"),
        ("draft", "import importlib\nimportlib.import_module('vllm.config')"),
        ("training", "from jakiro_vllm.integration.version import check_vllm_version"),
        ("training", "from vllm.v1.sample.sampler import Sampler"),
        ("kernels", "from ...config import MAX_NODES"),
        ("kernels", "from jakiro_vllm.errors import JakiroError"),
        ("draft", "from kernels import get_kernel"),
        ("errors", "from jakiro_vllm.config import TreeConfig"),
    ],
)
def test_the_scanner_sees_violations(room: str, source: str) -> None:
    """Negative control."""
    assert violations(source, f"{PACKAGE}.{room}.package.module", room)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("tree", "from jakiro_vllm.config import MAX_NODES\nfrom jakiro_vllm.tree.batch import TreeBatch"),
        ("kernels", "from .cpu_kernel import attend"),
        ("training", "from vllm import LLM, SamplingParams"),
        ("integration", "import vllm.config"),
        ("draft", "import vllm_is_not_this"),
    ],
)
def test_the_scanner_lets_the_rest_pass(room: str, source: str) -> None:
    assert violations(source, f"{PACKAGE}.{room}.package.module", room) == []
