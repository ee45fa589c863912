"""Validates a tool call against the tools' JSON schemas. Lenient, because schemas in real data are often incomplete."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from pact_fast.data.schemas import accepts_null
from pact_fast.data.types import ToolCall, ToolSchema

_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str, "str": str,
    "integer": int, "int": int, "long": int,
    "number": (int, float), "float": (int, float), "double": (int, float),
    "boolean": bool, "bool": bool,
    "array": list, "list": list, "tuple": list,
    "object": dict, "dict": dict,
    "null": type(None), "none": type(None),
}  # fmt: skip
_MAX_TOOLS_SHOWN = 20


def call_error(call: ToolCall, tools: Sequence[ToolSchema]) -> str | None:
    """The reason why the call is not valid, or None.

    Checked: the tool exists; required arguments are present; `type` and `enum`, also inside objects and arrays; unknown
    arguments only where `additionalProperties` is false. A missing or unknown type ("any") accepts everything.
    """
    known = {str(function.get("name")): function for function in map(_function, tools)}
    if call.name not in known:
        return _unknown_tool(call.name, list(known))
    return value_error(call.arguments, _mapping(known[call.name].get("parameters")), f"{call.name}: ", top=True)


def tool_names(tools: Sequence[ToolSchema]) -> list[str]:
    """Names of the tools, in order."""
    return [str(_function(tool).get("name")) for tool in tools]


def parameters_of(name: str, tools: Sequence[ToolSchema]) -> dict[str, Any]:
    """{argument: its schema} of a tool; empty if the tool is unknown."""
    for function in map(_function, tools):
        if str(function.get("name")) == name:
            return _mapping(_mapping(function.get("parameters")).get("properties"))
    return {}


def declared_types(schema: dict[str, Any]) -> set[type]:
    """The Python types that `type`, `anyOf` and `oneOf` of a schema name; empty if they name no known type."""
    types: set[type] = set()
    alternatives = [schema.get(key) for key in ("anyOf", "oneOf")]
    for one in (schema, *(item for group in alternatives if isinstance(group, list) for item in group)):
        declared = _mapping(one).get("type")
        for name in declared if isinstance(declared, list) else [declared]:
            known = _TYPES.get(name.lower()) if isinstance(name, str) else None
            types.update(known if isinstance(known, tuple) else [known] if known else [])
    return types


def value_error(value: Any, schema: dict[str, Any], where: str, *, top: bool = False) -> str | None:
    """The reason why `value` does not fit `schema`, or None; the message starts with `where`."""
    if value is None and not top and accepts_null(schema):
        return None
    if not top and not _fits(value, schema.get("type")):
        return f"{where}must be {_type_names(schema['type'])}, not {_json_type(value)}"
    allowed = schema.get("enum")
    if isinstance(allowed, list) and value not in allowed:
        return f"{where}{str(value)[:60]!r} is not allowed; allowed: {str(allowed)[:160]}"
    if isinstance(value, dict):
        return _object_error(value, schema, where)
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        errors = (value_error(item, schema["items"], where) for item in value)
        return next((error for error in errors if error), None)
    return None


def _object_error(value: dict[str, Any], schema: dict[str, Any], where: str) -> str | None:
    properties = _mapping(schema.get("properties"))
    required = schema.get("required")
    missing = [name for name in required if name not in value] if isinstance(required, list) else []
    if missing:
        return f"{where}missing required argument {', '.join(repr(name) for name in missing[:5])}"
    for name, item in value.items():
        if name in properties:
            error = value_error(item, _mapping(properties[name]), f"{where}argument {name[:60]!r} ")
            if error:
                return error
        elif schema.get("additionalProperties") is False:
            return f"{where}unknown argument {name[:60]!r}; known: {', '.join(properties) or 'none'}"
    return None


def _fits(value: Any, declared: Any) -> bool:
    if isinstance(declared, list):
        return any(_fits(value, one) for one in declared)
    expected = _TYPES.get(declared.lower()) if isinstance(declared, str) else None
    if expected is None:
        return True
    if isinstance(value, bool):  # a bool is an int to Python, not to JSON
        return expected is bool
    if expected is int and isinstance(value, float):  # 3.0 is an integer in JSON schema
        return value.is_integer()
    return isinstance(value, expected)


def _unknown_tool(name: str, known: list[str]) -> str:
    name = name[:100]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    names = [*near, *(n for n in known if n not in near)]
    more = f" and {len(names) - _MAX_TOOLS_SHOWN} more" if len(names) > _MAX_TOOLS_SHOWN else ""
    return f"unknown tool {name!r}; tools: {', '.join(names[:_MAX_TOOLS_SHOWN]) or 'none'}{more}"


def _function(tool: ToolSchema) -> dict[str, Any]:
    return _mapping(_mapping(tool).get("function", tool))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _type_names(declared: Any) -> str:
    return " or ".join(map(str, declared)) if isinstance(declared, list) else str(declared)


def _json_type(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")
