"""Validation of answers of a server and of the model behind it. Sizes are bounded, and nothing is evaluated as code.

Role and tool markers inside a model's text are treated as ordinary characters.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field
from typing import Any

from pact_fast.data.types import ToolCall
from pact_fast.errors import PactError
from pact_fast.text import one_line, short

MAX_DEPTH = 64  # levels of JSON
INSTALL = "pip install 'pact-fast[llm]'"


@dataclass(frozen=True)
class Answer:
    """Answer of a server, as stored in the cache.

    text               the content, "" if there is none
    reasoning          hidden reasoning, if the server tells it apart
    tool_calls         [(name, arguments as text)]
    finish_reason      "stop", "length", "tool_calls", …
    prompt_tokens      as reported, or estimated from the characters if the server reports nothing
    completion_tokens  as above
    """

    text: str
    reasoning: str = ""
    tool_calls: list[tuple[str, str]] = field(default_factory=list)
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Malformed(Exception):
    """An answer of another shape; the text says in which way."""


class Unusable(Exception):
    """Invalid answer of a model: (reason code of InvalidAnswer, problem)."""

    def __init__(self, reason: str, problem: str):
        self.reason, self.problem = reason, problem
        super().__init__(problem)


def read_answer(data: bytes, prompt_characters: int, secret: str | None = None) -> Answer:
    """The answer in the body of a chat completion.

    Args:
        data: The body.
        prompt_characters: Length of the prompt, for servers that report no usage.
        secret: A text whose occurrences are replaced: a server may echo the key.

    Raises:
        Malformed: It has another shape.
    """
    body = hide(_load(data.decode("utf-8", "replace")), secret)
    choices = _entry(body, "choices", list)
    if len(choices) != 1:
        raise Malformed(f"{len(choices)} completions came back for one request")
    message = _entry(choices[0], "message", dict)
    text = message.get("content") or message.get("refusal") or ""
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(text, str) or not isinstance(reasoning, str):
        raise Malformed(f"the content is not text but {short(text)}")
    reason = choices[0].get("finish_reason") or "stop"
    if not isinstance(reason, str):
        raise Malformed(f"the finish reason is {short(reason)}")
    if message.get("refusal"):
        reason = "refusal"
    calls = _read_calls(message.get("tool_calls"))
    usage = body.get("usage") or {}
    if not isinstance(usage, dict):
        raise Malformed(f"the usage is {short(usage)}")
    size = len(text) + len(reasoning) + sum(len(arguments) for _, arguments in calls)
    return Answer(
        text, reasoning, calls, reason,
        _count(usage, "prompt_tokens", prompt_characters), _count(usage, "completion_tokens", size),
    )  # fmt: skip


def read_json(text: str) -> Any:
    """The JSON value that a model's answer is; white space and one Markdown fence around it are allowed.

    Raises:
        Unusable: `invalid_json`.
    """
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and len(text) >= 6:
        text = text.partition("\n")[2][:-3] if "\n" in text else text[3:-3]
    try:
        return _load(text)
    except Malformed as error:
        raise Unusable("invalid_json", str(error)) from None


def schema_validator(schema: dict[str, Any]) -> Any:
    """jsonschema's validator of a schema. PactError if it is none, or jsonschema is not installed."""
    return _validator(json.dumps(schema, allow_nan=False))


def check_schema(value: Any, schema: dict[str, Any]) -> None:
    """Unusable with `schema`, one line with the place of the first problem, if a value does not fit a JSON schema."""
    errors = list(schema_validator(schema).iter_errors(value))
    if errors:
        first = min(errors, key=lambda error: (len(error.absolute_path), [str(part) for part in error.absolute_path]))
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first.absolute_path)
        raise Unusable("schema", f"at ${one_line(place)[:80]}: {one_line(first.message)[:200]}")


def read_tool_calls(answer: Answer) -> list[ToolCall]:
    """The calls of an answer. Unusable with `tool_call` if the arguments of one are not a JSON object."""
    calls = []
    for name, text in answer.tool_calls:
        try:
            arguments = _load(text or "{}")
        except Malformed as error:
            raise Unusable("tool_call", f"the arguments of {short(name)}: {error}") from None
        if not isinstance(arguments, dict):
            raise Unusable("tool_call", f"the arguments of {short(name)} are no JSON object")
        calls.append(ToolCall(name, arguments))
    return calls


def hide(value: Any, secret: str | None) -> Any:
    """Replace every occurrence of a secret in JSON data or a text by `(hidden)`."""
    if not secret:
        return value
    if isinstance(value, str):
        return value.replace(secret, "(hidden)")
    if isinstance(value, dict):
        return {hide(key, secret): hide(item, secret) for key, item in value.items()}
    if isinstance(value, list):
        return [hide(item, secret) for item in value]
    return value


def _load(text: str) -> Any:
    """JSON of bounded depth, without NaN and infinite numbers. Malformed otherwise."""
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise Malformed("the JSON is nested too deeply") from None
    except ValueError as error:  # also integers of 5000 digits
        raise Malformed(f"it is not JSON ({one_line(str(error))[:100]})") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for item in level if isinstance(item, dict | list) for inner in _items(item)]
        if not level:
            return value
    raise Malformed(f"the JSON has more than {MAX_DEPTH} levels")


def _items(value: dict | list) -> Any:
    return value.values() if isinstance(value, dict) else value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is out of range")
    return number


def _entry(value: Any, name: str, kind: type) -> Any:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise Malformed(f"there is no {kind.__name__} '{name}' in {short(value)}")
    return found


def _read_calls(calls: Any) -> list[tuple[str, str]]:
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise Malformed(f"the tool calls are {short(calls)}")
    found = []
    for call in calls:
        function = _entry(call, "function", dict)
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments)
        found.append((_entry(function, "name", str), arguments if isinstance(arguments, str) else ""))
    return found


def _count(usage: dict[str, Any], name: str, characters: int) -> int:
    count = usage.get(name)
    if count is None:
        return -(-characters // 4)
    if type(count) is not int or not 0 <= count < 1 << 40:
        raise Malformed(f"the usage has {short(count)} {name}")
    return count


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    try:
        import jsonschema
    except ImportError:
        raise PactError(f"answers with a schema need jsonschema: {INSTALL}") from None
    found = json.loads(schema)
    try:
        cls = jsonschema.validators.validator_for(found, default=jsonschema.Draft202012Validator)
        cls.check_schema(found)
    except jsonschema.SchemaError as error:
        raise PactError(
            f"the schema of a request is no JSON schema: {one_line(error.message)[:200]}; correct it"
        ) from None
    return cls(found)
