"""Function documents of BFCL as OpenAI schemas: its types are Python's, not those of JSON schema."""

from __future__ import annotations

from typing import Any

from pact_fast.data.types import ToolSchema
from pact_fast.envs.bfcl.entries import Function

_TYPES = {"dict": "object", "float": "number", "tuple": "array", "list": "array", "String": "string", "any": None}
HINT = " Note that the provided function is in Python 3 syntax."  # the official loader appends it, too


def tool_schema(function: Function) -> ToolSchema:
    """The schema that the policy sees. What the function returns is left out, as in the official OpenAI-style handlers."""
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": function["description"] + HINT,
            "parameters": _convert(function["parameters"]),
        },
    }


def _convert(schema: Any) -> Any:
    """A copy in types of JSON schema; `any` accepts everything."""
    if not isinstance(schema, dict):
        return schema
    copy: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "type" and isinstance(value, str):
            name = _TYPES.get(value, value)
            if name is not None:
                copy["type"] = name
        elif key == "properties" and isinstance(value, dict):
            copy[key] = {name: _convert(item) for name, item in value.items()}
        elif key == "items":
            copy[key] = _convert(value)
        else:
            copy[key] = value
    return copy
