"""Self-play and user models: an environment with a user, its task, and turns of its two sides."""

from __future__ import annotations

import json

from pact_fast.data.types import Task

TASK = Task(
    "t", [{"role": "system", "content": "Policy of the desk."}, {"role": "user", "content": "How warm is Oslo?"}]
)


def tool(name: str) -> dict:
    """The schema of a tool that takes a city."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


class Desk:
    """An environment with a tool of the agent and one of the user; `judged` is the trajectory it was asked about."""

    blocking = False
    user_tools = (tool("look_at_phone"),)
    tools = (tool("weather"),)

    def reset(self, task):
        return None

    def user_prompt(self):
        return "You want to know the weather. Say ###STOP### when you do."

    def call(self, name, arguments):
        return f"agent's {name}"

    def call_as_user(self, name, arguments):
        return f"user's {name}"

    def reward(self, task, trajectory):
        self.judged = trajectory
        return {"success": float(len(trajectory.turns) == 2)}


def call(name: str) -> str:
    """A call of the tool `name`, as the policy writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': {'city': 'Oslo'}})}\n</tool_call>"


def thinking(thought: str, text: str) -> str:
    """A turn of this text behind this reasoning."""
    return f"<think>\n{thought}\n</think>\n\n{text}"
