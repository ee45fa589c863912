"""Imports the user's functions and classes, named in a configuration as `file.py:name` or `module:name`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
import threading
import traceback
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from pact_fast.errors import PASSED_ON, PactError, ShutdownRequested

_LIBRARY = os.path.dirname(os.__file__) + os.sep

_import_lock = threading.RLock()  # no thread sees a module that another one is still executing


def load_object(spec: str, kind: str) -> Any:
    """Import the callable that `spec` names.

    Args:
        spec: `file.py:name`, relative to the current directory, or `module:name`.
        kind: Noun for error messages ("reward function").

    Raises:
        PactError: The file, the module or the name does not exist, the import fails, or the object is not callable.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise PactError(f"{kind} '{spec}': write file.py:name or module:name")
    module = _import_file(spec, kind, Path(place)) if place.endswith(".py") else _import_module(spec, kind, place)
    try:
        found = getattr(module, name)
    except AttributeError:
        close = difflib.get_close_matches(name, [n for n in vars(module) if not n.startswith("_")], n=1)
        hint = f"did you mean '{close[0]}'?" if close else "define it there"
        raise PactError(f"{kind} '{spec}': {place} has no '{name}'; {hint}") from None
    if not callable(found):
        raise PactError(f"{kind} '{spec}': it is a {type(found).__name__}; name a function or class")
    return found


def _import_file(spec: str, kind: str, path: Path) -> ModuleType:
    """The module of a file, executed once per process, so that functions of one file share its globals."""
    if not path.is_file():
        raise PactError(f"{kind} '{spec}': no file {path}; paths are relative to the current directory")
    path = path.resolve()
    name = f"pact_fast_user_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    with _import_lock:
        if name in sys.modules:
            return sys.modules[name]
        found = importlib.util.spec_from_file_location(name, path)
        assert found and found.loader
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module  # dataclasses and pickle look up the module of a class there
        try:
            found.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if isinstance(error, PASSED_ON):
                raise
            raise PactError(f"{kind} '{spec}': {path} cannot be imported: {describe_error(error)}") from error
    return module


def _import_module(spec: str, kind: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except PASSED_ON:
        raise
    except BaseException as error:
        problem = f"{kind} '{spec}': module {name} cannot be imported: {describe_error(error)}"
        raise PactError(f"{problem}; for a file write its path, file.py:name") from error


@contextmanager
def no_exit(what: str) -> Iterator[None]:
    """Turn a SystemExit of the user's code into a PactError that names `what`; it would end a run with any status.

    Other exceptions pass: their traceback shows the user's own lines.
    """
    try:
        yield
    except ShutdownRequested:
        raise
    except SystemExit as error:
        raise PactError(f"{what} ended the program: {describe_error(error)}") from error


def describe_error(error: BaseException) -> str:
    """`ValueError: message (file.py:12)`, with the place where it was raised unless that is this module."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, SystemExit):
        text = f"it calls exit ({' '.join(text.split())[:200]}); return or raise an error instead"
    frames = list(traceback.extract_tb(error.__traceback__))
    if isinstance(error, SystemExit):  # argparse and exit() raise it in files of the standard library
        frames = [
            f for f in frames if not f.filename.startswith((_LIBRARY, "<frozen")) or "site-packages" in f.filename
        ] or frames
    frame = frames[-1]
    ours = frame.filename == __file__ or "importlib" in frame.filename
    return text if ours else f"{text} ({frame.filename}:{frame.lineno})"
