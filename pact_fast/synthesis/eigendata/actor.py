"""A language model that acts in JSON: it calls a tool, says something, or ends. A schema allows nothing else.

Endpoints need no parser of tool calls for it, and a small model cannot make a malformed call. Whether a call makes sense is
for the tools and the checkers to say.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pact_fast.data.types import Message, ToolCall, ToolSchema
from pact_fast.llm import InvalidAnswer, LLMClient

MAX_TEXT, MAX_ARGUMENT = 400, 80  # characters


class JsonActor:
    """One side of a dialogue, played by a model.

    Args:
        client: The model.
        prompt: Its role and its goal.
        tools: Tools that it may call.
        sample: Index of the sample: another dialogue under the same prompt.
        speaks: Whether it may say something.
    """

    def __init__(
        self, client: LLMClient, prompt: str, tools: Sequence[ToolSchema], *, sample: int = 0, speaks: bool = True
    ):
        self._client, self._sample = client, sample
        self._schema = act_schema(tools, speaks)
        self.messages: list[Message] = [{"role": "system", "content": f"{prompt}\n\n{_manual(tools, speaks)}"}]

    def observe(self, text: str) -> None:
        """Something was said to it, or a tool has answered."""
        self.messages.append({"role": "user", "content": text})

    def act(self) -> ToolCall | str | None:
        """A call, a message, or None: it ends, or its answer cannot be used. LLMError of any other kind ends the run."""
        try:
            answer = self._client.complete(self.messages, schema=self._schema, sample=self._sample, repairs=1)
        except InvalidAnswer:
            return None
        self.messages.append({"role": "assistant", "content": json.dumps(answer.value, ensure_ascii=False)})
        value = answer.value
        if value["act"] == "call":
            return ToolCall(value["tool"], dict(value["arguments"]))
        return value["text"] if value["act"] == "say" else None


def act_schema(tools: Sequence[ToolSchema], speaks: bool = True) -> dict[str, Any]:
    """The JSON schema of an act: one alternative per tool, one for speaking, one for the end."""
    acts = [
        _closed(
            {
                "act": {"const": "call"},
                "tool": {"const": tool["function"]["name"]},
                "arguments": _arguments(tool["function"].get("parameters") or {}),
            }
        )
        for tool in tools
    ]
    if speaks:
        said = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT}
        acts.append(_closed({"act": {"const": "say"}, "text": said}))
    return {"anyOf": [*acts, _closed({"act": {"const": "end"}})]}


def _arguments(parameters: dict[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments, closed, and with an end to its texts."""
    properties = {
        name: {**schema, "maxLength": MAX_ARGUMENT} if schema.get("type") == "string" else schema
        for name, schema in (parameters.get("properties") or {}).items()
    }
    required = [name for name in parameters.get("required") or properties if name in properties]
    return _closed(properties, required)


def _closed(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def _manual(tools: Sequence[ToolSchema], speaks: bool) -> str:
    """Return the instructions of the prompt: the JSON forms of an act, and the tools."""
    lines = ["Answer with one JSON object:"]
    lines += ['{"act": "call", "tool": "…", "arguments": {…}}'] if tools else []
    lines += ['{"act": "say", "text": "…"}'] if speaks else []
    lines += ['{"act": "end"}', *(["Tools:"] if tools else [])]
    for tool in tools:
        function = tool["function"]
        names = ", ".join((function.get("parameters") or {}).get("properties") or {})
        lines.append(f"{function['name']}({names}): {function.get('description', '')}")
    return "\n".join(lines)
