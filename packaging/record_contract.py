"""Records what one version of vLLM has of everything that this package relies on, from its sources alone.

    python packaging/record_contract.py [PATH_TO_VLLM_PACKAGE VERSION]

writes tests/integration/contracts/VERSION.json, which the contract tests compare with
``jakiro_vllm.integration.vllm_interface``. The sources are parsed, never imported, so a CUDA wheel that was only
unpacked will do; without arguments the installed vLLM is recorded. Record every supported version again after the
list has grown.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jakiro_vllm.integration.contract import ANSWERED_BY, Found
from jakiro_vllm.integration.version import installed_vllm
from jakiro_vllm.integration.vllm_interface import ENTRIES, Entry

CONTRACTS = Path(__file__).resolve().parent.parent / "tests" / "integration" / "contracts"
FunctionNode = (ast.FunctionDef, ast.AsyncFunctionDef)


class Sources:
    """A package's modules as syntax trees.

    Attributes:
        root: the folder that holds ``vllm``'s modules.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = cache(self._names)
        self.find = cache(self._find)

    def _names(self, module: str) -> dict[str, ast.AST]:
        """Everything a module binds at its top level, by name; empty if there is no such module."""
        folder = self.root.joinpath(*module.split(".")[1:])
        for file in (folder / "__init__.py", folder.parent / f"{folder.name}.py"):
            if file.is_file():
                return bindings(ast.parse(file.read_text(encoding="utf-8")))
        return {}

    def _find(self, module: str, qualified: str) -> tuple[str, ast.AST] | None:
        """The definition of a dotted name and the module that holds it; imports and base classes are followed."""
        first, _, rest = qualified.partition(".")
        node = self.names(module).get(first)
        if isinstance(node, ast.ImportFrom):
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == first)
            source = self.origin(module, node)
            found = self.find(source, original) if source.startswith("vllm") else None
        else:
            found = None if node is None else (module, node)
        if not rest or found is None:
            return found
        home, node = found
        return self.member(home, node, rest) if isinstance(node, ast.ClassDef) else None

    def origin(self, module: str, node: ast.ImportFrom) -> str:
        """The module that ``from ... import`` names."""
        if not node.level:
            return node.module or ""
        is_package = self.root.joinpath(*module.split(".")[1:], "__init__.py").is_file()
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, node.module] if node.module else parts)

    def lineage(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """The class and its bases inside the package, nearest first."""
        yield module, node
        for base in node.bases:
            name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            found = self.find(module, name)
            if found is not None and isinstance(found[1], ast.ClassDef):
                yield from self.lineage(found[0], found[1])

    def member(self, module: str, node: ast.ClassDef, name: str) -> tuple[str, ast.AST] | None:
        """What a class, or else its nearest base, binds to a name."""
        for home, cls in self.lineage(module, node):
            bound = bindings(cls).get(name)
            if bound is not None:
                return home, bound
        return None

    def record(self, entry: Entry) -> Found | None:
        """What there is at an entry's path; see ``contract``."""
        module, _, qualified = entry.path.partition(":")
        key = ANSWERED_BY[entry.need]
        if not qualified:
            names = self.names(module)
            return {key: [name for name in entry.names if pinned(names, name)]} if names else None
        found = self.find(module, qualified)
        if found is None:
            return None
        home, node = found
        if key == "attributes":
            return {key: [name for name in entry.names if self.has(home, node, name)]}
        if key == "parameters":
            return {key: list(self.parameters(home, node))}
        functions = node.body if isinstance(node, ast.ClassDef) else [node]
        read = stored if key == "stores" else referred
        names = {name for f in functions if isinstance(f, FunctionNode) for name in read(f)}
        return {key: sorted(names.intersection(entry.names))}

    def has(self, module: str, node: ast.AST, wanted: str) -> bool:
        """Whether a class, or a cached function, has an attribute."""
        if isinstance(node, ast.ClassDef):
            return any(pinned(bindings(cls), wanted) for _, cls in self.lineage(module, node))
        caches = {"cache", "lru_cache", "functools.cache", "functools.lru_cache"}
        decorators = {ast.unparse(d).partition("(")[0] for d in getattr(node, "decorator_list", [])}
        return wanted == "cache_clear" and bool(decorators & caches)

    def parameters(self, module: str, node: ast.AST) -> Iterator[str]:
        """A function's parameters, or those of a dataclass's or named tuple's constructor."""
        if isinstance(node, ast.ClassDef):
            for _, cls in reversed(list(self.lineage(module, node))):
                for field in cls.body:
                    if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
                        yield f"{ast.unparse(field.target)}{'=' if field.value else ''}"
            return
        assert isinstance(node, FunctionNode)
        a = node.args
        plain = [*a.posonlyargs, *a.args]
        first_default = len(plain) - len(a.defaults)
        for i, argument in enumerate(plain):
            yield f"{argument.arg}{'=' if i >= first_default else ''}"
        if a.vararg:
            yield f"*{a.vararg.arg}"
        for argument, default in zip(a.kwonlyargs, a.kw_defaults, strict=True):
            yield f"{argument.arg}{'=' if default else ''}"
        if a.kwarg:
            yield f"**{a.kwarg.arg}"


def bindings(scope: Any) -> dict[str, ast.AST]:
    """What a module or class body binds, by name, branches of ``if`` and ``try`` included; the last one counts."""
    bound: dict[str, ast.AST] = {}
    for node in scope.body:
        if isinstance(node, (*FunctionNode, ast.ClassDef)):
            bound[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name): node for alias in node.names}
        elif isinstance(node, ast.Assign):
            bound |= {
                name.id: node for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)
            }
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            bound[node.target.id] = node
        elif isinstance(node, ast.If | ast.Try):
            branches = [node.orelse, *(h.body for h in getattr(node, "handlers", ())), node.body]
            for body in branches:  # the main branch last, so that it counts
                bound |= bindings(ast.Module(body, []))
    return bound


def pinned(bound: dict[str, ast.AST], wanted: str) -> bool:
    """Whether a name is bound, and to a literal if ``wanted`` says ``name=value``."""
    name, is_pinned, value = wanted.partition("=")
    node = bound.get(name)
    if not is_pinned or node is None:
        return node is not None
    assigned = getattr(node, "value", None)
    return isinstance(assigned, ast.Constant) and str(assigned.value) == value


def stored(function: ast.AST) -> set[str]:
    """Attributes that a function assigns, of whatever object."""
    return {n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}


def referred(function: ast.AST) -> Iterator[str]:
    """Attributes that a function names, and names that it does not bind itself."""
    bound = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    bound |= {n.arg for n in ast.walk(function) if isinstance(n, ast.arg)}
    for node in ast.walk(function):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name) and node.id not in bound:
            yield node.id


def record(package: Path) -> dict[str, Found]:
    """What a vLLM package folder has, by path; paths that it lacks are left out."""
    sources = Sources(package)
    found: dict[str, Found] = {}
    for entry in ENTRIES:
        here = sources.record(entry)
        if here is None:
            continue
        known = found.setdefault(entry.path, {})
        for key, names in here.items():
            known[key] = names if key == "parameters" else sorted({*known.get(key, ()), *names})
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, nargs="?", help="folder of vLLM's package, such as site-packages/vllm")
    parser.add_argument("version", nargs="?", help="of that vLLM; names the file")
    given = parser.parse_args()
    if (given.package is None) != (given.version is None):
        parser.error("give both the package and its version, or neither for the installed vLLM")
    package, version = (given.package, given.version) if given.package else installed()
    if not (package / "engine" / "arg_utils.py").is_file():
        parser.error(f"{package} does not hold vLLM's sources")
    CONTRACTS.mkdir(parents=True, exist_ok=True)
    (CONTRACTS / f"{version}.json").write_text(render(record(package)))


def installed() -> tuple[Path, str]:
    """Folder and version of the installed vLLM, which is not imported."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent, installed_vllm()[1].public


def render(found: dict[str, Found]) -> str:
    """As JSON, one line per path and key, so that a difference is read at a glance."""
    lines = []
    for path in sorted(found):
        kinds = [f"    {json.dumps(key)}: {json.dumps(names)}" for key, names in sorted(found[path].items())]
        lines.append(f"  {json.dumps(path)}: {{\n" + ",\n".join(kinds) + "\n  }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
