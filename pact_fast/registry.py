"""Registries map the names of a configuration to classes: built-in ones and those of the user.

A registry imports the modules of its package when a name is first looked up; each module registers its class with a
decorator. A class outside the package is named `file.py:Class` or `module:Class`; importing it also registers the name
in its decorator, if it has one.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from pact_fast.errors import PactError
from pact_fast.plugins import load_object

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """Classes of one kind by name. The registry itself is the decorator: `@algorithm("pact")`.

    Args:
        kind: Noun for error messages ("algorithm").
        key: Configuration key that holds a name ("algorithm.name").
        package: Package whose modules register the built-in classes; None: they are in the registry's own module.
        base: Class that every registered class must extend; None: any class.
    """

    def __init__(self, kind: str, key: str, package: str | None = None, base: type | None = None):
        self.kind, self.key, self.base, self._package = kind, key, base, package
        self._classes: dict[str, Any] = {}
        # Held while the package is imported. The decorator must not take it: a thread that is importing a module of the
        # package on its own would wait for the lock, and the holder of the lock for that module.
        self._lock = threading.RLock()
        self._loaded = self._loading = False

    def __call__(self, name: str) -> Callable[[C], C]:
        """Class decorator that registers under `name`.

        Raises:
            PactError: Another class has the name, or the class does not extend `base`.
            ValueError: The name contains ":" or is empty.
        """
        if not name or ":" in name:
            raise ValueError(f"{name!r} cannot be the name of a registered {self.kind}: it is empty or contains ':'")

        def register(cls: C) -> C:
            self._check(cls, _place(cls))
            known = self._classes.setdefault(name, cls)
            if _place(known) != _place(cls):
                raise PactError(
                    f"the {self.kind} name '{name}' is registered twice, by {_place(known)} and by {_place(cls)}; "
                    "rename one of them"
                )
            self._classes[name] = cls  # the same class again, from a module that was imported again
            return cls

        return register

    def names(self) -> list[str]:
        """Registered names, sorted."""
        self._load()
        return sorted(self._classes)

    def get(self, name: str) -> T:
        """The class with a registered name, or the one that `file.py:Class` or `module:Class` names.

        Raises:
            PactError: The name is unknown (the message names the nearest), the file or class cannot be loaded, or the
                object is not a class that extends `base`.
        """
        self._load()
        if name in self._classes:
            return self._classes[name]
        if ":" in name:
            found = load_object(name, self.kind)
            self._check(found, f"'{name}'")
            return found
        raise PactError(
            f"{self.key}: unknown {self.kind} '{name}'{did_you_mean(name, self.names())}; registered: "
            f"{', '.join(self.names())}; write file.py:Class for a class of your own"
        )

    def _check(self, cls: Any, place: str) -> None:
        if not isinstance(cls, type):
            raise PactError(f"{self.kind} {place}: it is a {type(cls).__name__}; name a class")
        if self.base is not None and not issubclass(cls, self.base):
            raise PactError(f"{self.kind} {place}: it must extend {self.base.__module__}.{self.base.__qualname__}")

    def _load(self) -> None:
        """Import the modules of the package, once. A failed import is raised again by the next look-up."""
        with self._lock:
            if (
                self._package is None or self._loaded or self._loading
            ):  # loading: a module of the package looks a name up while it is imported
                return
            self._loading = True
            try:
                package = importlib.import_module(self._package)
                for module in pkgutil.iter_modules(package.__path__, f"{self._package}."):
                    importlib.import_module(module.name)
                self._loaded = True
            finally:
                self._loading = False


def did_you_mean(name: str, known: list[str]) -> str:
    """Hint for an error message, ` (did you mean 'x'?)`; empty if no known name is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _place(cls: type) -> str:
    """`/path/file.py:Class`: tells classes apart even if one file is imported under two module names."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return f"{Path(file).resolve() if file else cls.__module__}:{cls.__qualname__}"
