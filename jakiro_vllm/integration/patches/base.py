"""What a patch is: one wrapped function, its reason, and when it can go."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

_OWNER = "_jakiro_original"


class Patch(ABC):
    """Wraps one attribute of a vLLM class.

    Attributes:
        attribute: name of the wrapped function.
        parameters: parameter names it must have, so that another vLLM fails loudly instead of subtly.
    """

    attribute: str
    parameters: tuple[str, ...]

    @classmethod
    @abstractmethod
    def target(cls) -> type:
        """The class that is patched; imported late, because plugins load early."""

    @classmethod
    @abstractmethod
    def wrap(cls, original: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the replacement."""

    @classmethod
    def apply(cls) -> None:
        """Installs the patch unless it is installed.

        Raises:
            RuntimeError: if the function is not the one this package was written for.
        """
        owner = cls.target()
        static = isinstance(inspect.getattr_static(owner, cls.attribute), staticmethod)
        original = getattr(owner, cls.attribute)
        if hasattr(original, _OWNER):
            return
        found = tuple(inspect.signature(original).parameters)
        if found != cls.parameters:
            raise RuntimeError(
                f"{owner.__name__}.{cls.attribute} takes {found} in this vLLM, jakiro-vllm expects "
                f"{cls.parameters}; install a supported vLLM"
            )
        replacement = cls.wrap(original)
        setattr(replacement, _OWNER, original)
        setattr(owner, cls.attribute, staticmethod(replacement) if static else replacement)
