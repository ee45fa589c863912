"""ToolMaker with rules: classify the task, write the interfaces, check them (docs/mtr.md).

A task gets utility tools (search; for comparisons compare and date difference; where the question counts, a calculator),
and one look-up per relation of its plan. Every tool has an output schema, flat as SynthTools asks for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pact_fast.chat.formats.hermes import Hermes
from pact_fast.data.rows import read_tools
from pact_fast.data.types import ToolCall
from pact_fast.envs.simulated.actor import MARKUP
from pact_fast.envs.simulated.leaks import mentions
from pact_fast.envs.simulated.schemas import schema_error, unsupported
from pact_fast.envs.simulated.utilities import CALCULATOR, COMPARE, DATE_DIFFERENCE, SEARCH_TOOL
from pact_fast.envs.simulated.world import LOOKUP, ToolSpec, ToolWorld
from pact_fast.errors import DataError
from pact_fast.rewards.trace import holds
from pact_fast.synthesis.mtr.names import is_valid
from pact_fast.synthesis.mtr.plan import Hop, LookupPlan
from pact_fast.synthesis.mtr.qa import QARow

MAX_PARAMETERS = 5
SCALARS = frozenset(("string", "integer", "number", "boolean"))
NO_INTERFACE = "no_interface"
REASONS = {
    NO_INTERFACE: "a language model wrote no interface that can be read, repairs included",
    "bad_name": "the name is not ^[a-zA-Z0-9_-]{1,64}$, or a Python keyword",
    "duplicate_name": "another tool of the task has the name, with other parameters",
    "no_description": "the description is empty",
    "markup": "name, description or parameters hold role or tool markup of a chat template",
    "leaks_answer": "name or description hold the answer, or an answer on the way to it",
    "bad_parameters": "the parameters are not an object schema, or use types and keywords that cannot be checked",
    "open_parameters": "additionalProperties is not false",
    "unknown_required": "a required parameter is not among the properties",
    "too_many_parameters": f"more than {MAX_PARAMETERS} parameters",
    "bad_output": "there is no output schema, or it is not flat: an object of scalars and arrays of scalars, all required",
    "bad_example": "the example call does not fit the parameters",
    "no_round_trip": "the schema or the example call is not read back as it was written",
}
_COUNTS = re.compile(r"\bhow (?:many|much|long|old|far)\b|\b(?:average|difference|total|sum|percent\w*|ratio)\b", re.I)
VALUES = {
    "type": "object",
    "properties": {"values": {"type": "array", "items": {"type": "string"}}},
    "required": ["values"],
    "additionalProperties": False,
}  # the output of a look-up


@dataclass(frozen=True)
class Rejected:
    """A tool that failed its checks. `reasons`: keys of REASONS."""

    name: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Toolset:
    """The tools of a task.

    world     tools, facts and passages
    evidence  values that a right trace must observe; for the reward alone
    made      interfaces before merging
    rejected  those that failed their checks
    """

    world: ToolWorld
    evidence: tuple[str, ...]
    made: int
    rejected: tuple[Rejected, ...]


def make_tools(row: QARow, plan: LookupPlan) -> Toolset:
    """The tools of a row, by rules."""
    drafts = [(hop_tool(hop), hop.arguments) for hop in (*plan.hops, *plan.other) if hop.arguments]
    made = len(drafts)
    tools, rejected = accept(merged(drafts), secrets(row, plan))
    for tool in utilities(row, plan):
        tools.setdefault(tool.name, tool)
    facts = tuple(hop.fact for hop in (*plan.hops, *plan.other) if hop.arguments and hop.relation in tools)
    evidence = tuple(dict.fromkeys(hop.values[0] for hop in plan.hops))
    return Toolset(ToolWorld(tools, facts, row.passages), evidence, made, rejected)


def hop_tool(hop: Hop) -> ToolSpec:
    """The interface of a look-up."""
    properties = {name: {"type": "string", "description": "A name."} for name in hop.arguments}
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return ToolSpec(hop.relation, hop.description, parameters, VALUES, LOOKUP, hop.relation)


def utilities(row: QARow, plan: LookupPlan) -> list[ToolSpec]:
    """The utility tools of a task's class."""
    tools = [SEARCH_TOOL] if row.passages else []
    if plan.task_class.endswith("comparison"):
        tools += [COMPARE, DATE_DIFFERENCE]
    if _COUNTS.search(row.question):
        tools.append(CALCULATOR)
    return tools


def secrets(row: QARow, plan: LookupPlan) -> list[str]:
    """List the texts that no interface may contain: answers and intermediate values that the question does not name."""
    found = [*row.answers, *(value for hop in plan.hops for value in hop.values)]
    return [text for text in dict.fromkeys(found) if not holds(row.question, text)]


def merged(drafts: Sequence[tuple[ToolSpec, dict[str, Any]]]) -> list[tuple[ToolSpec, dict[str, Any]]]:
    """Near-duplicates merged: of the interfaces with one name and one set of parameters, the first."""
    first: dict[tuple[str, ...], tuple[ToolSpec, dict[str, Any]]] = {}
    for tool, example in drafts:
        first.setdefault((tool.name.lower(), *sorted(tool.parameters.get("properties", {}))), (tool, example))
    return list(first.values())


def accept(
    drafts: Sequence[tuple[ToolSpec, dict[str, Any]]], hidden: Sequence[str]
) -> tuple[dict[str, ToolSpec], tuple[Rejected, ...]]:
    """(tools by name, those that failed). A draft is a tool with the arguments of an example call."""
    tools: dict[str, ToolSpec] = {}
    rejected = []
    for tool, example in drafts:
        reasons = check_tool(tool, example, hidden, tools)
        if reasons:
            rejected.append(Rejected(tool.name, tuple(reasons)))
        else:
            tools[tool.name] = tool
    return tools, tuple(rejected)


def check_tool(tool: ToolSpec, example: dict[str, Any], hidden: Sequence[str], taken: Collection[str]) -> list[str]:
    """The reasons why an interface cannot be used, keys of REASONS; empty: it can.

    Args:
        tool: The interface. Its parts may be anything that JSON can hold.
        example: Arguments of a call that must fit.
        hidden: Texts that it must not say (`secrets`).
        taken: Names of the task's other tools.
    """
    name, description = tool.name, tool.description
    reasons = [] if isinstance(name, str) and is_valid(name) else ["bad_name"]
    reasons += ["duplicate_name"] if name in taken else []
    reasons += [] if isinstance(description, str) and description.strip() else ["no_description"]
    said = f"{name} {str(name).replace('_', ' ')} {description} {json.dumps(tool.parameters, ensure_ascii=False)}"
    reasons += ["markup"] if MARKUP.search(said) else []
    reasons += ["leaks_answer"] if any(mentions(said, text) for text in hidden) else []
    parameters = _parameter_reasons(tool.parameters)
    reasons += parameters
    reasons += [] if is_flat(tool.output) else ["bad_output"]
    if not parameters:
        reasons += [] if schema_error(example, tool.parameters) is None else ["bad_example"]
        if not reasons and not _round_trip(tool, example):
            reasons.append("no_round_trip")
    return reasons


def _parameter_reasons(schema: Any) -> list[str]:
    if not isinstance(schema, dict) or schema.get("type") != "object" or unsupported(schema) is not None:
        return ["bad_parameters"]
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if any(not isinstance(one, dict) or "type" not in one for one in properties.values()):
        return ["bad_parameters"]
    reasons = ["open_parameters"] if schema.get("additionalProperties") is not False else []
    reasons += ["unknown_required"] if any(name not in properties for name in required) else []
    return reasons + (["too_many_parameters"] if len(properties) > MAX_PARAMETERS else [])


def is_flat(schema: Any) -> bool:
    """Whether an output schema is an object of scalars and arrays of scalars, with exactly the declared keys."""
    if not isinstance(schema, dict) or schema.get("type") != "object" or unsupported(schema) is not None:
        return False
    properties = schema.get("properties", {})
    if not properties or schema.get("additionalProperties") is not False:
        return False
    if set(schema.get("required", [])) != set(properties):
        return False
    items = (one.get("items", {}) if one.get("type") == "array" else one for one in properties.values())
    return all(isinstance(one, dict) and one.get("type") in SCALARS for one in items)


def _round_trip(tool: ToolSpec, example: dict[str, Any]) -> bool:
    """Whether the schema is read back from a data row as it is, and the example call from the text of a turn."""
    call, form = ToolCall(tool.name, example), Hermes()
    try:
        if read_tools(json.dumps([tool.schema])) != [tool.schema]:
            return False
    except DataError:
        return False
    return form.parse(form.render("Look it up.", "", [call]).encode(), [tool.schema]).attempts == [call]
