"""Keys of messages, calls and tools: our names, the names that other projects use, and an error for all others.

An unknown key is an error, not an absence: a call whose arguments stand under a key that nobody reads would be trained
without arguments. Upper case and underscores do not matter (`inputSchema` is `input_schema`). Null values count as
absent, and so do empty values of unknown keys, which exporters write as padding.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class KeyTable:
    """The keys of one kind of object.

    what     the kind of object, for messages
    names    our names
    others   other name -> our name
    ignored  keys without a meaning for training
    """

    what: str
    names: tuple[str, ...]
    others: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @cached_property
    def _own(self) -> dict[str, str]:
        """Folded key -> our name; "" for an ignored key."""
        own = {_fold(name): name for name in self.names}
        own |= {_fold(other): name for other, name in self.others.items()}
        return own | {_fold(name): "" for name in self.ignored}

    @cached_property
    def _plain(self) -> frozenset[str]:
        return frozenset(self.names)

    def read(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """The object under our names, without null entries and ignored keys.

        Raises ValueError if a key is unknown, or if two names of one key hold different values.
        """
        if value.keys() <= self._plain and None not in value.values():
            return dict(value)
        found: dict[str, Any] = {}
        for key, item in value.items():
            if item is None:
                continue
            name = key if key in self.names else self._own.get(_fold(str(key)))
            if name is None:
                if item in ("", [], {}):
                    continue
                raise ValueError(f"{self.what} has the unknown key {str(key)[:40]!r}{self._hint(str(key))}")
            if not name:
                continue
            if found.get(name) in (None, "", [], {}):
                found[name] = item
            elif item not in ("", [], {}) and item != found[name]:
                raise ValueError(f"{self.what} has '{name}' under two names with different values; keep one of them")
        return found

    def _hint(self, key: str) -> str:
        close = difflib.get_close_matches(_fold(key), self._own, n=1, cutoff=0.6)
        name = next((n for n in (*self.names, *self.others) if close and _fold(n) == close[0]), None)
        if name:
            return f"; did you mean '{name}'? Correct or remove it"
        return f"; known keys are {', '.join(self.names)}; rename or remove it"


def _fold(key: str) -> str:
    return key.replace("_", "").replace("-", "").lower()


MESSAGE = KeyTable(
    "the message",
    (
        *("role", "content", "tool_calls", "reasoning_content", "reasoning_segments", "tool_call_id", "name"),
        "function_call",
    ),
    {
        "reasoning": "reasoning_content",
        "thinking": "reasoning_content",
        "call_id": "tool_call_id",
        "tool_use_id": "tool_call_id",
        "tool_name": "name",
    },
    # fields that chat APIs return beside the text
    ("id", "object", "created", "index", "refusal", "audio", "annotations", "finish_reason", "stop_reason", "metadata"),
)
CALL = KeyTable(
    "the tool call",
    ("id", "name", "arguments"),
    {
        "parameters": "arguments",
        "input": "arguments",
        "args": "arguments",
        "kwargs": "arguments",
        "tool_name": "name",
        "call_id": "id",
        "tool_call_id": "id",
    },
    ("type", "index", "status"),
)
TOOL = KeyTable(
    "the tool",
    # those after `parameters` are kept for templates that show the whole schema
    ("name", "description", "parameters", "strict", "return", "returns", "response", "output_schema", "outputSchema"),
    {"input_schema": "parameters", "parameters_json_schema": "parameters", "args_schema": "parameters"},
    ("type", "cache_control", "annotations", "title", "icons", "_meta"),
)
