"""The world of a simulated task, read from its row: tools with output schemas, facts and passages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pact_fast.data.types import ToolSchema
from pact_fast.envs.simulated.schemas import unsupported
from pact_fast.errors import PactError
from pact_fast.rewards.qa import normalize_answer
from pact_fast.text import short

LOOKUP, SEARCH = "lookup", "search"  # kinds that a backend answers; other names are utilities, or `model`
MODEL = "model"
RESULT_LIMIT = 3  # passages that a search returns, as in Search-R1


@dataclass(frozen=True)
class Fact:
    """The values of a relation for some arguments: `director`, {"entity": "Free Guy"}, ("Shawn Levy",)."""

    relation: str
    arguments: dict[str, str]
    values: tuple[str, ...]

    def matches(self, relation: str, arguments: Mapping[str, Any]) -> bool:
        """Whether a look-up asks for this fact: equal up to case, punctuation and articles."""
        return (
            relation == self.relation
            and arguments.keys() == self.arguments.keys()
            and all(same_text(arguments[name], text) for name, text in self.arguments.items())
        )

    def to_json(self) -> dict[str, Any]:
        return {"relation": self.relation, "arguments": self.arguments, "values": list(self.values)}


@dataclass(frozen=True)
class Passage:
    """A titled text; `supporting`: the data set marks it as evidence."""

    title: str
    text: str
    supporting: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"title": self.title, "text": self.text} | ({"supporting": True} if self.supporting else {})


@dataclass(frozen=True)
class ToolSpec:
    """Tool with the fields that OpenAI's schema lacks.

    name, description, parameters  as in the schema
    output    JSON schema of the tool's result
    kind      lookup, search, the name of a utility, or model: only a model backend can answer it
    relation  of a look-up
    stateful  its result may depend on earlier calls
    """

    name: str
    description: str
    parameters: dict[str, Any]
    output: dict[str, Any]
    kind: str
    relation: str = ""
    stateful: bool = False

    @property
    def schema(self) -> ToolSchema:
        """The OpenAI function schema."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    def to_json(self) -> dict[str, Any]:
        """Return the part of a tool that is stored in `env_args`; its schema is in the column `tools`."""
        data: dict[str, Any] = {"kind": self.kind, "output": self.output}
        if self.relation:
            data["relation"] = self.relation
        if self.stateful:
            data["stateful"] = True
        return data


@dataclass(frozen=True)
class ToolWorld:
    """The tools, facts and passages of a row: all that a backend knows."""

    tools: dict[str, ToolSpec]
    facts: tuple[Fact, ...] = ()
    passages: tuple[Passage, ...] = ()
    progress: float = field(default=1.0, compare=False)  # of the curriculum, in [0, 1]; see faults.py

    def to_env_args(self) -> dict[str, Any]:
        return {
            "tools": {name: tool.to_json() for name, tool in self.tools.items()},
            "facts": [fact.to_json() for fact in self.facts],
            "passages": [passage.to_json() for passage in self.passages],
        }

    @classmethod
    def from_task(cls, tools: list[ToolSchema], env_args: Mapping[str, Any]) -> ToolWorld:
        """From the columns `tools` and `env_args`. PactError names the missing or invalid field."""
        extra = _part(env_args, "tools", dict)
        specs = {}
        for tool in tools:
            function = tool["function"]
            name = function["name"]
            if name not in extra:
                raise PactError(
                    f"env_args.tools has no entry for the tool {short(name)}; give its kind and output schema"
                )
            specs[name] = _spec(function, extra[name])
        try:
            facts = tuple(
                Fact(
                    str(f["relation"]),
                    {str(k): str(v) for k, v in f["arguments"].items()},
                    tuple(map(str, f["values"])),
                )
                for f in _part(env_args, "facts", list)
            )
            passages = tuple(
                Passage(str(p["title"]), str(p["text"]), bool(p.get("supporting")))
                for p in _part(env_args, "passages", list)
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise PactError(
                f"env_args: {type(error).__name__} {short(str(error))} in 'facts' ({{relation, arguments, values}}) or "
                "'passages' ({title, text}); see docs/mtr.md"
            ) from None
        progress = env_args.get("progress", 1.0)
        if isinstance(progress, bool) or not isinstance(progress, int | float) or not 0 <= progress <= 1:
            raise PactError(f"env_args.progress: {short(progress)} must be a number in [0, 1]")
        return cls(specs, facts, passages, float(progress))


def _spec(function: Mapping[str, Any], extra: Any) -> ToolSpec:
    name = function["name"]
    if (
        not isinstance(extra, dict)
        or not isinstance(extra.get("output"), dict)
        or not isinstance(extra.get("kind"), str)
    ):
        raise PactError(f"env_args.tools.{name}: needs 'kind' and an 'output' schema; see docs/mtr.md")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    for what, schema in (("parameters", parameters), ("output", extra["output"])):
        if (problem := unsupported(schema)) is not None:
            raise PactError(f"tool {short(name)}: its {what} {problem}; the simulator cannot check that")
    return ToolSpec(
        name,
        str(function.get("description") or ""),
        parameters,
        extra["output"],
        extra["kind"],
        str(extra.get("relation") or ""),
        bool(extra.get("stateful")),
    )


def _part(env_args: Mapping[str, Any], name: str, kind: type) -> Any:
    value = env_args.get(name)
    value = kind() if value is None else value
    if not isinstance(value, kind):
        raise PactError(f"env_args.{name}: must be {'an object' if kind is dict else 'a list'}; see docs/mtr.md")
    return value


def same_text(one: Any, other: Any) -> bool:
    """Whether two texts are equal in the normal form of QA metrics, or as they are where that is empty."""
    a, b = normalize_answer(str(one)), normalize_answer(str(other))
    return a == b if a or b else str(one).strip() == str(other).strip()
