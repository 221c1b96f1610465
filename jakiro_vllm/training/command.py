"""``jakiro-vllm train``: its flags, and its phases from prompts to a head. A phase that is complete is skipped."""

from __future__ import annotations

import argparse
import inspect
import logging
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

from jakiro_vllm.errors import JakiroConfigError
from jakiro_vllm.training.settings import Section, TrainSettings, load_settings

logger = logging.getLogger(__name__)

#: Shorter names of the settings that most runs choose.
SHORT = {
    "data": "data.sources",
    "variant": "head.variant",
    "prompts": "data.prompts",
    "epochs": "optimizer.epochs",
    "lr": "optimizer.lr",
    "ray": "scale.ray",
    "workers": "scale.workers",
}
_EPILOG = """\
Every setting is a flag, and a key of the YAML file given with --settings: --optimizer.lr is the key lr under
optimizer. Flags win. Values are written as in YAML: --generation.temperatures "[0, 0.8]".
Run the same command again after an interruption: it goes on where it was.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each setting, described by the settings' own documentation."""
    parser.epilog, parser.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("target", metavar="TARGET", nargs="?", help="folder or Hugging Face name of the target")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="YAML file with any of the settings below")
    parser.add_argument("--output", metavar="DIR", help="folder of the head; DIR/work keeps what a resume needs")
    descriptions = {name: text for _, entries in _sections() for name, text in entries.items()}
    often = parser.add_argument_group("most used")
    for short, name in SHORT.items():
        how: dict[str, Any] = {"metavar": short.upper()}
        if name == "data.sources":
            how = {"nargs": "+", "metavar": "FILE_OR_DATASET"}
        elif name == "scale.ray":
            how = {"action": "store_const", "const": "true"}
        often.add_argument(f"--{short}", dest=name, help=descriptions[name], **how)
    for section, entries in _sections():
        group = parser.add_argument_group(section)
        for name, text in entries.items():
            if name not in SHORT.values():
                group.add_argument(f"--{name}", dest=name, metavar="VALUE", help=text)


def _sections() -> list[tuple[str, dict[str, str]]]:
    """Per group of settings the description of each, by dotted name."""
    found = []
    for section, field in TrainSettings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found.append((section, {f"{section}.{name}": text for name, text in _attributes(kind).items()}))
    return found


def _attributes(model: type[Section]) -> dict[str, str]:
    """The ``Attributes`` of a class's docstring, with the defaults."""
    block = inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", block, re.MULTILINE)
    described = {}
    for name, text in entries:
        default = model.model_fields[name].get_default(call_default_factory=True)
        shown = "" if model.model_fields[name].is_required() else f" (default: {_plain(default)})"
        described[name] = " ".join(text.replace("``", "").split()).rstrip(".").replace("%", "%%") + shown
    return described


def _plain(value: Any) -> str:
    """A default as YAML would have it."""
    shown = yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, width=1000)
    return shown.strip().removesuffix("...").strip()


def settings_of(args: argparse.Namespace) -> TrainSettings:
    """The settings that flags and file make together.

    Raises:
        JakiroConfigError: on anything that is missing, unknown or out of range.
    """
    overrides: dict[str, Any] = {}
    for name, value in vars(args).items():
        if value is None:
            continue
        if name in ("target", "output", "data.sources", "head.variant"):
            overrides[name] = value
        elif "." in name:
            try:
                overrides[name] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise JakiroConfigError(f"--{name} takes a YAML value, got {value!r}") from error
    return load_settings(args.settings, overrides)


def run(args: argparse.Namespace) -> int:
    """The subcommand; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    from jakiro_vllm.training.phases import train

    settings = settings_of(args)
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
        train(settings)
    except OSError as error:  # a disk that is full, a folder that cannot be written
        raise JakiroConfigError(
            f"{error.filename or settings.output}: {error.strerror or error}; what is finished is kept, mend it and "
            "run the command again"
        ) from error
    return 0
