"""The command line and the configuration: the only two functions of vLLM that are wrapped.

vLLM has no registry for speculative methods, and it dropped ``--speculative-model``. Both patches can go
when it lets a plugin register a method. Both pass everything else through untouched.
"""

from __future__ import annotations

import functools
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jakiro_vllm.integration.patches.base import Patch

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs

METHOD = "jakiro"


class _SpeculativeModel(Action):
    """``--speculative-model HEAD`` selects the method and the head."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option: str | None = None) -> None:
        for flag, attribute, wanted in (
            ("--spec-method", "spec_method", METHOD),
            ("--spec-model", "spec_model", values),
        ):
            given = getattr(namespace, attribute, None)
            if given not in (None, wanted):
                parser.error(f"{option} {values} and {flag} {given} exclude each other")
        namespace.spec_method = METHOD
        namespace.spec_model = values


class AddCliArgs(Patch):
    """Adds ``--speculative-model`` to ``vllm serve`` and every other parser of engine arguments."""

    attribute = "add_cli_args"
    parameters = ("parser",)

    @classmethod
    def target(cls) -> type:
        from vllm.engine.arg_utils import EngineArgs

        return EngineArgs

    @classmethod
    def wrap(cls, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def add_cli_args(parser: ArgumentParser) -> ArgumentParser:
            parser = original(parser)
            group = parser.add_argument_group("Jakiro", "Speculative decoding with token trees (jakiro-vllm).")
            group.add_argument(
                "--speculative-model",
                action=_SpeculativeModel,
                metavar="HEAD",
                help="Draft token trees with this Jakiro head: a folder, a Hugging Face name, or 'jakiro' for "
                "the published head of a known target.",
            )
            return parser

        return add_cli_args


class CreateSpeculativeConfig(Patch):
    """Turns ``method: jakiro`` into what vLLM knows: ``custom_class``, a worker and additional config."""

    attribute = "create_speculative_config"
    parameters = ("self", "target_model_config", "target_parallel_config")

    @classmethod
    def target(cls) -> type:
        from vllm.engine.arg_utils import EngineArgs

        return EngineArgs

    @classmethod
    def wrap(cls, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def create_speculative_config(
            self: EngineArgs, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
        ) -> SpeculativeConfig | None:
            given = self.speculative_config or {}
            if METHOD in (self.spec_method, given.get("method")):
                from jakiro_vllm.integration.front_end import select_jakiro

                select_jakiro(self, target_model_config, target_parallel_config)
            return original(self, target_model_config, target_parallel_config)

        return create_speculative_config
