"""Expert traces: the reference actions of a task, executed; their reasoning is a template.

The reference actions of telecom take the ids of customer, line and bill from nowhere. The trace looks each of them up
before it is first used, as a policy has to. Reference actions that fail (23 of retail) are left out.
"""

from __future__ import annotations

import re
from typing import Any

from pact_fast.data.types import ExpertTrace, ExpertTurn, ToolCall
from pact_fast.envs.tau2.domains import domain
from pact_fast.envs.tau2.episode import DONE, Episode
from pact_fast.envs.tau2.reference import reference_actions

REASONING = "template"  # how the reasoning of these traces was made, in the column `reasoning` of a task
_PHONE = re.compile(r"\b\d{3}-\d{3}-\d{4}\b")


def solo_trace(task: dict[str, Any]) -> ExpertTrace:
    """The trace of an agent that works on a telecom ticket alone; it ends with `done`."""
    writer = _Writer(Episode(domain("telecom"), task, solo=True))
    phone = _PHONE.search(task["ticket"] or "")
    for _, call in reference_actions(task):
        writer.look_up(call, phone.group() if phone else None)
        writer.add(f"The next step is {_words(call)}.", call)
    writer.add("All steps are done, so I close the ticket.", ToolCall(DONE, {}))
    return ExpertTrace(tuple(writer.turns), "The ticket is closed.", "The ticket is closed.")


def agent_trace(name: str, task: dict[str, Any]) -> ExpertTrace | None:
    """The trace of the agent's side of a dialogue whose user has nothing to do; None if the user has to act.

    The agent calls its tools at once and then says what the task wants said, without the confirmations that the policies
    ask for.
    """
    actions = reference_actions(task)
    if any(side == "user" for side, _ in actions):
        return None
    writer = _Writer(Episode(domain(name), task))
    for _, call in actions:
        writer.add(f"The next step is {_words(call)}.", call)
    told = task["evaluation_criteria"].get("communicate_info") or []
    answer = "I have done what I can do for you." + "".join(f" {info}." for info in told)
    return ExpertTrace(tuple(writer.turns), answer, "All steps are done, so I tell the user.")


class _Writer:
    """Plays calls and writes a turn for each that does not fail."""

    def __init__(self, episode: Episode):
        self._episode = episode
        self._known: set[str] = set()
        self.turns: list[ExpertTurn] = []

    def add(self, reasoning: str, call: ToolCall) -> None:
        result = self._episode.call("assistant", call.name, call.arguments)
        if self._episode.calls and self._episode.calls[-1].failed and call.name != DONE:
            return
        self.turns.append(ExpertTurn(reasoning, (call,), (result,)))

    def look_up(self, call: ToolCall, phone: str | None) -> None:
        """Look up the ids that a call needs and no earlier turn has looked up."""
        for key in ("customer_id", "line_id", "bill_id"):
            value = call.arguments.get(key)
            if value is None or value in self._known:
                continue
            self._known.add(value)
            if key == "customer_id" and phone:
                self.add("I need the customer's record.", ToolCall("get_customer_by_phone", {"phone_number": phone}))
            else:
                self.add(f"I need the details of {value}.", ToolCall("get_details_by_id", {"id": value}))


def _words(call: ToolCall) -> str:
    return call.name.replace("_", " ")
