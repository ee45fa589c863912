"""Calls in Python's notation, [f(x=1, y='text'), g()]: writes them, and reads them without Python's own parser.

Chat templates write strings between quotes as they are, without escapes, so a text such as 'it's' must be readable: a quote
ends a string only where the notation can go on. JSON values are read, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from pact_fast.chat.formats.json_calls import HALF_A_PAIR, MAX_DEPTH, TOO_DEEP, call_json, parse_scalar
from pact_fast.chat.tool_schema import call_error
from pact_fast.data.types import ToolCall, ToolSchema

_NAME = re.compile(r"\s*([\w.\-]+)\s*\(\s*")
_KEY = re.compile(r"\s*([^\s=()\[\]{},:'\"]+)\s*=\s*")
_SCALAR = re.compile(r"[\w.+\-]{1,400}")
_BLANKS = re.compile(r"\s*")
_QUOTE_ENDS = {quote: re.compile(rf"(?s:\\.)|{quote}(?=\s*[,:)\]}}]|\s*\Z)") for quote in "'\""}
_ENDS_EARLY = re.compile(r"'\s*(?:[,:)\]}]|\Z)")  # a quote in a text that would end it
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|(?s:.))")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\\": "\\", "'": "'", '"': '"', "\n": ""}
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


def write_calls(calls: Sequence[ToolCall], markers: Sequence[str], escaped: bool) -> str:
    """The calls as a list.

    Args:
        calls: At least one.
        markers: Strings that the text of an argument must not contain; their first character is replaced.
        escaped: Escape quotes, backslashes and line breaks of strings, and write lists as JSON; otherwise strings are
            written as they are if they can be read back, and lists as Python prints them.
    """
    return "[" + ", ".join(f"{call.name}({_arguments(call, markers, escaped)})" for call in calls) + "]"


def checked(call: ToolCall, tools: Sequence[ToolSchema]) -> ToolCall | str:
    """The call, or why it does not fit the tools."""
    return call_error(call, tools) or call


def read_calls(
    text: str,
    tools: Sequence[ToolSchema],
    limit: int,
    check: Callable[[ToolCall, Sequence[ToolSchema]], ToolCall | str] = checked,
) -> list[tuple[int, ToolCall | str]]:
    """(end in the text, call or error) of a list of at most `limit` calls; nothing is read after malformed text."""
    found: list[tuple[int, ToolCall | str]] = []
    try:
        at = _expect(text, 0, "[")
        done = _expect_if(text, at, "]")
        while not done:
            call, at = _call(text, at)
            done = _expect_if(text, at, "]")
            at = done or _expect(text, at, ",")
            found.append((at, check(call, tools)))
            if not done and len(found) == limit:
                return found
        if text[done:].strip():
            return [*found, (len(text), f"unexpected text after the calls: {text[done:].strip()[:40]!r}")]
    except RecursionError:
        return [*found, (len(text), TOO_DEEP)]
    except UnicodeDecodeError:
        return [*found, (len(text), HALF_A_PAIR)]
    except (ValueError, OverflowError) as error:
        return [*found, (len(text), f"the call is not valid: {str(error)[:200]}")]
    return found or [(len(text), "the list of calls is empty")]


def read_value(text: str) -> Any:
    """The value of a text in Python's notation, or JSON's. ValueError or RecursionError if it is none."""
    value, end = _value(text, 0, MAX_DEPTH)
    if text[end:].strip():
        raise ValueError(f"unexpected text after the value: {text[end : end + 40]!r}")
    return value


def printed_value(value: Any, markers: Sequence[str]) -> str:
    """The value as Python prints it, strings between quotes that are escaped."""
    return _printed(value, markers)


def _arguments(call: ToolCall, markers: Sequence[str], escaped: bool) -> str:
    written = []
    for key, value in call.arguments.items():
        if isinstance(value, str):
            text = _quoted(_without(value, markers), escaped)
        elif isinstance(value, dict) or (escaped and isinstance(value, list)):
            text = call_json(value, markers)
        else:
            text = _printed(value, markers)
        written.append(f"{key}={text}")
    return ", ".join(written)


def _quoted(text: str, escaped: bool) -> str:
    """A string between quotes, without escapes if it can be read back and need not have them."""
    if not escaped and "\\" not in text and not _ENDS_EARLY.search(text):
        return f"'{text}'"
    for character, written in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(character, written)
    return f"'{text}'"


def _printed(value: Any, markers: Sequence[str]) -> str:
    """The value as Python prints it."""
    if isinstance(value, str):
        return repr(_without(value, markers))
    if isinstance(value, dict):
        pairs = (f"{_printed(key, markers)}: {_printed(item, markers)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_printed(item, markers) for item in value) + "]"
    return str(value)


def _without(text: str, markers: Sequence[str]) -> str:
    for marker in markers:
        text = text.replace(marker, "‹" + marker[1:])
    return text


def _call(text: str, at: int) -> tuple[ToolCall, int]:
    name = _NAME.match(text, at)
    if not name:
        raise ValueError(f"expected name(key=value) at {text[at : at + 40]!r}")
    at = name.end()
    arguments: dict[str, Any] = {}
    done = _expect_if(text, at, ")")
    while not done:
        key = _KEY.match(text, at)
        if not key:
            raise ValueError(f"expected key=value at {text[at : at + 40]!r}")
        if key[1] in arguments:
            raise ValueError(f"the argument {key[1][:60]!r} is given twice")
        arguments[key[1]], at = _value(text, key.end(), MAX_DEPTH)
        done = _expect_if(text, at, ")")
        at = done or _expect(text, at, ",")
    return ToolCall(name[1], arguments), done


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """(value, its end) at a place of the text. ValueError with the reason; RecursionError if nested deeper than `depth`."""
    at = _skip(text, at)
    first = text[at : at + 1]
    if first in ("'", '"'):
        return _string(text, at)
    if first in ("[", "{"):
        if depth == 0:
            raise RecursionError
        return _items(text, at + 1, depth - 1, "]" if first == "[" else "}")
    scalar = _SCALAR.match(text, at)
    if scalar and scalar.group() in _WORDS:
        return _WORDS[scalar.group()], scalar.end()
    if scalar:
        try:
            return parse_scalar(scalar.group()), scalar.end()
        except ValueError:
            pass
    raise ValueError(f"expected a value at {text[at : at + 40]!r}; write strings between quotes")


def _items(text: str, at: int, depth: int, closing: str) -> tuple[Any, int]:
    """The items of a list or an object, after its bracket."""
    items: list[Any] = []
    pairs: dict[str, Any] = {}
    done = _expect_if(text, at, closing)
    while not done:
        item, at = _value(text, at, depth)
        if closing == "}":
            if not isinstance(item, str):
                raise ValueError(f"the key {str(item)[:40]!r} is no string")
            pairs[item], at = _value(text, _expect(text, at, ":"), depth)
        else:
            items.append(item)
        done = _expect_if(text, at, closing)
        at = done or _expect(text, at, ",")
    return (pairs if closing == "}" else items), done


def _string(text: str, at: int) -> tuple[str, int]:
    for found in _QUOTE_ENDS[text[at]].finditer(text, at + 1):
        if not found.group().startswith("\\"):
            inside = _ESCAPE.sub(_unescape, text[at + 1 : found.start()])
            return inside.encode("utf-16", "surrogatepass").decode("utf-16"), found.end()
    raise ValueError(f"the string {text[at : at + 40]!r} is not closed")


def _unescape(escape: re.Match[str]) -> str:
    code = escape[1]
    if len(code) > 1:
        return chr(int(code[1:], 16))
    return _ESCAPES.get(code, escape.group())


def _expect(text: str, at: int, what: str) -> int:
    """The place after `what`, which must follow."""
    after = _expect_if(text, at, what)
    if not after:
        raise ValueError(f"expected {what!r} at {text[at : at + 40]!r}")
    return after


def _expect_if(text: str, at: int, what: str) -> int:
    """The place after `what`, or 0 if something else follows."""
    at = _skip(text, at)
    return at + len(what) if text.startswith(what, at) else 0


def _skip(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    return found.end() if found else at
