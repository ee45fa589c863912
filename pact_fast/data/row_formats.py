"""Row formats: what each is recognised by, and how a row of it becomes a row in our own columns."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pact_fast.data.rows import Row, read_object, short
from pact_fast.errors import DataError

DEFINITION = re.compile(r"^[ \t]*(?:async[ \t]+)?def[ \t]+(\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Format:
    """`adapt` turns a row into our own columns; `columns` is what the format is recognised by."""

    columns: frozenset[str]
    adapt: Callable[[Row], Row]
    id_prefix: str = ""  # default: the file's stem


def _verl(row: Row) -> Row:
    """verl: the ground truth becomes the answer where it is a plain value; every column stays for reward functions."""
    reward_model = read_object(row.get("reward_model"), "reward_model")
    truth = reward_model.get("ground_truth")
    if row.get("answer") is not None or not isinstance(truth, str | int | float):
        return row
    return row | {"answer": truth}


def _ftrl(row: Row) -> Row:
    """FTRL (method, section 7): the tools' sources and the expected substrings go to the environment."""
    codes = read_object(row.get("codes"), "codes")
    if not all(isinstance(source, str) for source in codes.values()):
        raise DataError("must hold Python source text for each tool name", field="codes")
    unsolved = read_object(row.get("unsolved_set"), "unsolved_set")
    for name, expected in unsolved.items():
        if not isinstance(expected, list) or not all(isinstance(text, str) for text in expected):
            raise DataError(f"{short(name)} must hold a list of expected texts", field="unsolved_set")
    env_args = {"codes": codes, "unsolved_set": unsolved, "scoring": "ftrl"}
    return _without(row, "codes", "unsolved_set") | {"env": "python_tools", "env_args": env_args}


def _toolhop(row: Row) -> Row:
    """ToolHop (method, section 7): `tools` maps each sub-question to a schema, `functions` lists Python sources.

    Some rows offer one name twice; the last one counts, as the source that is executed last defines the function.
    """
    by_question = read_object(row.get("tools"), "tools")
    tools = {_name_of(tool): tool for tool in by_question.values()}
    env_args = {"codes": _sources(row.get("functions"), tools), "scoring": "toolhop"}
    adapted = _without(row, "functions") | {"tools": list(tools.values()), "env": "python_tools", "env_args": env_args}
    number = row.get("id")
    return adapted | ({"id": f"toolhop-{number}"} if isinstance(number, int) else {})


def _name_of(tool: Any) -> str:
    name = tool.get("name") if isinstance(tool, dict) else None
    if not isinstance(name, str):
        raise DataError('must map each sub-question to a schema {"name", "description", "parameters"}', field="tools")
    return name


def _sources(functions: Any, tools: dict[str, Any]) -> dict[str, str]:
    """{tool name: source}. A source may define helpers too: the first function that is a tool names it."""
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


# In the order of recognition: the most specific first.
FORMATS = {
    "ftrl": Format(frozenset({"messages", "tools", "codes", "unsolved_set"}), _ftrl, "ftrl"),
    "toolhop": Format(frozenset({"question", "answer", "tools", "functions"}), _toolhop, "toolhop"),
    "verl": Format(frozenset({"prompt", "reward_model"}), _verl),
    "pact": Format(frozenset(), lambda row: row),
}


def recognise(row: Row) -> Format:
    """The format of a file, by the columns of its first row."""
    if not {"prompt", "messages", "question"} & row.keys():
        found = ", ".join(short(name) for name in list(row)[:12]) or "none"
        raise DataError(
            f"no known format; columns found: {found}; expected 'prompt' or 'messages' (pact, TRL, verifiers), "
            "'prompt' and 'reward_model' (verl), 'messages', 'codes' and 'unsolved_set' (FTRL), or 'question' and "
            "'functions' (ToolHop)",
            field="prompt",
        )
    return next(format for format in FORMATS.values() if format.columns <= row.keys())
