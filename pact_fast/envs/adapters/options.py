"""Settings and data of an adapter: `env.args`, optional packages, and the seed of an episode."""

from __future__ import annotations

import importlib
import zlib
from types import ModuleType
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pact_fast.data.types import Task
from pact_fast.errors import PactError


class Args(BaseModel):
    """`env.args` of an adapter; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


A = TypeVar("A", bound=Args)


def read_args(kind: type[A], args: dict[str, Any]) -> A:
    """PactError that names the key if `args` do not fit."""
    try:
        return kind(**args)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in ("env.args", *first["loc"]))
        raise PactError(
            f"{key}: {first['msg']}; known keys: {', '.join(kind.model_fields)} (docs/adapters.md)"
        ) from None


def need(module: str, install: str) -> ModuleType:
    """An optional package. PactError that says how to install it if it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = f": {error}" if getattr(error, "name", None) not in (None, module) else ""
        raise PactError(f"the package {module} cannot be imported{missing}; pip install {install}") from None


def episode_seed(task: Task) -> int:
    """The seed of a task's episodes, 31 bits: `env_args.seed` or the column `seed`, else drawn from the id.

    All rollouts of a prompt share it, so that their rewards can be compared. PactError if it is no integer.
    """
    given = task.env_args.get("seed", task.columns.get("seed"))
    if given is None:
        return zlib.crc32(task.id.encode("utf-8", "surrogatepass")) & 0x7FFFFFFF
    if isinstance(given, bool) or not isinstance(given, int):
        raise PactError(f"task {task.id}: its seed must be an integer, not {type(given).__name__}")
    return given
