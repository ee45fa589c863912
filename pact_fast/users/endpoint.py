"""Users that a language model behind an OpenAI-compatible endpoint plays (`rollout.user=endpoint`).

One client serves all episodes of a run: its limit of requests at a time, its budget and its cache are theirs together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pact_fast.config import RolloutConfig
from pact_fast.data.types import Task, ToolSchema, text_of
from pact_fast.llm import InvalidAnswer, LLMClient, LLMConfig
from pact_fast.users.model import CallTool, ModelUser

ANSWERS = "answers"  # folder of the cache, in a run directory or beside results


def user_llm(rollout: RolloutConfig, answers: Path | None = None) -> LLMConfig | None:
    """The settings of the model that plays the user; None if it is none behind an endpoint.

    Args:
        rollout: Its `user_llm`, which may have a `cache_dir` of its own.
        answers: Where answers are kept otherwise; None: nowhere.

    Raises:
        PactError: A setting is wrong.
    """
    if rollout.user != "endpoint":
        return None
    kept: dict[str, Any] = {} if answers is None else {"cache_dir": str(answers)}
    return LLMConfig.read(kept | (rollout.user_llm or {}), "rollout.user_llm")


class EndpointUsers:
    """Makes the user of each episode. Thread-safe; `close` it."""

    def __init__(self, config: LLMConfig, stop: str):
        self._client, self._stop = LLMClient(config, role="user"), stop

    @classmethod
    def of(cls, rollout: RolloutConfig, answers: Path | None = None) -> EndpointUsers | None:
        """The users that the settings ask for, see `user_llm`. None if no endpoint plays the user."""
        config = user_llm(rollout, answers)
        return None if config is None else cls(config, rollout.user_stop)

    def make(
        self, view: Task, tools: Sequence[ToolSchema], call: CallTool | None, stops: Sequence[str]
    ) -> EndpointUser:
        """The user of an episode.

        Args:
            view: The task from the user's side: its prompt, which ends with the user's message.
            tools: The user's own.
            call: Runs one of them.
            stops: Further words that end the dialogue, as the environment says.
        """
        prompt, question = text_of(view.prompt[0]["content"]), text_of(view.prompt[-1]["content"])
        user = EndpointUser(self._client, prompt, question, tools=tools, call=call, stop=(self._stop, *stops))
        user.messages = list(view.prompt)
        return user

    def report(self) -> dict[str, Any]:
        """Requests, tokens, cache hits and cost, see `LLMClient.report`."""
        return self._client.report()

    def close(self) -> None:
        """Cancel running requests, and close the connections."""
        self._client.close()


class EndpointUser(ModelUser):
    """A user whose model may fail to say anything that can be used, which ends the dialogue and not the run.

    Equal dialogues get equal replies: the answers are those of the cache, with the same sample index in all episodes.

    Attributes:
        failed: Whether that has happened.
    """

    failed = False

    def reply(self, text: str) -> str | None:
        """As ModelUser. An answer that is cut, empty or refused, or whose calls are no JSON, ends the dialogue."""
        try:
            return super().reply(text)
        except InvalidAnswer:
            self.failed = True
            return None
