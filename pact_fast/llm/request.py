"""One question to a language model, the body that is sent for it, and the key that its answer is cached under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pact_fast.data.types import Message, ToolSchema
from pact_fast.llm.config import LLMConfig

FORMAT = 1  # of requests and of cache entries; a change makes all earlier answers unreachable


@dataclass(frozen=True)
class Request:
    """One question.

    messages     the conversation so far
    schema       a JSON schema that the answer must fit; None: any text
    tools        tools that the model may call; calls that it makes are in the answer
    tool_choice  as in the OpenAI protocol: "auto", "none", "required", or a tool by name
    sample       index of this sample: the same request with another index is another question
    temperature  instead of the client's
    max_tokens   instead of the client's
    stop         texts at which the answer ends
    repairs      how often an invalid answer is sent back with its error, at most
    check        returns the problem of a value that fits the schema (or of the text, without one); None: it is valid
    """

    messages: Sequence[Message]
    schema: dict[str, Any] | None = None
    tools: Sequence[ToolSchema] = ()
    tool_choice: str | dict[str, Any] | None = None
    sample: int = 0
    temperature: float | None = None
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    repairs: int = 0
    check: Callable[[Any], str | None] | None = field(default=None, compare=False)

    def answered(self, text: str, problem: str) -> Request:
        """The request that sends an invalid answer back."""
        again = f"Your answer cannot be used: {problem}\nAnswer again, in full, with this corrected."
        messages = [*self.messages, {"role": "assistant", "content": text}, {"role": "user", "content": again}]
        return replace(self, messages=messages)


def request_body(config: LLMConfig, request: Request) -> dict[str, Any]:
    """The JSON that is sent. It holds everything that determines the answer, but the sample's index."""
    body: dict[str, Any] = {"model": config.model, "messages": list(request.messages)}
    temperature = config.temperature if request.temperature is None else request.temperature
    if temperature is not None:
        body["temperature"] = temperature
    if config.top_p is not None:
        body["top_p"] = config.top_p
    body[config.max_tokens_field] = request.max_tokens or config.max_tokens
    if request.stop:
        body["stop"] = list(request.stop)
    if config.send_seed:
        body["seed"] = sample_seed(config.seed, request.sample)
    if request.tools:
        body["tools"] = list(request.tools)
        if request.tool_choice is not None:
            body["tool_choice"] = request.tool_choice
    if request.schema is not None and config.structured_outputs:
        named = {"name": "answer", "schema": request.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    return _encodable({**body, **config.extra_body})


def request_key(body: dict[str, Any], schema: dict[str, Any] | None, sample: int) -> str:
    """SHA-256 of a request, in hexadecimal.

    The order of keys counts: servers write the properties of a schema in its order.
    """
    material = {"format": FORMAT, "sample": sample, "schema": schema, "body": body}
    return hashlib.sha256(json.dumps(material, allow_nan=False).encode("ascii")).hexdigest()


def sample_seed(seed: int, sample: int) -> int:
    """A seed in [0, 2³¹) for a sample."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{sample}".encode()).digest()[:4], "big") >> 1


def _encodable(value: Any) -> Any:
    """JSON data with "?" for half surrogate pairs, which UTF-8 cannot hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(item) for item in value]
    return value
