"""An environment with one tool and a user who asks again, so that a conversation has several user turns."""

from __future__ import annotations

WEATHER = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}


class AskingUser:
    """A user who asks `questions` times more."""

    blocking = False
    tools = (WEATHER,)
    questions = 3

    def reset(self, task):
        self.asked = 0

    def call(self, name, arguments):
        return "7"

    def respond(self, text):
        self.asked += 1
        return "And Rome?" if self.asked <= self.questions else None

    def reward(self, task, trajectory):
        return {"success": 1.0}
