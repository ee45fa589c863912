"""Python callables as tools: schemas from type hints and docstrings, and calls that are checked before they are made."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

from pact_fast.data.readers import tool_schema
from pact_fast.data.types import ToolSchema
from pact_fast.envs.adapters.arguments import BadCall, known_arguments
from pact_fast.envs.adapters.background import run
from pact_fast.errors import PactError
from pact_fast.plugins import no_exit

STATE = "state"  # a parameter of this name gets the episode's dict; the policy does not see it


class FunctionTools:
    """Tools by name, served from Python callables.

    Args:
        functions: Functions or bound methods, sync or async, with type hints and a Google docstring.
        state: What functions with a parameter `state` get.

    Raises:
        PactError: A function lacks type hints or descriptions, or two have the same name.
    """

    def __init__(self, functions: Iterable[Callable[..., Any]], state: dict[str, Any] | None = None):
        self._functions: dict[str, Callable[..., Any]] = {}
        self._state = state
        for function in functions:
            name = function.__name__
            if name in self._functions:
                raise PactError(f"two tools are called '{name}'; rename one of them")
            self._functions[name] = function
        self.schemas: list[ToolSchema] = [_schema(function) for function in self._functions.values()]
        self._stateful = {
            name for name, function in self._functions.items() if STATE in inspect.signature(function).parameters
        }
        self._parameters = {
            schema["function"]["name"]: schema["function"].get("parameters") or {} for schema in self.schemas
        }

    @property
    def is_async(self) -> bool:
        return any(inspect.iscoroutinefunction(function) for function in self._functions.values())

    def check(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """A copy of the arguments of a call. BadCall if there is no such tool, or they do not fit it.

        Only names of this table are looked up; no attribute of anything is.
        """
        if name not in self._functions:
            raise BadCall(f"there is no tool {name[:60]!r}; the tools are: {', '.join(self._functions)}")
        return known_arguments(name, arguments, self._parameters[name])

    def invoke(self, name: str, arguments: dict[str, Any], timeout: float | None) -> Any:
        """The result of one call.

        Args:
            name: Of the tool.
            arguments: As the policy wrote them.
            timeout: Seconds that a coroutine may take. A function that is no coroutine cannot be interrupted.

        Raises:
            BadCall: See `check`.
            Exception: Any exception of the tool; PactError if it ends the program.
        """
        given = self.check(name, arguments)
        function = self._functions[name]
        if name in self._stateful:
            given[STATE] = self._state
        with no_exit(f"the tool {name}"):
            result = function(**given)
            return run(_awaited(result), timeout) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result


def public_methods(instance: object, but: Iterable[str] = ()) -> list[Callable[..., Any]]:
    """Bound methods whose names do not begin with an underscore, in alphabetical order, as TRL finds them."""
    hidden = set(but)
    names = [name for name, _ in inspect.getmembers(type(instance), predicate=inspect.isfunction)]
    return [getattr(instance, name) for name in names if not name.startswith("_") and name not in hidden]


# by function, the one below a bound method: an instance is made for every episode, and a docstring takes long to read
_SCHEMAS: weakref.WeakKeyDictionary[Callable[..., Any], ToolSchema] = weakref.WeakKeyDictionary()


def _schema(function: Callable[..., Any]) -> ToolSchema:
    below = getattr(function, "__func__", function)
    if below not in _SCHEMAS:
        _SCHEMAS[below] = _read_schema(function)
    return _SCHEMAS[below]


def _read_schema(function: Callable[..., Any]) -> ToolSchema:
    parameters = inspect.signature(function).parameters
    for parameter in parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise PactError(
                f"tool '{function.__name__}': its parameter '{parameter.name}' cannot be given by name; a policy names all "
                "arguments, so declare each of them"
            )
    if STATE not in parameters:
        return tool_schema(function)
    hints = {name: hint for name, hint in get_type_hints(function).items() if name != STATE}

    def shown(**_: Any) -> Any: ...

    shown.__name__, shown.__doc__, shown.__annotations__ = function.__name__, function.__doc__, hints
    rest = [parameter for name, parameter in parameters.items() if name != STATE]
    shown.__signature__ = inspect.Signature(rest)  # type: ignore[attr-defined]
    return tool_schema(shown)
