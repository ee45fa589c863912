"""ToolMaker with a language model: it classifies the task, then writes the interfaces; the checks are those of the rules.

A model writes names, descriptions and fields; the schemas are built from them in code, closed and flat. What fails
`tool_maker.check_tool` is sent back with its reasons, and then left out with them. The model sees the question, never the
answers: they serve the check for leaks alone.
"""

from __future__ import annotations

import functools
import hashlib
from importlib.resources import files
from typing import Any

from pact_fast.envs.simulated.world import MODEL, ToolSpec, ToolWorld
from pact_fast.llm import InvalidAnswer, LLMClient
from pact_fast.llm.answers import read_json
from pact_fast.llm.request import Request
from pact_fast.synthesis.mtr.plan import LookupPlan
from pact_fast.synthesis.mtr.qa import QARow
from pact_fast.synthesis.mtr.tool_maker import (
    NO_INTERFACE,
    REASONS,
    Rejected,
    Toolset,
    accept,
    merged,
    secrets,
    utilities,
)

PROMPT = "tool_maker.v1.txt"
CLASSES = {
    "bridge": "the answer is reached through another entity",
    "comparison": "two entities are compared",
    "bridge_comparison": "two entities are compared, each reached through another one",
    "composition": "facts are chained, each found with the one before",
    "inference": "the answer follows from two facts by a rule",
}
TYPES = ("string", "integer", "number", "boolean")
MAX_TOOLS, MAX_FIELDS, REPAIRS = 4, 3, 2
NAME_LENGTH, TEXT_LENGTH = 64, 300
_TEXT = {"type": "string", "minLength": 1, "maxLength": TEXT_LENGTH}
_NAME = {"type": "string", "minLength": 1, "maxLength": NAME_LENGTH}


def _fields(types: tuple[str, ...], extra: dict[str, Any]) -> dict[str, Any]:
    properties = {"name": _NAME, "description": _TEXT, "type": {"enum": list(types)}, **extra}
    one = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "array", "items": one, "minItems": 1, "maxItems": MAX_FIELDS}


_TOOL = {
    "name": _NAME,
    "description": _TEXT,
    "parameters": _fields(TYPES, {"example": {"type": "string", "maxLength": TEXT_LENGTH}}),
    "returns": _fields((*TYPES, "list"), {}),
}
INTERFACES = {
    "type": "object",
    "properties": {
        "tools": {
            "type": "array",
            "items": {"type": "object", "properties": _TOOL, "required": list(_TOOL), "additionalProperties": False},
            "minItems": 1,
            "maxItems": MAX_TOOLS,
        }
    },
    "required": ["tools"],
    "additionalProperties": False,
}
CLASS = {
    "type": "object",
    "properties": {"class": {"enum": list(CLASSES)}},
    "required": ["class"],
    "additionalProperties": False,
}


class ModelToolMaker:
    """Makes the tools of rows. Thread-safe.

    Args:
        client: The language model.
        repairs: How often interfaces that fail their checks are sent back, at most.
    """

    def __init__(self, client: LLMClient, repairs: int = REPAIRS):
        self._client, self._repairs = client, repairs
        self.version = f"model-1/{client.config.model}/{hashlib.sha256(prompt_text().encode()).hexdigest()[:12]}"

    def classify(self, row: QARow) -> str | None:
        """The class of a task, a key of CLASSES; None if the model names none, repairs included."""
        listed = "\n".join(f"- {name}: {meaning}" for name, meaning in CLASSES.items())
        asked = f"Classify the question. The classes are:\n{listed}\n\nquestion: {row.question}"
        request = Request([{"role": "user", "content": asked}], schema=CLASS, temperature=0.0, repairs=self._repairs)
        try:
            return self._client.ask(request).value["class"]
        except InvalidAnswer:
            return None

    def make(self, row: QARow, plan: LookupPlan) -> Toolset:
        """The tools of a row: those that the model writes and the checks accept, and the utilities of its class.

        Args:
            row: The row. Its answers are not shown to the model.
            plan: Its plan, for the class, the evidence, and the values that no interface may say.

        Raises:
            LLMError: The server fails, the budget is used up, or replay misses.
        """
        hidden = secrets(row, plan)

        def problem(value: Any) -> str | None:
            # a leak is not sent back: the model must not learn that it has guessed an answer
            _, rejected = accept(merged(drafts_of(value)), ())
            return "; ".join(f"the tool {one.name!r} fails: {_explain(one)}" for one in rejected) or None

        asked = f"class: {plan.task_class} ({CLASSES.get(plan.task_class, 'another')})\nquestion: {row.question}"
        messages = [{"role": "system", "content": prompt_text()}, {"role": "user", "content": asked}]
        try:
            value = self._client.ask(Request(messages, schema=INTERFACES, repairs=self._repairs, check=problem)).value
        except InvalidAnswer as error:
            if error.reason != "check":  # tools that fail the checks are left out below, the rest is used
                return _toolset(row, plan, {}, (Rejected("", (NO_INTERFACE,)),), 0)
            value = read_json(error.text)
        drafts = drafts_of(value)
        tools, rejected = accept(merged(drafts), hidden)
        return _toolset(row, plan, tools, rejected, len(drafts))


def _toolset(
    row: QARow, plan: LookupPlan, tools: dict[str, ToolSpec], rejected: tuple[Rejected, ...], made: int
) -> Toolset:
    """The tools that were accepted, with the utilities of the class, and the facts for a model backend."""
    for tool in utilities(row, plan):
        tools.setdefault(tool.name, tool)
    facts = tuple(hop.fact for hop in (*plan.hops, *plan.other) if hop.arguments)
    evidence = tuple(dict.fromkeys(hop.values[0] for hop in plan.hops))
    return Toolset(ToolWorld(tools, facts, row.passages), evidence, made, rejected)


def _explain(rejected: Rejected) -> str:
    return ", ".join(REASONS[reason] for reason in rejected.reasons)


def drafts_of(value: dict[str, Any]) -> list[tuple[ToolSpec, dict[str, Any]]]:
    """(tool, arguments of its example call) of each interface in a value that fits INTERFACES."""
    return [_draft(tool) for tool in value["tools"]]


def _draft(tool: dict[str, Any]) -> tuple[ToolSpec, dict[str, Any]]:
    parameters = {one["name"]: {"type": one["type"], "description": one["description"]} for one in tool["parameters"]}
    returns = {one["name"]: _output(one) for one in tool["returns"]}
    example = {one["name"]: _example(one) for one in tool["parameters"]}
    return ToolSpec(tool["name"], tool["description"], _closed(parameters), _closed(returns), MODEL), example


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _output(one: dict[str, Any]) -> dict[str, Any]:
    declared: dict[str, Any] = {"type": one["type"]}
    if one["type"] == "list":
        declared = {"type": "array", "items": {"type": "string"}}
    return {**declared, "description": one["description"]}


def _example(one: dict[str, Any]) -> Any:
    """The example of a parameter in its type; as it was written where it cannot be read so, which the checks refuse."""
    text = one["example"].strip()
    try:
        if one["type"] == "integer":
            return int(text[:40])
        if one["type"] == "number":
            return float(text[:40])
    except ValueError:
        return text
    if one["type"] == "boolean":
        return {"true": True, "false": False}.get(text.lower(), text)
    return text


@functools.cache
def prompt_text() -> str:
    """The instructions, a versioned file of the package."""
    return files("pact_fast.synthesis.mtr").joinpath(PROMPT).read_text(encoding="utf-8").strip()
