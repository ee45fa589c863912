"""Calls with values of every type, and the tool that they call."""

from __future__ import annotations

from pact_fast.data.types import ToolCall

PROPERTIES = {
    "text": {"type": "string", "description": "t"},
    "count": {"type": "integer", "description": "c"},
    "share": {"type": "number", "description": "s"},
    "flag": {"type": "boolean", "description": "f"},
    "maybe": {"type": "string", "nullable": True, "description": "m"},
    "nested": {"type": "object", "description": "n"},
    "items": {"type": "array", "description": "i", "items": {"type": "string"}},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "d",
            "parameters": {"type": "object", "properties": PROPERTIES, "required": []},
        },
    }
]
CALLS = [
    ToolCall("f", {"text": 'a "b" é 中 🙂'}),
    ToolCall("f", {"text": "7", "count": 7}),
    ToolCall("f", {"text": "true", "flag": True}),
    ToolCall("f", {"flag": False, "maybe": None, "share": -0.25}),
    ToolCall("f", {"text": "<b>1 & 2</b> {[\\n]} | ' \\ , ;"}),
    ToolCall("f", {"text": "two\nlines", "nested": {"a": {"b": [1, "x", None, True]}, "é": 1.5}}),
    ToolCall("f", {"items": ["a", "7", ""]}),
    ToolCall("f", {}),
]
