"""Arguments that a format writes as plain text: strings as they are, everything else as JSON.

Such text has no type of its own ("7" may be a number or a string), so it is read by the type that the tool declares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pact_fast.chat.formats.json_calls import call_json, parse_json
from pact_fast.chat.tool_schema import call_error, declared_types, parameters_of
from pact_fast.data.schemas import accepts_null
from pact_fast.data.types import ToolCall, ToolSchema

_WORDS = {
    "True": True,
    "False": False,
    "None": None,
}  # templates that print Python's words, and models that learned them


def write_value(value: Any, markers: Sequence[str], python_words: bool = False) -> str:
    """The text of an argument. `python_words`: True, False and None instead of JSON's words.

    Markers in a string get another bracket (‹), since a string has no escapes here; elsewhere JSON escapes them.
    """
    if isinstance(value, str):
        for marker in markers:
            value = value.replace(marker, "‹" + marker[1:])
        return value
    if python_words and (value is None or isinstance(value, bool)):
        return str(value)
    return call_json(value, markers)


def read_value(text: str, schema: dict[str, Any]) -> Any:
    """The value of an argument's text. Text that does not fit the declared type stays text; the check names the error.

    Text of an argument without a declared type is JSON if it can be, else a string.
    """
    types = declared_types(schema)
    if text in ("null", "None") and accepts_null(schema):
        return None
    if str in types:
        allowed = tuple(kind for kind in (dict, list) if kind in types)
        value = _json_or_text(text) if allowed and text[:1] in ("{", "[") else text
        return value if isinstance(value, allowed) else text
    if bool in types and text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    enum = schema.get("enum")
    if not types and isinstance(enum, list) and text in enum:
        return text
    return _json_or_text(text)


def typed_call(name: str, texts: Sequence[tuple[str, str]], tools: Sequence[ToolSchema]) -> ToolCall | str:
    """The call of a tool with (name, text) arguments, or the reason why it is not valid."""
    schemas = parameters_of(name, tools)
    arguments: dict[str, Any] = {}
    for key, text in texts:
        if key in arguments:
            return f"{name[:100]}: the argument {key[:60]!r} is given twice"
        schema = schemas.get(key)
        arguments[key] = read_value(text, schema if isinstance(schema, dict) else {})
    call = ToolCall(name, arguments)
    return call_error(call, tools) or call


def _json_or_text(text: str) -> Any:
    word = text.strip()
    if word in _WORDS:
        return _WORDS[word]
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        return text
