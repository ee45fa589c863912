"""The prompts of a task, with the package's texts."""

from __future__ import annotations

from typing import Any

from pact_fast.data.types import Message
from pact_fast.envs.tau2 import upstream
from pact_fast.envs.tau2.domains import domain
from pact_fast.envs.tau2.episode import DONE, STOP

_AGENT = "agent/llm_agent.py"


def solo_prompt(name: str, task: dict[str, Any]) -> list[Message]:
    """The policy as system message, the ticket as user message; the package puts both into the system message."""
    instruction = upstream.constant(_AGENT, "AGENT_SOLO_INSTRUCTION").format(stop_function_name=DONE, stop_token=STOP)
    system, tag, ticket = upstream.constant(_AGENT, "SYSTEM_PROMPT_SOLO").partition("<ticket>")
    return [
        {
            "role": "system",
            "content": system.strip().format(agent_instruction=instruction, domain_policy=domain(name).solo_policy),
        },
        {"role": "user", "content": (tag + ticket).format(ticket=task["ticket"])},
    ]


def dialogue_prompt(name: str, first: str) -> list[Message]:
    """The policy as system message, and the user's first message; the agent's greeting before it is left out."""
    system = upstream.constant(_AGENT, "SYSTEM_PROMPT").format(
        agent_instruction=upstream.constant(_AGENT, "AGENT_INSTRUCTION"), domain_policy=domain(name).policy
    )
    return [{"role": "system", "content": system}, {"role": "user", "content": first}]
