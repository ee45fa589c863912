"""Flaws of a model that plays the user: protocol violations, premature stops, and leaks.

Premature stops are judged by the scripted user: a stop is premature if the script would have continued after the same
messages of the agent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pact_fast.data.types import StopReason, ToolCall, Trajectory
from pact_fast.envs.domain.base import Domain
from pact_fast.envs.domain.checker import initial_state
from pact_fast.envs.domain.instance import Instance
from pact_fast.envs.domain.user import DomainUser
from pact_fast.users.stop import STOP, read_stop


def user_flaws(domain: Domain, instance: Instance, trajectory: Trajectory, over: bool = False) -> dict[str, float]:
    """Flaws of one dialogue, 1 where there are any, as rewards are named in metrics.

    `user_protocol_break`  a malformed call, a call of a tool that the user does not have, an empty message, a stop word that
                           does not end the message, or more tokens than a user may take
    `user_premature_stop`  the user ended the dialogue, and the scripted user would not have
    `user_leak`            the user stated a value that the agent has to find, or the name of a tool of the agent

    Args:
        domain: The domain of the instance.
        instance: The task.
        trajectory: The user's side of the dialogue.
        over: A call of the agent has ended the dialogue, so that the user may leave.
    """
    told = [trajectory.opening or "", *(turn.user for turn in trajectory.turns if turn.user is not None)]
    stopped = trajectory.stop_reason is StopReason.USER
    return {
        "user_protocol_break": float(breaks_protocol(domain, instance, trajectory)),
        "user_premature_stop": float(stopped and not over and not would_leave(domain, instance, told)),
        "user_leak": float(bool(leaks(domain, instance, trajectory))),
    }


def breaks_protocol(domain: Domain, instance: Instance, trajectory: Trajectory) -> bool:
    """Whether a turn of the user violates the protocol."""
    if trajectory.stop_reason is StopReason.MAX_USER_TOKENS:
        return True
    own = domain.user if instance.user.device is not None else {}
    for turn in trajectory.turns:
        if any(not isinstance(call, ToolCall) or call.name not in own for call in turn.attempts):
            return True
        said, ended = read_stop(turn.content)
        if STOP in said or not (said or ended or turn.attempts):
            return True
    return False


def would_leave(domain: Domain, instance: Instance, told: Sequence[str]) -> bool:
    """Whether the scripted user leaves at the last of these messages of the agent, or has lost its patience before."""
    script = DomainUser(domain, instance, initial_state(domain, instance))
    replies = [script.reply(text) for text in told]
    return script.gave_up or (bool(replies) and replies[-1] is None)


def leaks(domain: Domain, instance: Instance, trajectory: Trajectory) -> list[str]:
    """List the user's leaks: values that the agent has to find and has not said itself, and names of its tools."""
    user = instance.user
    heard = " ".join([user.opening, user.goal, *user.knows.values(), trajectory.opening or ""])
    found: list[str] = []
    for turn in trajectory.turns:
        if not turn.attempts:
            found += [
                value
                for value in (*user.secrets, *instance.checker.say, *domain.agent)
                if _occurs(value, turn.content) and not _occurs(value, heard)
            ]
        heard += f" {' '.join(turn.observations)} {turn.user or ''}"
    return list(dict.fromkeys(found))


def _occurs(value: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE) is not None
