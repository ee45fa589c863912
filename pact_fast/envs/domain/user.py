"""The scripted user: does what it is asked with its own tools, tells what it knows, and leaves when told that all is done.

It understands the requests of the domain (`UserAction.asked`), questions about what it knows, and a closing sentence. It
is the same for the same words, so runs can be repeated.
"""

from __future__ import annotations

import re

from pact_fast.envs.domain.base import Domain
from pact_fast.envs.domain.checker import run_step
from pact_fast.envs.domain.database import Database
from pact_fast.envs.domain.instance import Instance, Step

CLOSING = re.compile(r"anything else|all set|all done|resolved|is done|goodbye|take care|nice day|good day", re.I)
CONFIRM = re.compile(r"shall i|should i|do you agree|confirm|is that (?:right|ok|okay)|want me to|may i go ahead", re.I)
_ASKED = re.compile(r"\?|please|tell me|i need|give me|may i have|could you|can you", re.I)


class DomainUser:
    """The user of one episode.

    steps         calls that the user made, in order
    observations  their results, one per call
    gave_up       the user left because it did not understand
    """

    def __init__(self, domain: Domain, instance: Instance, db: Database):
        self._domain, self._instance, self._db = domain, instance, db
        self._patience = instance.user.patience
        self.steps: list[Step] = []
        self.observations: list[str] = []
        self.gave_up = False

    def reply(self, text: str) -> str | None:
        """The answer to a message of the agent; None when the user leaves."""
        parts = [*self._act(text), *self._tell(text)]
        if not parts and CLOSING.search(text):
            return None
        if not parts and CONFIRM.search(text):
            parts = ["Yes, please."]
        if parts:
            self._patience = self._instance.user.patience
            return " ".join(parts)
        self._patience -= 1
        if self._patience < 0:
            self.gave_up = True
            return None
        goal = self._instance.user.goal or self._instance.user.opening
        return f"Sorry, I do not follow. {goal}"

    def _act(self, text: str) -> list[str]:
        """Do what the message asks for, in its order."""
        if self._instance.user.device is None:
            return []
        found = [(match.start(), a) for a in self._domain.user_actions if (match := a.pattern.search(text))]
        answers = []
        for _, action in sorted(found, key=lambda item: item[0]):
            step = Step(action.name, action.arguments, "user")
            self.steps.append(step)
            answers.append(run_step(self._domain, self._instance, self._db, step)[0])
        self.observations += answers
        return answers

    def _tell(self, text: str) -> list[str]:
        if not _ASKED.search(text):
            return []
        lower = text.lower()
        return [f"My {name} is {value}." for name, value in self._instance.user.knows.items() if name in lower]
