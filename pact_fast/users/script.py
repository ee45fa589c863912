"""A user with a fixed list of messages, independent of the agent's answers."""

from __future__ import annotations

from collections.abc import Iterable


class ScriptedUser:
    """Says `messages` in order, then ends the dialogue."""

    def __init__(self, messages: Iterable[str]):
        self._messages = iter(tuple(messages))

    def reply(self, text: str) -> str | None:
        """The next message, or None after the last; `text` (of the agent) has no effect."""
        return next(self._messages, None)
