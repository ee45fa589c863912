"""Reads calls whose arguments stand between tags of their own, as text: Qwen3-Coder's, GLM's, MiniMax's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from pact_fast.chat.formats.json_calls import NOT_UTF8
from pact_fast.chat.formats.tagged import read_pairs
from pact_fast.chat.formats.typed_values import typed_call
from pact_fast.data.types import ToolCall, ToolSchema


class ArgumentTags(NamedTuple):
    """Syntax of a call whose arguments are written between tags.

    name      start of the call; group 1 is the tool's name
    opening   opening tag of an argument; group 1 is the argument's name
    closing   closing tag of an argument
    rest      text allowed after the last argument
    no_name   error message for a call without a name
    unclosed  error message for an argument that is not closed; `{}` is replaced by its name
    expected  the expected tags, named in the error message for any other text
    """

    name: re.Pattern[str]
    opening: re.Pattern[str]
    closing: re.Pattern[str]
    rest: re.Pattern[str]
    no_name: str
    unclosed: str
    expected: str

    def read(self, body: bytes, tools: Sequence[ToolSchema]) -> ToolCall | str:
        """The call of a text, with arguments of the types that the tool declares; the reason if it is not valid."""
        try:
            text = body.decode("utf-8")
        except UnicodeDecodeError:
            return NOT_UTF8
        name = self.name.match(text)
        if not name:
            return self.no_name
        found = read_pairs(text, name.end(), self.opening, self.closing, self.unclosed)
        if isinstance(found, str):
            return found
        arguments, position = found
        if not self.rest.match(text, position):
            return f"expected {self.expected} at {text[position : position + 40]!r}"
        return typed_call(name[1].strip(), arguments, tools)
