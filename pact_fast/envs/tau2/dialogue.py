"""One dialogue: an episode with a user who answers the agent and acts on its own phone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pact_fast.data.types import Message
from pact_fast.envs.tau2.domains import domain
from pact_fast.envs.tau2.episode import Episode
from pact_fast.envs.tau2.users import ENDINGS, Role, User, opening
from pact_fast.envs.tau2.verdict import GREETING, judge

MAX_ROUNDS = 30  # rounds of calls that a user may make before it says something


class Dialogue:
    """Plays one task with a user.

    Args:
        name: The domain.
        task: The task as the package ships it.
        make_user: Makes the user from its role.

    Attributes:
        episode: The state that both act on.
        role: What the user is told.
        said: What the agent said, in order.
    """

    def __init__(self, name: str, task: dict[str, Any], make_user: Callable[[Role], User]):
        self.episode = Episode(domain(name), task)
        self.said: list[str] = []
        # as the user sees them; its first message is a template, so that all rollouts of a task share one prompt
        self._messages: list[Message] = [
            {"role": "user", "content": GREETING},
            {"role": "assistant", "content": opening(task)},
        ]
        self._solved_at_start = self._holds()
        self.role = Role(name, task, self._satisfied)
        self._user = make_user(self.role)

    def respond(self, text: str) -> str | None:
        """The user's answer to the agent, after its actions on the phone; None when the dialogue is over."""
        if self.episode.ending is not None:
            return None
        if not text.strip():
            self.episode.ending = "agent_error"  # the package raises: a message needs text or calls
            return None
        self.said.append(text)
        self._messages.append({"role": "user", "content": text})
        for _ in range(MAX_ROUNDS):
            turn = self._user.reply(list(self._messages))
            if not turn.calls:
                return self._say(turn.text)
            self._act(turn.calls)
            if self.episode.ending is not None:  # too many errors
                return None
        self.episode.ending = "user_error"
        return None

    def _say(self, text: str) -> str | None:
        if not text.strip():
            self.episode.ending = "user_error"
            return None
        self._messages.append({"role": "assistant", "content": text})
        if any(ending in text for ending in ENDINGS):
            self.episode.ending = "user_stop"
            return None
        return text

    def _act(self, calls: Any) -> None:
        entries = [
            {"id": f"user_{len(self._messages)}_{i}", "type": "function", "function": call.to_json()}
            for i, call in enumerate(calls)
        ]
        self._messages.append({"role": "assistant", "content": "", "tool_calls": entries})
        for entry, call in zip(entries, calls, strict=True):
            result = self.episode.call("user", call.name, call.arguments)
            self._messages.append({"role": "tool", "tool_call_id": entry["id"], "name": call.name, "content": result})

    def _satisfied(self) -> bool:
        """Whether the task is solved, and was not from the beginning."""
        return not self._solved_at_start and self._holds()

    def _holds(self) -> bool:
        return all(judge(self.episode, self.said).components.values())
