"""Expert traces: the reference actions of a task, executed; their reasoning and messages are templates.

The reference actions of telecom take the ids of customer, line and bill from nowhere. The trace looks each of them up
before it is first used, as a policy has to. Reference actions that fail (23 of retail) are left out.
"""

from __future__ import annotations

import re
from typing import Any

from pact_fast.data.types import ExpertTrace, ExpertTurn, ToolCall
from pact_fast.envs.tau2.dialogue import Dialogue
from pact_fast.envs.tau2.domains import domain
from pact_fast.envs.tau2.episode import DONE, Episode
from pact_fast.envs.tau2.reference import reference_actions
from pact_fast.envs.tau2.users import Tau2ScriptedUser, opening

REASONING = "template"  # how the reasoning of these traces was made, in the column `reasoning` of a task
TRANSFERRED = "YOU ARE BEING TRANSFERRED TO A HUMAN AGENT. PLEASE HOLD ON."  # what the policies want said
_PHONE = re.compile(r"\b\d{3}-\d{3}-\d{4}\b")


def solo_trace(task: dict[str, Any]) -> ExpertTrace:
    """The trace of an agent that works on a telecom ticket alone; it ends with `done`."""
    writer = _Writer(Episode(domain("telecom"), task, solo=True), task["ticket"])
    for _, call in reference_actions(task):
        writer.act(call)
    writer.add("All steps are done, so I close the ticket.", ToolCall(DONE, {}))
    return ExpertTrace(tuple(writer.turns), "The ticket is closed.", "The ticket is closed.")


def dialogue_trace(name: str, task: dict[str, Any]) -> ExpertTrace:
    """The trace of the agent's side of a dialogue with the scripted user.

    The agent makes its own calls and asks the user for the user's, one at a time; at the end it says what the task wants
    said. The confirmations that the policies ask for are left out.
    """
    dialogue = Dialogue(name, task, Tau2ScriptedUser)
    writer = _Writer(dialogue.episode, opening(task))
    for side, call in reference_actions(task):
        if side == "assistant":
            writer.act(call)
            continue
        asked = f"Please {_words(call)}" + "".join(f", {key}: {value}" for key, value in call.arguments.items()) + "."
        reasoning = f"The next step is the user's: {_words(call)}."
        reply = dialogue.respond(asked)
        if reply is None:
            return ExpertTrace(tuple(writer.turns), asked, reasoning)
        writer.turns.append(ExpertTurn(reasoning, (), (), asked, reply))
    told = task["evaluation_criteria"].get("communicate_info") or []
    transferred = any(call.name == "transfer_to_human_agents" for call in dialogue.episode.calls)
    answer = TRANSFERRED if transferred else "I have done what I can do for you."
    reasoning = "All steps are done, so I tell the user."
    return ExpertTrace(tuple(writer.turns), " ".join([answer, *(f"{info}." for info in told)]), reasoning)


class _Writer:
    """Plays the agent's calls and writes a turn for each that does not fail.

    Args:
        episode: Where they are played.
        known: What the agent is told at first; has the customer's phone number in telecom.
    """

    def __init__(self, episode: Episode, known: str):
        self._episode = episode
        self._phone = _PHONE.search(known)
        self._looked_up: set[str] = set()
        self.turns: list[ExpertTurn] = []

    def act(self, call: ToolCall) -> None:
        """A reference action, after look-ups of the ids that it is the first to need."""
        for key in ("customer_id", "line_id", "bill_id"):
            value = call.arguments.get(key)
            if self._episode.domain.name == "telecom" and value is not None and value not in self._looked_up:
                self._looked_up.add(value)
                self._look_up(key, value)
        self.add(f"The next step is {_words(call)}.", call)

    def _look_up(self, key: str, value: str) -> None:
        if key == "customer_id" and self._phone:
            look_up = ToolCall("get_customer_by_phone", {"phone_number": self._phone.group()})
            self.add("I need the customer's record.", look_up)
        else:
            self.add(f"I need the details of {value}.", ToolCall("get_details_by_id", {"id": value}))

    def add(self, reasoning: str, call: ToolCall) -> None:
        """A call, unless it fails."""
        result = self._episode.call("assistant", call.name, call.arguments)
        if call.name == DONE or not self._episode.calls[-1].failed:
            self.turns.append(ExpertTurn(reasoning, (call,), (result,)))


def _words(call: ToolCall) -> str:
    return call.name.replace("_", " ")
