"""An actor behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pact_fast.chat.formats.base import ParsedTurn
from pact_fast.data.types import Message, ToolSchema, split_reasoning
from pact_fast.llm import InvalidAnswer, LLMClient
from pact_fast.llm.request import Request
from pact_fast.synthesis.traces.transcript import CannotAct, Context

INSTRUCTION = (
    "Before you call tools, say in one to three sentences what you know and what you need next, without the names of tools "
    "or arguments. Do not answer before the tools have told you the answer, and do not guess it."
)
REPAIRS = 1  # of an answer that cannot be read


class TeacherActor:
    """Asks a language model for every turn.

    It sees the row's prompt with `INSTRUCTION` in the system message, which the trace does not keep. A model whose server
    does not tell reasoning apart reasons in the text before its calls, which counts as reasoning then.
    """

    def __init__(self, client: LLMClient):
        self._client = client
        self.workers = client.config.max_concurrency

    def act(self, context: Context) -> ParsedTurn:
        """An LLMError other than an invalid answer ends the run; earlier answers are in the cache."""
        request = Request(
            teacher_messages(context.messages), tools=_tools(context.tools), sample=context.key[1], repairs=REPAIRS
        )
        try:
            answer = self._client.ask(request)
        except InvalidAnswer as error:
            raise CannotAct("invalid_answer", str(error)) from None
        reasoning, content = split_reasoning({"content": answer.text, "reasoning_content": answer.reasoning})
        if answer.tool_calls and not reasoning:
            reasoning, content = content, ""
        return ParsedTurn(answer.text, reasoning, content, list(answer.tool_calls))


def teacher_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages in the form of the protocol: ids of calls, arguments as text, and the instruction in front."""
    first, rest = ("", messages) if messages[0]["role"] != "system" else (messages[0]["content"], messages[1:])
    shown: list[Message] = [{"role": "system", "content": f"{first}\n\n{INSTRUCTION}" if first else INSTRUCTION}]
    pending: list[str] = []
    for message in rest:
        if message["role"] == "tool":
            call_id = pending.pop(0) if pending else "call"
            shown.append({"role": "tool", "tool_call_id": call_id, "content": message["content"]})
            continue
        one: Message = {"role": message["role"], "content": message["content"]}
        calls = message.get("tool_calls") or []
        pending = [f"call_{len(shown)}_{index}" for index, _ in enumerate(calls)]
        if calls:
            one["tool_calls"] = [_entry(i, call["function"]) for i, call in zip(pending, calls, strict=True)]
        shown.append(one)
    return shown


def _entry(call_id: str, function: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(tools: Sequence[ToolSchema]) -> list[ToolSchema]:
    """The keys that the protocol knows."""
    known = ("name", "description", "parameters")
    return [
        {"type": "function", "function": {key: value for key, value in tool["function"].items() if key in known}}
        for tool in tools
    ]
