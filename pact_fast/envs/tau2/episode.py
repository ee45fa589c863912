"""One episode: the state of a task's databases, the calls of both sides, and how it ended."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from pact_fast.envs.tau2 import upstream
from pact_fast.envs.tau2.domains import Domain, Side

MAX_ERRORS = 10  # the package's default: an episode with as many failed calls ends, unrewarded
MAX_ARGUMENTS = 32_768  # characters of a call's arguments as JSON; the tools' loops are quadratic in some of them
DONE = "done"  # the tool with which an agent that works alone ends the episode
STOP = "###STOP###"
CLOSED = "Error: the conversation is over"

Ending = Literal["agent_stop", "user_stop", "agent_error", "user_error", "too_many_errors"]


@dataclass(frozen=True)
class Call:
    """A call that arrived: who made it, and whether the tool failed."""

    side: Side
    name: str
    arguments: dict[str, Any]
    failed: bool


class Episode:
    """Plays one task.

    Args:
        domain: The domain of the task.
        task: The task as the package ships it; not changed.
        solo: The agent has the user's tools as well, and there is no user.

    Attributes:
        calls: All calls that reached a tool or failed on the way, in order.
        ending: How it ended; None while it is under way.
    """

    def __init__(self, domain: Domain, task: dict[str, Any], solo: bool = False):
        self.domain, self.task, self.solo = domain, task, solo
        self.calls: list[Call] = []
        self.ending: Ending | None = None
        self.state = domain.start()
        for action in (task.get("initial_state") or {}).get("initialization_actions") or []:
            self.state.run(action)
        self.state.sync()

    def call(self, side: Side, name: str, arguments: dict[str, Any]) -> str:
        """Run a tool of one side and return its output. Never raises; a failure is `Error: …`."""
        if self.ending is not None:
            return CLOSED
        if self.solo and name == DONE:
            self.ending = "agent_stop"
            return STOP
        try:
            text, failed = self.run_tool(side, name, arguments), False
        except Exception as error:
            text, failed = f"Error: {error}", True
        self.calls.append(Call(side, name, arguments, failed))
        if sum(call.failed for call in self.calls) >= MAX_ERRORS:
            self.ending = "too_many_errors"
        return text

    def run_tool(self, side: Side, name: str, arguments: dict[str, Any]) -> str:
        """As `call`, but a failure is raised, and nothing is recorded."""
        tools = self.state.tools[side]
        if self.solo and name in self.state.tools["user"]:
            tools = self.state.tools["user"]
        if name not in tools:
            raise ValueError(f"Tool '{name}' not found.")
        if len(json.dumps(arguments)) > MAX_ARGUMENTS:
            raise ValueError(f"the arguments are longer than {MAX_ARGUMENTS} characters")
        result = tools[name](**arguments)
        self.state.sync()
        return upstream.to_text(result)

    def without_last(self, count: int) -> Episode:
        """The episode played again without its last `count` calls, with the same ending."""
        again = Episode(self.domain, self.task, self.solo)
        for call in self.calls[: len(self.calls) - count]:
            again.call(call.side, call.name, call.arguments)
        again.ending = again.ending or self.ending
        return again
