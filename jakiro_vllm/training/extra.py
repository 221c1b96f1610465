"""Libraries that only training needs."""

from __future__ import annotations

import importlib
from types import ModuleType

from jakiro_vllm.errors import JakiroConfigError


def require(module: str) -> ModuleType:
    """Imports a library of the extra ``train``.

    Raises:
        JakiroConfigError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise JakiroConfigError(
            f"training needs the library {module!r}, which is not installed: pip install 'jakiro-vllm[train]'"
        ) from error
