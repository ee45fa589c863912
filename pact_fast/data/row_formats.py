"""Row formats of other projects: how each is detected, and how its rows are converted to our own columns."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pact_fast.data.absent import is_absent
from pact_fast.data.rows import Row, read_object
from pact_fast.data.schemas import drop_nulls
from pact_fast.errors import DataError
from pact_fast.text import short

DEFINITION = re.compile(r"^[ \t]*(?:async[ \t]+)?def[ \t]+(\w+)", re.MULTILINE)


@dataclass(frozen=True)
class RowFormat:
    """One row format.

    columns    a file has the format if its first row has all of these columns
    convert    turns a row into a row in our own columns
    id_prefix  prefix of generated task ids; "": the stem of the file's name
    """

    columns: frozenset[str]
    convert: Callable[[Row], Row]
    id_prefix: str = ""


def _verl(row: Row) -> Row:
    """verl: the ground truth becomes the answer if it is text or a number. All columns are kept for reward functions."""
    reward_model = read_object(row.get("reward_model"), "reward_model")
    truth = reward_model.get("ground_truth")
    if not is_absent(row.get("answer")) or not isinstance(truth, str | int | float):
        return row
    return row | {"answer": truth}


def _ftrl(row: Row) -> Row:
    """FTRL (docs/method.md, section 7): tool sources and expected substrings become arguments of python_tools."""
    codes = drop_nulls(read_object(row.get("codes"), "codes"))
    if not all(isinstance(source, str) for source in codes.values()):
        raise DataError("must hold Python source text for each tool name", field="codes")
    unsolved = drop_nulls(read_object(row.get("unsolved_set"), "unsolved_set"))
    for name, expected in unsolved.items():
        if not isinstance(expected, list) or not all(isinstance(text, str) for text in expected):
            raise DataError(f"{short(name)} must hold a list of expected texts", field="unsolved_set")
    env_args = {"codes": codes, "unsolved_set": unsolved, "scoring": "ftrl"}
    return _without(row, "codes", "unsolved_set") | {"env": "python_tools", "env_args": env_args}


def _toolhop(row: Row) -> Row:
    """ToolHop (docs/method.md, section 7): `tools` maps sub-questions to schemas, `functions` lists Python sources.

    Some rows define a tool name twice. The last definition counts, as if all sources were executed in order.
    """
    by_question = drop_nulls(read_object(row.get("tools"), "tools"))
    tools = {_name_of(tool): tool for tool in by_question.values()}
    env_args = {"codes": _sources(row.get("functions"), tools), "scoring": "toolhop"}
    converted = _without(row, "functions") | {
        "tools": list(tools.values()),
        "env": "python_tools",
        "env_args": env_args,
    }
    number = row.get("id")
    return converted | ({"id": f"toolhop-{number}"} if isinstance(number, int) else {})


def _name_of(tool: Any) -> str:
    name = tool.get("name") if isinstance(tool, dict) else None
    if not isinstance(name, str):
        raise DataError('must map each sub-question to a schema {"name", "description", "parameters"}', field="tools")
    return name


def _sources(functions: Any, tools: dict[str, Any]) -> dict[str, str]:
    """{tool name: source}. A source may define helpers: its tool is its first function that has the name of one."""
    if not isinstance(functions, list) or not all(isinstance(source, str) for source in functions):
        raise DataError("must be a list of Python sources", field="functions")
    sources = {}
    for source in functions:
        name = next((name for name in DEFINITION.findall(source) if name in tools), None)
        if name is not None:
            sources[name] = source
    return sources


def _without(row: Row, *names: str) -> Row:
    return {name: value for name, value in row.items() if name not in names}


# In the order of detection: the most specific first.
ROW_FORMATS = {
    "ftrl": RowFormat(frozenset({"messages", "tools", "codes", "unsolved_set"}), _ftrl, "ftrl"),
    "toolhop": RowFormat(frozenset({"question", "answer", "tools", "functions"}), _toolhop, "toolhop"),
    "verl": RowFormat(frozenset({"prompt", "reward_model"}), _verl),
    "pact": RowFormat(frozenset(), lambda row: row),
}


def detect_row_format(row: Row) -> RowFormat:
    """The format of a file, from the columns of its first row."""
    if not {"prompt", "messages", "question"} & row.keys():
        found = ", ".join(short(name) for name in list(row)[:12]) or "none"
        raise DataError(
            f"no known format; columns found: {found}; expected 'prompt' or 'messages' (pact, TRL, verifiers), "
            "'prompt' and 'reward_model' (verl), 'messages', 'codes' and 'unsolved_set' (FTRL), or 'question' and "
            "'functions' (ToolHop)",
            field="prompt",
        )
    return next(format for format in ROW_FORMATS.values() if format.columns <= row.keys())
