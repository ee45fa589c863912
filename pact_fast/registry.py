"""Registries: names in a configuration → classes, built in or the user's own.

A registry imports the modules of its package when a name is first looked up; each registers its class with a decorator
line. A class outside the package is named by `file.py:Class` or `module:Class`, or is imported (and so registered) before
the configuration is read.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pact_fast.errors import PactError
from pact_fast.plugins import load_object

T = TypeVar("T")
C = TypeVar("C")


class Registry(Generic[T]):
    """Classes of one kind by name. The registry itself is the decorator: `@algorithm("pact")`.

    Args:
        kind: The noun for messages ("algorithm").
        key: The configuration key that holds a name ("algorithm.name").
        package: The package whose modules register the built-in classes; None if they are in the registry's own module.
    """

    def __init__(self, kind: str, key: str, package: str | None = None):
        self.kind, self.key, self._package = kind, key, package
        self._classes: dict[str, T] = {}
        self._loaded = False

    def __call__(self, name: str) -> Callable[[C], C]:
        """Class decorator that registers under `name`. ValueError if another class has the name."""

        def register(cls: Any) -> Any:
            known = self._classes.get(name)
            if known is not None and _origin(known) != _origin(cls):
                raise ValueError(f"the {self.kind} name '{name}' is taken by {_origin(known)}")
            self._classes[name] = cls
            return cls

        return register

    def names(self) -> list[str]:
        """Registered names, sorted."""
        self._load()
        return sorted(self._classes)

    def get(self, name: str) -> T:
        """The class for a registered name, `file.py:Class` or `module:Class`.

        Raises:
            PactError: The name is unknown (names the nearest), or the file or class cannot be loaded.
        """
        self._load()
        if name in self._classes:
            return self._classes[name]
        if ":" in name:
            return load_object(name, self.kind)
        close = difflib.get_close_matches(name, self.names(), n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(self.names())}."
        raise PactError(f"{self.key}: no {self.kind} '{name}'; {hint} One of your own is named file.py:Class")

    def _load(self) -> None:
        if self._loaded or self._package is None:
            return
        self._loaded = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__, f"{self._package}."):
            importlib.import_module(module.name)


def _origin(cls: Any) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
