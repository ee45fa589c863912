"""The registry of tool-call formats, and the format that a configuration asks for."""

from __future__ import annotations

from pact_fast.chat.chat_template import ChatTemplate
from pact_fast.chat.formats.base import ToolFormat
from pact_fast.data.types import ToolCall
from pact_fast.errors import PactError
from pact_fast.registry import Registry

tool_format: Registry[type[ToolFormat]] = Registry(
    "tool format", "model.tool_format", "pact_fast.chat.formats", ToolFormat
)


def get_format(name: str) -> ToolFormat | None:
    """The format that `model.tool_format` names; None for `auto`. PactError if the name is unknown."""
    return None if name == "auto" else tool_format.get(name)()


def detect_format(template: ChatTemplate) -> ToolFormat:
    """The registered format in which the chat template writes a tool call. PactError if there is none."""
    call = ToolCall("look_up", {"name": "a", "n": 1})
    text = template.render_call(call)
    for name in tool_format.names():
        candidate = tool_format.get(name)()
        if any(variant.write_calls([call]) in text for variant in candidate.variants()):
            return candidate
    raise PactError(
        f"the chat template writes tool calls in none of the known formats ({', '.join(tool_format.names())}); set "
        "model.chat_template to a template that does (chatml_hermes for a model of ChatML), or model.tool_format to the "
        "format that the model was trained with, if the template shows no calls, or to one of your own (file.py:Class)"
    )
