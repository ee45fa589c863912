"""The API objects of one episode, and the calls that change them.

A call is dispatched to a public method of a class that the task involves, looked up in a table that is made once; the name
that a model wrote selects a row of that table and nothing else. Texts of errors are those of the official executor, which
evaluates the call as Python: an unknown or private name is a NameError there.
"""

from __future__ import annotations

import contextlib
import copy
import decimal
import functools
import importlib
import inspect
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from pact_fast.envs.bfcl.entries import DOCUMENTS, INSTALL, Entry
from pact_fast.envs.bfcl.limits import MAX_NODES, count_nodes, refusal
from pact_fast.errors import PactError

PACKAGE = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code"
STATELESS = ("MathAPI",)
FORBIDDEN = ("kill", "exit", "quit", "remove", "unlink", "popen", "Popen", "run")  # by the official executor
GROWING_CALLS = ("cp", "mv")  # calls after which a file system is measured


class ApiSession:
    """The objects of one episode. No two sessions share anything that a call can change.

    instances  {class name: object}
    broken     a file system has outgrown its limit: the session runs no more calls

    Raises:
        PactError: The package or something that it imports is missing.
    """

    def __init__(self, entry: Entry):
        self.instances: dict[str, Any] = {}
        self.broken = False
        self._methods: dict[str, Callable[..., Any]] = {}
        for name in entry.classes:
            made = api_class(name)()
            if name not in STATELESS:
                made._load_scenario(copy.deepcopy(entry.config.get(name, {})), long_context=entry.long_context)
            if entry.long_context:
                _own_state(made)
            self.instances[name] = made
            for method, bound in inspect.getmembers(made, predicate=inspect.ismethod):
                if not method.startswith("_"):
                    self._methods[method] = bound  # of a later class, if two have it

    @property
    def names(self) -> list[str]:
        """Names that can be called."""
        return sorted(self._methods)

    def run(self, name: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> str:
        """Execute a call and return the text that the official executor returns. Never raises."""
        kwargs = kwargs or {}
        try:
            return self._run(name, args, kwargs)
        except Exception as error:
            return f"Error during execution: {error}"

    def parameters(self, name: str) -> list[str]:
        """Names of a method's parameters. KeyError if there is no such method."""
        return _parameters(self._methods[name].__func__)  # type: ignore[attr-defined]

    def _run(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        bare = name.rpartition(".")[2]
        if bare in FORBIDDEN:
            raise PermissionError(f"Function call {bare} is not allowed.")
        method = self._methods.get(name)
        if method is None:
            raise NameError(f"name '{name.partition('.')[0][:200]}' is not defined")
        if self.broken:
            raise RuntimeError(f"the file system has more than {MAX_NODES:,} entries")
        if reason := refusal(name, {**dict(zip(self.parameters(name), args, strict=False)), **kwargs}):
            raise ValueError(reason)
        if bad := _not_finite([*args, *kwargs.values()]):
            raise NameError(f"name '{bad}' is not defined")  # the official executor reads the number's text as Python
        with _own_precision():
            result = method(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            text = _text(result)
        if name in GROWING_CALLS:
            self._measure()
        return text

    def _measure(self) -> None:
        system = self.instances.get("GorillaFileSystem")
        if system is not None and count_nodes(system.root) > MAX_NODES:
            self.broken = True


def api_class(name: str) -> type:
    """An API class of the benchmark. PactError if the package, or one that it imports, is missing."""
    try:
        return getattr(importlib.import_module(f"{PACKAGE}.{DOCUMENTS[name]}"), name)
    except ModuleNotFoundError as error:
        missing = error.name or "bfcl_eval"
        cure = INSTALL if missing.startswith("bfcl_eval") else f"pip install {missing}"
        raise PactError(f"the BFCL class {name} needs the module {missing}: {cure}") from None


@functools.cache
def _parameters(method: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(method).parameters)[1:]


def _own_state(made: Any) -> None:
    """Copy the state of an object: long_context puts objects of its module there, which calls change for all episodes."""
    generator = getattr(made, "_random", None)
    made.__dict__ = copy.deepcopy(made.__dict__, {id(generator): generator})  # its own already, and slow to copy


def _text(result: Any) -> str:
    if isinstance(result, str):
        return result
    if isinstance(result, dict):
        try:
            return json.dumps(result)
        except Exception:
            return str(result)
    return str(result)


def _not_finite(values: list[Any]) -> str | None:
    """`nan` or `inf` if such a number is among the values."""
    pending = list(values)
    while pending:
        item = pending.pop()
        if isinstance(item, float) and not math.isfinite(item):
            return "nan" if math.isnan(item) else "inf"
        if isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
    return None


@contextlib.contextmanager
def _own_precision() -> Iterator[None]:
    """Keep the precision that MathAPI sets, of decimal and mpmath, from the rest of the process."""
    import mpmath

    before = mpmath.mp.prec
    with decimal.localcontext():
        try:
            yield
        finally:
            mpmath.mp.prec = before
