"""Tool calls as JSON: writes a call, parses one that a model wrote, and words the error observations."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from pact_fast.chat.tool_schema import call_error
from pact_fast.data.types import ToolCall, ToolSchema

_DECODER = json.JSONDecoder()
MAX_DEPTH = 64  # nesting of arguments
_SMALL = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")
MAX_ERROR = 400  # characters of an error observation

HALF_A_PAIR = "the call holds half of a surrogate pair (\\ud800 to \\udfff)"
NOT_UTF8 = "the call is not valid UTF-8"
TOO_DEEP = f"the call is nested deeper than {MAX_DEPTH} levels"


def error_observation(error: str) -> str:
    """The observation of a malformed call: {"error": "…"}, at most 400 characters."""
    shown = error[:MAX_ERROR]
    while len(text := json.dumps({"error": shown + "…" * (shown != error)}, ensure_ascii=False)) > MAX_ERROR:
        shown = shown[:-8]
    return text


def read_call(body: bytes, tools: Sequence[ToolSchema], key: str) -> ToolCall | str:
    """Parse one call; the reason if it is not valid. `key` is the format's name for the arguments."""
    value, error = _read_json(body)
    if error:
        return error
    if not isinstance(value, dict):
        return f'the call must be a JSON object {{"name": …, "{key}": …}}'
    other = "parameters" if key == "arguments" else "arguments"
    body_value = value if "name" in value or not isinstance(value.get("function"), dict) else value["function"]
    name, arguments = body_value.get("name"), body_value.get(key, body_value.get(other))
    if not isinstance(name, str) or not name:
        return 'the call has no string "name"'
    return _checked(name, {} if arguments is None else arguments, tools, f'"{key}"')


def read_arguments(name: str, body: bytes, tools: Sequence[ToolSchema]) -> ToolCall | str:
    """A call of `name` whose arguments are the JSON `body`; the reason if it is not valid."""
    value, error = _read_json(body)
    return error or _checked(name, value, tools, "the arguments of a call")


def _checked(name: str, arguments: Any, tools: Sequence[ToolSchema], what: str) -> ToolCall | str:
    if not isinstance(arguments, dict):
        return f"{what} must be a JSON object"
    call = ToolCall(name, arguments)
    return call_error(call, tools) or call


def _read_json(body: bytes) -> tuple[Any, str]:
    """(value, "") or (None, the reason)."""
    try:
        return parse_json(body.decode("utf-8")), ""
    except UnicodeEncodeError:
        return None, HALF_A_PAIR
    except UnicodeDecodeError:
        return None, NOT_UTF8
    except RecursionError:
        return None, TOO_DEEP
    except ValueError as error:
        return None, f"the call is not valid JSON: {str(error)[:200]}"


def parse_json(text: str) -> Any:
    """The value of a JSON text: finite numbers, valid Unicode, at most MAX_DEPTH levels.

    Raises ValueError with the reason, UnicodeEncodeError for half of a surrogate pair, and RecursionError if too deep.
    """
    value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    if _depth_exceeds(value, MAX_DEPTH):
        raise RecursionError
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def parse_scalar(text: str) -> Any:
    """`parse_json` for a number or a word; fast for small integers, of which a turn may hold very many."""
    return int(text) if _SMALL.fullmatch(text) else parse_json(text)


def call_json(value: Any, markers: Sequence[str]) -> str:
    """JSON without markers: their angle brackets are written as \\u003c, square ones as \\u005b."""
    text = json.dumps(value, ensure_ascii=False)
    for marker in markers:
        text = text.replace(marker, marker.replace("<", "\\u003c").replace("[", "\\u005b"))
    return text


def json_end(text: str, start: int) -> int | None:
    """Return the index after the JSON value at `start`; None if it is malformed or nested too deep for the parser.

    `text` may be bytes decoded as Latin-1: JSON's structure is ASCII, and each byte is one character.
    """
    try:
        return _DECODER.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _depth_exceeds(value: Any, limit: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    if limit == 0:
        return True
    return any(_depth_exceeds(item, limit - 1) for item in (value.values() if isinstance(value, dict) else value))
