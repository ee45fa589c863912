"""Checks that a row has what its environment needs: the sources of its tools, and the reference of its scoring."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pact_fast.data.rows import nearest, quoted, type_name
from pact_fast.data.types import Task
from pact_fast.errors import DataError

SCORINGS = ("ftrl", "toolhop")
_ASYNC = re.compile(r"^async\s+def\s+(\w+)", re.MULTILINE)


def check_references(task: Task, env: str) -> None:
    """DataError, without file and line, if a task lacks what its environment needs. `env`: name of the environment."""
    check = _CHECKS.get(env)
    if check:
        check(task)


def _python_tools(task: Task) -> None:
    codes = task.env_args.get("codes")
    if not codes or not isinstance(codes, dict):
        raise DataError(
            "has no 'codes'; python_tools needs {tool name: Python source} there, or name another environment in env.name",
            field="env_args",
        )
    for name, source in codes.items():
        if not isinstance(source, str) or not source.strip():
            raise DataError(
                f"'codes' of {quoted(name)} must be Python source, found {type_name(source)}", field="env_args"
            )
        _check_source(name, source)
    for tool in task.tools:
        name = tool["function"]["name"]
        if name not in codes:
            raise DataError(
                f"the tool {quoted(name)} has no source in env_args.codes{nearest(name, list(codes))}", field="tools"
            )
    scoring = task.env_args.get("scoring")
    if scoring is not None and scoring not in SCORINGS:
        raise DataError(f"unknown scoring {quoted(scoring)}{nearest(str(scoring), SCORINGS)}", field="env_args")
    if scoring == "ftrl":
        _check_unsolved_set(task.env_args.get("unsolved_set"))
    if scoring == "toolhop" and _matches_everything(task.answer):
        raise DataError(
            "the scoring 'toolhop' compares with the answer, and the row has none; give it or drop the scoring",
            field="answer",
        )


def _check_source(name: str, source: str) -> None:
    """DataError if a source cannot define the function that a tool calls."""
    if not name.isidentifier():
        problem = f"the tool {quoted(name)} has no Python name, so that its source cannot define it; rename the tool"
    elif "async" in source and name in _ASYNC.findall(source):
        problem = (
            f"the function {quoted(name)} is async, and tools are called without an event loop; make it a plain def"
        )
    elif name not in source:
        problem = f"the source of {quoted(name)} does not define a function of that name; rename one of the two"
    else:
        return
    raise DataError(problem, field="env_args")


def _check_unsolved_set(unsolved: Any) -> None:
    if not isinstance(unsolved, dict) or not any(unsolved.values()):
        raise DataError(
            "'unsolved_set' is empty; the scoring 'ftrl' needs {tool name: [expected texts]}: give it or drop the row",
            field="env_args",
        )
    for name, texts in unsolved.items():
        if not isinstance(texts, list) or any(_matches_everything(text) for text in texts):
            raise DataError(
                f"'unsolved_set' of {quoted(name)} must be a list of expected texts, none of them empty",
                field="env_args",
            )


def _matches_everything(reference: Any) -> bool:
    """Whether a reference has no text to look for."""
    return not isinstance(reference, str) or not reference.replace(",", "").strip()


_CHECKS: dict[str, Callable[[Task], None]] = {"python_tools": _python_tools}
