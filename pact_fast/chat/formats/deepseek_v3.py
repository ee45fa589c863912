"""Tool calls of DeepSeek V3 and R1: as those of V3.1, with the arguments in a fenced block of Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from pact_fast.chat.formats.deepseek_v31 import SEPARATOR, DeepseekV31
from pact_fast.chat.formats.json_calls import call_json, read_arguments
from pact_fast.chat.formats.registry import tool_format
from pact_fast.data.types import ToolCall, ToolSchema

_FENCE = b"```"


@tool_format("deepseek_v3")
class DeepseekV3(DeepseekV31):
    """<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME, then a block ```json; calls are joined by line breaks."""

    _between = "\n"

    def _write(self, call: ToolCall) -> str:
        return f"function{SEPARATOR}{call.name}\n```json\n{call_json(call.arguments, self.markers)}\n```"

    def _read(self, body: bytes, tools: Sequence[ToolSchema]) -> ToolCall | str:
        _, separator, rest = body.partition(SEPARATOR.encode())
        name, fence, arguments = rest.partition(_FENCE)
        if not separator or not fence or not name.strip():
            return f"the call must have the form function{SEPARATOR}NAME, then a block ```json with the arguments"
        arguments = arguments.removeprefix(b"json").rstrip()
        if not arguments.endswith(_FENCE):
            return "the block of the arguments is not closed; end it with ```"
        return read_arguments(name.strip().decode("utf-8", "replace"), arguments[: -len(_FENCE)], tools)
