"""Checks of a task for python_tools: the sources of its tools, and the reference of its scoring."""

from __future__ import annotations

import re
from typing import Any

from pact_fast.data.absent import is_absent
from pact_fast.data.rows import nearest, type_name
from pact_fast.data.types import Task
from pact_fast.errors import DataError
from pact_fast.rewards.ftrl import expected_parts
from pact_fast.text import short

SCORINGS = ("ftrl", "toolhop")
ANSWER_COLUMNS = ("ground_truth", "answers", "gold", "target", "solution", "expected_answer", "label")
_ASYNC = re.compile(r"^async\s+def\s+(\w+)", re.MULTILINE)


def check_task(task: Task) -> None:
    """DataError, without file and line, if a task cannot be run or scored.

    Every tool on offer needs a source: a call of one without would fail with any arguments.
    """
    try:
        _check_scoring(task)
        _check_sources(task)
    except DataError as error:
        raise DataError(f"task {task.id}: {error.problem}", field=error.field) from None


def _check_scoring(task: Task) -> None:
    """DataError if the scoring is unknown, or its reference is absent or matches everything."""
    scoring = task.env_args.get("scoring")
    if scoring is not None and scoring not in SCORINGS:
        raise DataError(
            f"env_args.scoring {short(scoring)} is unknown{nearest(str(scoring), SCORINGS)}", field="env_args"
        )
    if scoring == "ftrl":
        _check_unsolved_set(task.env_args.get("unsolved_set"))
    if scoring == "toolhop" and not _is_reference(task.answer):
        raise DataError(
            "the scoring 'toolhop' compares with the answer in the column 'answer', and the row has none; give it or "
            f"drop the scoring{_other_column(task)}",
            field="answer",
        )


def _check_sources(task: Task) -> None:
    codes = task.env_args.get("codes")
    if not codes or not isinstance(codes, dict):
        raise DataError(
            "env_args has no 'codes'; python_tools needs {tool name: Python source} there, or name another environment in "
            "env.name",
            field="env_args",
        )
    for name, source in codes.items():
        if not isinstance(source, str) or not source.strip():
            raise DataError(
                f"'codes' of {short(name)} must be Python source, found {type_name(source)}", field="env_args"
            )
        _check_source(name, source)
    for tool in task.tools:
        name = tool["function"]["name"]
        if name not in codes:
            raise DataError(
                f"the tool {short(name)} has no source in env_args.codes{nearest(name, list(codes))}", field="tools"
            )


def _check_source(name: str, source: str) -> None:
    """DataError if a source cannot define the function that a tool calls."""
    if not name.isidentifier():
        problem = f"the tool {short(name)} has no Python name, so that its source cannot define it; rename the tool"
    elif "async" in source and name in _ASYNC.findall(source):
        problem = (
            f"the function {short(name)} is async, and tools are called without an event loop; make it a plain def"
        )
    elif name not in source:
        problem = f"the source of {short(name)} does not define a function of that name; rename one of the two"
    else:
        return
    raise DataError(problem, field="env_args")


def _check_unsolved_set(unsolved: Any) -> None:
    """An empty text among others is an error, too: it is a sub-question that its writer meant to score."""
    by_tool = unsolved if isinstance(unsolved, dict) else {}
    found = [_is_reference(text) for texts in by_tool.values() if isinstance(texts, list) for text in texts]
    needed = "the scoring 'ftrl' needs {tool name: [expected texts]}, none of them empty; give it or drop the row"
    if not any(found):
        raise DataError(f"env_args.unsolved_set is empty; {needed}", field="env_args")
    for name, texts in by_tool.items():
        if not isinstance(texts, list) or not all(map(_is_reference, texts)):
            raise DataError(
                f"'unsolved_set' of {short(name)} is no list of texts, or one is empty; {needed}", field="env_args"
            )


def _is_reference(value: Any) -> bool:
    """Whether a reference has text to look for; without, it would match everything."""
    return isinstance(value, str) and not is_absent(value) and bool(expected_parts(value))


def _other_column(task: Task) -> str:
    """A hint at a column that looks like an answer under another name."""
    found = next((name for name in ANSWER_COLUMNS if not is_absent(task.columns.get(name))), None)
    return f" (the row's '{found}' is not read as one: rename it)" if found else ""
