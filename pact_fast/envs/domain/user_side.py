"""The user's side of an instance: the prompt of a policy that plays the user, its tools, and the scripted user's example.

A user model is trained on the scripted user's side of a dialogue: the agent's messages are context, the user's calls
and words are trained, and it ends the dialogue by the stop word.
"""

from __future__ import annotations

from typing import Any

from pact_fast.data.types import ExpertTrace, Message, ToolSchema
from pact_fast.envs.domain.base import Domain
from pact_fast.envs.domain.checker import initial_state, run_step
from pact_fast.envs.domain.database import Database
from pact_fast.envs.domain.instance import Instance, Step
from pact_fast.envs.domain.tools import call_tool, schema_of
from pact_fast.envs.domain.user import DomainUser
from pact_fast.users.stop import STOP


def user_prompt(instance: Instance) -> str:
    """The system prompt of a model that plays the user: the user's goal and knowledge, and the end of the dialogue."""
    user = instance.user
    known = "; ".join(f"your {name} is {value}" for name, value in user.knows.items())
    return "\n".join(
        [
            f"You are a customer and talk to an agent. You want: {user.goal or user.opening}",
            f"You know: {known}." if known else "You know nothing else.",
            "Answer what you are asked, and do what you are asked with your tools. Say nothing that you do not know.",
            f"When the agent says that all is done, write {STOP} and nothing else.",
        ]
    )


def user_schemas(domain: Domain, instance: Instance) -> list[ToolSchema]:
    """Schemas of the user's tools, without the device that they act on; none for a user without a device."""
    return [schema_of(tool, hidden=2) for tool in domain.user_tools] if instance.user.device is not None else []


def call_as_user(domain: Domain, instance: Instance, db: Database, name: str, arguments: dict[str, Any]) -> str:
    """Run a tool of the user on its device. What it returns is an error text if there is no such tool."""
    if instance.user.device is None:
        return "error: you have no tools"
    return call_tool(domain.user, db, name, {**arguments, "device": instance.user.device})[0]


def user_dialogue(domain: Domain, instance: Instance, expert: ExpertTrace) -> list[Message]:
    """The messages of a dialogue from the user's side, after the question: "user" is the agent, "assistant" the user.

    Args:
        domain: The domain of the instance.
        instance: The task.
        expert: The agent's side of a dialogue with the scripted user, which is played again.
    """
    db = initial_state(domain, instance)
    script = DomainUser(domain, instance, db)
    messages: list[Message] = []
    said = [(turn.content, turn.calls) for turn in expert.turns] + [(expert.answer or "", ())]
    for text, calls in said:
        for call in calls:
            run_step(domain, instance, db, Step(call.name, call.arguments))
        if calls or not text:
            continue
        messages.append({"role": "user", "content": text})
        done = len(script.steps)
        reply = script.reply(text)
        messages += _acts(script.steps[done:], script.observations[done:])
        messages.append({"role": "assistant", "content": STOP if reply is None else reply})
        if reply is None:
            break
    return messages


def _acts(steps: list[Step], observations: list[str]) -> list[Message]:
    """Calls of the user, one at a time, with their results."""
    messages: list[Message] = []
    for step, text in zip(steps, observations, strict=True):
        call = {"type": "function", "function": {"name": step.name, "arguments": dict(step.arguments)}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "name": step.name, "content": text})
    return messages
