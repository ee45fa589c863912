"""Tool calls that an assistant message writes into its text, in the form of a model family instead of `tool_calls`."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_MARKERS = re.compile(
    r"</?tool_call>|<\|python_tag\|>|<\|?tool_calls?(?:_begin|_start|_section_begin)?\|?>|\[TOOL_CALLS\]|<function=\w"
    r"|<｜tool▁calls?▁begin｜>|<invoke name=|functools\["
)
_ARGUMENTS = ("arguments", "parameters", "args", "input")


def calls_in_text(text: str, names: Collection[str]) -> tuple[list[Any], str]:
    """(calls, the text without them).

    Read are JSON objects between <tool_call> tags, and a text that as a whole is the JSON of calls of the tools `names`.

    Raises:
        ValueError: The text has call markers that cannot be read.
    """
    if not _MARKERS.search(text):
        return (calls, "") if (calls := _whole(text, names)) else ([], text)
    calls = []
    for match in _TAGGED.finditer(text):
        try:
            calls.append(json.loads(match.group(1)))
        except (ValueError, RecursionError):
            raise ValueError("'content' has a <tool_call> that is not JSON; give the calls in 'tool_calls'") from None
    rest = _TAGGED.sub("", text).strip()
    marker = _MARKERS.search(rest)
    if marker:
        raise ValueError(
            f"'content' writes a tool call as text ({marker.group()!r}); give the calls in 'tool_calls', as "
            '{"name": …, "arguments": {…}}'
        )
    return calls, rest


def _whole(text: str, names: Collection[str]) -> list[Any]:
    """The calls that the text as a whole is the JSON of; [] if it is anything else."""
    if not text.lstrip().startswith(("{", "[")) or '"' not in text:
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = value if isinstance(value, list) else [value]
    return calls if calls and all(_is_call(call, names) for call in calls) else []


def _is_call(value: Any, names: Collection[str]) -> bool:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    return isinstance(value, dict) and value.get("name") in names and any(key in value for key in _ARGUMENTS)
