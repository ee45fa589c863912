"""Tools of a domain: typed Python functions whose first parameter is the database. Schemas are derived from the rest."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_type_hints

from pact_fast.data.readers import tool_schema
from pact_fast.data.types import ToolSchema
from pact_fast.envs.domain.database import Database
from pact_fast.errors import PactError, error_line

Tool = Callable[..., Any]


class ToolError(Exception):
    """Refusal of a tool. Its caller sees the text, and the changes of the call are undone."""


def by_name(functions: Iterable[Tool]) -> dict[str, Tool]:
    """Tools by name. PactError if two have the same name, or one does not take the database first."""
    tools: dict[str, Tool] = {}
    for function in functions:
        name = function.__name__
        if name in tools:
            raise PactError(f"two tools of the domain are called '{name}'; rename one of them")
        if not inspect.signature(function).parameters:
            raise PactError(f"the tool '{name}' takes no arguments; its first parameter must be the database")
        tools[name] = function
    return tools


def schema_of(function: Tool, hidden: int = 1) -> ToolSchema:
    """The OpenAI schema of a tool. PactError if a type hint or description is missing.

    Args:
        function: The tool.
        hidden: Parameters at the front that its caller does not give: the database, and for a user's tool the device.
    """
    parameters = list(inspect.signature(function).parameters.values())
    rest, names = parameters[hidden:], {parameter.name for parameter in parameters[:hidden]}
    hints = {name: hint for name, hint in get_type_hints(function).items() if name not in names}

    def shown(**_: Any) -> Any: ...

    shown.__name__, shown.__doc__, shown.__annotations__ = function.__name__, function.__doc__, hints
    shown.__signature__ = inspect.Signature(rest)  # type: ignore[attr-defined]
    return tool_schema(shown)


def call_tool(tools: Mapping[str, Tool], db: Database, name: str, arguments: Mapping[str, Any]) -> tuple[str, bool]:
    """Call a tool. Never raises; a failed call changes nothing.

    Args:
        tools: {name: tool} of the agent or of the user.
        db: The state.
        name: The tool's name, known or not.
        arguments: As the caller gave them; the tool checks them.

    Returns:
        (observation, whether the call was carried out). A result that is a dict or list is JSON, None is "ok", anything
        else its str.
    """
    tool = tools.get(name)
    if tool is None:
        return f"error: there is no tool '{name}'", False
    saved = db.snapshot()
    try:
        result = tool(db, **arguments)
    except ToolError as error:
        text = f"error: {error}"
    except Exception as error:  # a bug of the domain, or arguments that its author has not thought of
        text = f"error: {type(error).__name__}: {error_line(error)}"
    else:
        return _text(result), True
    db.restore(saved)
    return text, False


def _text(result: Any) -> str:
    if result is None:
        return "ok"
    if isinstance(result, str):
        return result
    return json.dumps(result, ensure_ascii=False, default=str)
