"""What a folder of intermediate results was begun with, so that nobody goes on with something else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jakiro_vllm.errors import JakiroConfigError

_RECORD = "settings.json"


def check(folder: Path, settings: dict[str, Any]) -> None:
    """Compares settings with those that a folder was begun with, if it was.

    Args:
        folder: of results; need not be there.
        settings: what the results depend on; plain values, which may be nested.

    Raises:
        JakiroConfigError: naming the first difference, or that the note cannot be read.
    """
    record = folder / _RECORD
    if not record.is_file():
        return
    given = _flat(json.loads(json.dumps(settings)))
    try:
        found = _flat(json.loads(record.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise JakiroConfigError(f"{record} is damaged; delete {folder} or choose another output") from error
    for name in [*given, *found]:
        if given.get(name) != found.get(name):
            raise JakiroConfigError(
                f"{folder} was begun with {name} {found.get(name)!r}, now it is {given.get(name)!r}; choose another "
                "output or delete that folder"
            )


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Notes the settings in a new folder, or compares them; see ``check``."""
    check(folder, settings)
    if not (folder / _RECORD).is_file():
        write_atomically(folder / _RECORD, json.dumps(settings, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file that is either whole or as it was; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
