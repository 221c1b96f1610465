"""Whether the installed vLLM still is what this package was written against.

``vllm_interface`` lists what is needed; this module reads what there is, and says the first difference in one
sentence. What was found is kept in one shape, whether it was read from a running vLLM (here) or from the sources of
another version (``packaging/record_contract.py``): per path, lists of names under the keys ``parameters``,
``attributes``, ``stores`` and ``refers``. A parameter with a default ends with ``=``.
"""

from __future__ import annotations

import dis
import importlib
import inspect
from collections.abc import Iterable, Iterator
from enum import Enum
from functools import cache
from importlib import metadata
from types import CodeType
from typing import Any

from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.integration.version import installed_vllm
from jakiro_vllm.integration.vllm_interface import ENTRIES, Entry, Need, Where

Found = dict[str, list[str]]

#: Under which key of ``Found`` each need is answered.
ANSWERED_BY = {
    Need.OVERRIDDEN: "parameters",
    Need.CALLED: "parameters",
    Need.ATTRIBUTES: "attributes",
    Need.STORES: "stores",
    Need.REFERS: "refers",
}
_MISSING = {
    Need.ATTRIBUTES: "has no",
    Need.STORES: "does not assign",
    Need.REFERS: "does not use",
}


def entries_of(platform: str) -> list[Entry]:
    """What one process needs.

    Args:
        platform: ``cpu`` or ``cuda`` for a worker, ``front`` for the process that reads the user's arguments.

    Raises:
        ValueError: for another name.
    """
    if platform not in ("front", "cpu", "cuda"):
        raise ValueError(f"platform must be one of front, cpu, cuda, got {platform!r}")
    wanted = {Where(platform)} | ({Where.BOTH} if platform != "front" else set())
    return [entry for entry in ENTRIES if entry.where in wanted]


def check_installed(platform: str, entries: Iterable[Entry] | None = None) -> None:
    """Refuses a vLLM that differs from what this package needs of it.

    Args:
        platform: as for ``entries_of``.
        entries: instead of the platform's.

    Raises:
        JakiroConfigError: naming the first difference, both versions, and the remedy.
    """
    for entry in entries_of(platform) if entries is None else entries:
        reason = mismatch(entry, inspect_installed(entry))
        if reason is not None:
            name, version = installed_vllm()
            raise JakiroConfigError(
                f"jakiro-vllm {metadata.version('jakiro-vllm')} does not fit {name} {version}: {reason}; "
                "install a supported vLLM, or a jakiro-vllm made for this one"
            )


def mismatch(entry: Entry, found: Found | None) -> str | None:
    """Returns how vLLM differs from what an entry needs, or None.

    Args:
        entry: what is needed.
        found: what vLLM has at the entry's path, None for nothing.
    """
    path, purpose = entry.path.replace(":", "."), f"needed to {entry.purpose}"
    if found is None:
        return f"it has no {path}, {purpose}"
    names = found.get(ANSWERED_BY[entry.need], [])
    if entry.need in _MISSING:
        absent = ", ".join(name.replace("=", " = ") for name in entry.names if name not in names)
        return f"{path} {_MISSING[entry.need]} {absent}, {purpose}" if absent else None
    fits = _same if entry.need is Need.OVERRIDDEN else _accepts
    if fits(entry.names, names):
        return None
    return f"{path}, {purpose}, takes ({', '.join(names)}) instead of ({', '.join(entry.names)})"


def _same(wanted: tuple[str, ...], parameters: list[str]) -> bool:
    return wanted == tuple(name.rstrip("=") for name in parameters)


def _accepts(wanted: tuple[str, ...], parameters: list[str]) -> bool:
    """Whether a call goes through: leading parameters by position, those after ``*`` by name, no other required."""
    split = wanted.index("*") if "*" in wanted else len(wanted)
    leading, by_name = wanted[:split], wanted[split + 1 :]
    names = [name.rstrip("=") for name in parameters]
    rest = dict(zip(names[split:], parameters[split:], strict=True))
    return (
        tuple(names[:split]) == leading
        and all(name in rest for name in by_name)
        and all(text.endswith("=") or text.startswith("*") or name in by_name for name, text in rest.items())
    )


# ---- what is installed ----


def inspect_installed(entry: Entry) -> Found | None:
    """Reads what the installed vLLM has for one entry; None if it has nothing at the path."""
    module_name, _, qualified = entry.path.partition(":")
    try:
        owner: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not module_name.startswith(error.name or " "):
            raise  # something else that vLLM needs is not installed
        return None
    target = owner
    for name in qualified.split(".") if qualified else ():
        owner = target
        try:
            target = inspect.getattr_static(owner, name) if inspect.isclass(owner) else getattr(owner, name)
        except AttributeError:
            return None
    key = ANSWERED_BY[entry.need]
    if key == "attributes":
        return {key: [name for name in entry.names if _has(target, name)]}
    if key == "parameters":
        return {key: list(_parameters(target if inspect.isclass(target) else _plain(target)))}
    functions = [_plain(member) for member in (vars(target).values() if inspect.isclass(target) else [target])]
    read = _stored if key == "stores" else _referred
    codes = [getattr(function, "__code__", None) for function in functions]
    return {key: sorted({name for code in codes for name in read(code, set(entry.names))})}


def _plain(target: Any) -> Any:
    """The function as it was written, without its decorators."""
    return inspect.unwrap(getattr(target, "__func__", target))


def _has(target: Any, wanted: str) -> bool:
    name, pinned, value = wanted.partition("=")
    if pinned:
        found = getattr(target, name, None)
        return hasattr(target, name) and str(found.value if isinstance(found, Enum) else found) == value
    annotated = (vars(c).get("__annotations__", {}) for c in getattr(target, "__mro__", ()))
    return hasattr(target, name) or any(name in names for names in annotated)


def _parameters(function: Any) -> Iterator[str]:
    marks: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    for parameter in inspect.signature(function).parameters.values():
        default = "" if parameter.default is inspect.Parameter.empty else "="
        yield f"{marks.get(parameter.kind, '')}{parameter.name}{default}"


def _codes(code: CodeType | None) -> Iterator[CodeType]:
    """A function's code and that of the functions inside it."""
    if code is not None:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _codes(constant)


def _stored(code: CodeType | None, wanted: set[str]) -> set[str]:
    """Those of the wanted attributes that a function assigns."""
    parts = [part for part in _codes(code) if not wanted.isdisjoint(part.co_names)]
    return wanted & {i.argval for part in parts for i in _instructions(part) if i.opname == "STORE_ATTR"}


def _referred(code: CodeType | None, wanted: set[str]) -> set[str]:
    """Those of the wanted names that a function uses as globals or attributes, not as its own variables."""
    names: set[str] = set()
    for part in _codes(code):
        used = wanted & set(part.co_names)
        unclear = used & {*part.co_varnames, *part.co_cellvars}  # a variable as well, or imported into one
        loads = ("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD")
        names |= used - unclear
        if unclear:
            names |= unclear & {i.argval for i in _instructions(part) if i.opname in loads}
    return names


@cache
def _instructions(code: CodeType) -> list[dis.Instruction]:
    return list(dis.get_instructions(code))
