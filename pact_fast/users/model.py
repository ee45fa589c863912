"""A user played by a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pact_fast.data.types import Message, ToolCall, ToolSchema
from pact_fast.errors import PactError
from pact_fast.users.stop import STOP, read_stop

GREETING = "Hi! How can I help you today?"  # of the agent, before the question; as in tau-bench

CallTool = Callable[[str, dict[str, Any]], str]


class Answer(Protocol):
    """Answer of a model: its visible text, and calls of the user's own tools."""

    @property
    def text(self) -> str: ...

    @property
    def tool_calls(self) -> Sequence[ToolCall]: ...


class Client(Protocol):
    """Asks a language model. `pact_fast.llm.LLMClient` is one."""

    def complete(self, messages: Sequence[Message], **options: Any) -> Answer:
        """The model's answer; options: tools, sample."""


class ModelUser:
    """Talks to the agent in the user's place.

    The model sees its own prompt, the messages of both sides, and its own calls with their results. It never sees the
    agent's reasoning, calls or observations, and the agent sees none of the user's. Role markers in the agent's
    messages are broken up, since the endpoint may read them as control tokens.

    Args:
        client: The model.
        prompt: System prompt: who the user is, what they want, and that they end the dialogue by `stop`.
        question: What the user has said already: the task's question.
        tools: Tools of the user's own, for instance of their phone.
        call: Runs one of them; needed where there are tools.
        stop: The words that end the dialogue, at the end of a message of the user.
        max_messages: Most messages; after them the dialogue is over.
        max_calls: Most calls of the user's tools before a message; a model that makes more ends the dialogue.
        sample: Index of the sample: with a cache, the same dialogue with another index has other replies.
    """

    def __init__(
        self,
        client: Client,
        prompt: str,
        question: str,
        *,
        tools: Sequence[ToolSchema] = (),
        call: CallTool | None = None,
        stop: Sequence[str] = (STOP,),
        max_messages: int = 100,
        max_calls: int = 10,
        sample: int = 0,
    ):
        if tools and call is None:
            raise PactError("a user with tools needs 'call', which runs them")
        self._client, self._tools, self._call, self._stop = client, list(tools), call, tuple(stop)
        self._left, self._max_calls, self._sample = max_messages, max_calls, sample
        self.messages: list[Message] = [  # roles as the model sees them: it is the assistant
            {"role": "system", "content": prompt},
            {"role": "user", "content": GREETING},
            {"role": "assistant", "content": question},
        ]

    def reply(self, text: str) -> str | None:
        """Return the user's reply to the visible text of the agent; None ends the dialogue.

        Raises:
            LLMError: Of the client; there is no answer.
        """
        if self._left < 1:
            return None
        self._left -= 1
        self.messages.append({"role": "user", "content": without_markers(text)})
        for _ in range(self._max_calls + 1):
            answer = self._client.complete(self.messages, tools=self._tools, sample=self._sample)
            if not answer.tool_calls:
                said, ended = read_stop(answer.text, *self._stop)
                self.messages.append({"role": "assistant", "content": answer.text})
                return None if ended or not said else said
            self._run(answer)
        return None

    def _run(self, answer: Answer) -> None:
        """Run the user's own calls; their results stay between the user and its tools."""
        names = [tool["function"]["name"] for tool in self._tools]
        ids = [f"call_{len(self.messages)}_{index}" for index, _ in enumerate(answer.tool_calls)]
        entries = [
            {"id": i, "type": "function", "function": _openai(call)}
            for i, call in zip(ids, answer.tool_calls, strict=True)
        ]
        self.messages.append({"role": "assistant", "content": answer.text, "tool_calls": entries})
        for i, call in zip(ids, answer.tool_calls, strict=True):
            known = self._call is not None and call.name in names
            result = self._call(call.name, call.arguments) if known and self._call else f"error: no tool {call.name!r}"
            self.messages.append({"role": "tool", "tool_call_id": i, "content": result})


def without_markers(text: str) -> str:
    """The text with a zero-width space in what looks like a control token (<|im_end|>, [INST], </s>)."""
    for opening in ("<|", "|>", "<s>", "</s>", "[INST]", "[/INST]", "<｜", "<start_of_turn>", "<end_of_turn>"):
        text = text.replace(opening, opening[0] + "\u200b" + opening[1:])
    return text


def _openai(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
