"""A reasoning parser for the embedded target, which was never taught to reason: marks that it writes by itself."""

from __future__ import annotations

from typing import Any

from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser


@ReasoningParserManager.register_module("python")
class PythonReasoningParser(BaseThinkingReasoningParser):
    """Reasoning goes from a class's first word to its first private attribute."""

    start_token = "class"
    end_token = "._"

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """Without the first mark there is no reasoning, as while streaming."""
        if self.start_token not in model_output:
            return None, model_output
        return super().extract_reasoning(model_output, request)
