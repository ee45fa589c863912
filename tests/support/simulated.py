"""A small simulated task, and backends that answer it badly."""

from __future__ import annotations

from typing import Any

from pact_fast.data.types import Task
from pact_fast.envs.simulated.actor import ToolActor
from pact_fast.envs.simulated.backend import ToolRequest
from pact_fast.envs.simulated.faults import Faults
from pact_fast.envs.simulated.recorded import ObservationStore
from pact_fast.envs.simulated.utilities import CALCULATOR, COMPARE, DATE_DIFFERENCE, SEARCH_TOOL
from pact_fast.envs.simulated.world import LOOKUP, Fact, Passage, ToolSpec, ToolWorld
from pact_fast.synthesis.mtr.tool_maker import VALUES

QUESTION = "When was the director of Free Guy born?"
GOLD = "July 23, 1968"


def look_up(name: str, relation: str, stateful: bool = False) -> ToolSpec:
    parameters = {
        "type": "object",
        "properties": {"entity": {"type": "string"}},
        "required": ["entity"],
        "additionalProperties": False,
    }
    return ToolSpec(name, f"The {relation} of an entity.", parameters, VALUES, LOOKUP, relation, stateful)


def world(stateful: bool = False, progress: float = 1.0) -> ToolWorld:
    tools = [look_up("get_director", "director", stateful), look_up("get_birth", "birth"), SEARCH_TOOL]
    tools += [CALCULATOR, COMPARE, DATE_DIFFERENCE]
    facts = (
        Fact("director", {"entity": "Free Guy"}, ("Shawn Levy",)),
        Fact("birth", {"entity": "Shawn Levy"}, (GOLD,)),
    )
    passages = (
        Passage("Free Guy", "Free Guy is a film directed by Shawn Levy.", True),
        Passage("Shawn Levy", "Shawn Levy (born July 23, 1968) is a director.", True),
        Passage("Oslo", "Oslo is a city in Norway."),
        Passage("Bergen", "Bergen is a rainy city in Norway."),
        Passage("Iron", "Iron is a metal."),
    )
    return ToolWorld({tool.name: tool for tool in tools}, facts, passages, progress)


def task(**changes: Any) -> Task:
    made = world()
    fields = dict(
        id="t",
        prompt=[{"role": "user", "content": QUESTION}],
        tools=[tool.schema for tool in made.tools.values()],
        answer=GOLD,
        env="simulated",
        env_args={**made.to_env_args(), "evidence": ["Shawn Levy", GOLD]},
        columns={"answers": [GOLD, "23 July 1968"]},
    )
    return Task(**{**fields, **changes})


class Says:
    """A backend that gives its outputs in turn, the last one for ever, and counts."""

    version, deterministic, blocking = "says-1", False, False

    def __init__(self, *outputs: Any):
        self._outputs = list(outputs)
        self.requests: list[ToolRequest] = []

    def respond(self, request: ToolRequest) -> Any:
        self.requests.append(request)
        output = self._outputs.pop(0) if len(self._outputs) > 1 else self._outputs[0]
        if isinstance(output, Exception):
            raise output
        return output


def actor(*outputs: Any, store: ObservationStore | None = None, **faults: Any) -> ToolActor:
    """An actor whose backend says these outputs; without any, the facts of the row."""
    from pact_fast.envs.simulated.facts import FactsBackend

    return ToolActor(Says(*outputs) if outputs else FactsBackend(), store, Faults(**faults))
