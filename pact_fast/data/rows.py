"""Converts one data row to a Task. Every field is checked; errors are DataErrors that name the field and the cure."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from pact_fast.data.absent import answer_text
from pact_fast.data.types import ExpertTrace, Message, Task, ToolCall, ToolSchema
from pact_fast.errors import DataError

Row = dict[str, Any]

TRACE_FIELDS = ("expert_trace", "trace", "demo")
OWN_FIELDS = ("id", "prompt", "messages", "tools", *TRACE_FIELDS, "reference_calls", "answer", "env", "env_args")
ROLES = ("system", "developer", "user", "assistant", "tool")

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TYPE_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}


def task_from_row(row: Row, default_id: str) -> Task:
    """The Task of a row in our own columns (docs/data.md): those of TRL, and a few more.

    Raises DataError without file and line, which the caller adds.
    """
    source = prompt_field(row)
    prompt, rest = _prompt(row[source], source)
    tools = read_tools(row.get("tools"))
    trace_field, expert = _trace(row, rest, offset=len(prompt))
    calls = read_calls(row.get("reference_calls"))
    if expert is not None:
        check_calls(expert.calls, tools, trace_field)
        calls = expert.calls if calls is None else calls
    check_calls(calls or [], tools, "reference_calls")
    used = {*OWN_FIELDS, source, trace_field}
    return Task(
        id=read_id(row.get("id"), default_id),
        prompt=prompt,
        tools=tools or [],
        expert=expert,
        reference_calls=calls,
        answer=_answer(row.get("answer")),
        env=_env(row.get("env")),
        env_args=_env_args(row.get("env_args")),
        columns={name: _column(name, value) for name, value in row.items() if name not in used},
    )


def prompt_field(row: Row) -> str:
    """The column that holds the prompt: `prompt` or `messages`, else `question`."""
    given = [name for name in ("prompt", "messages") if row.get(name) is not None]
    if len(given) == 2:
        raise DataError("the row has 'prompt' too; keep one of the two", field="messages")
    if not given and row.get("question") is None:
        raise DataError("missing; every row needs a 'prompt' (text or messages) or 'messages'", field="prompt")
    return given[0] if given else "question"


def _prompt(value: Any, field: str) -> tuple[list[Message], list[Message]]:
    """(prompt, messages after it). Only the column `messages` may continue after the prompt."""
    if isinstance(value, str) and field != "messages":
        value = [{"role": "user", "content": value}]
    messages = read_messages(value, field)
    end = len(messages)
    if field == "messages":
        end = next((i for i, message in enumerate(messages) if message["role"] in ("assistant", "tool")), end)
    prompt = messages[:end]
    _check_prompt(prompt, field)
    return prompt, messages[end:]


def _check_prompt(prompt: list[Message], field: str) -> None:
    if not prompt:
        raise DataError("no system or user message at its start; give the question as a user message", field=field)
    if prompt[-1]["role"] != "user":
        role = prompt[-1]["role"]
        raise DataError(f"the prompt ends with role '{role}'; it must end with the user's question", field=field)
    if not prompt[-1]["content"].strip():
        raise DataError("the user's question is empty; give its text or remove the row", field=field)
    for index, message in enumerate(prompt):
        if index and message["role"] in ("system", "developer"):
            raise DataError(f"message {index}: a {message['role']} message must come first", field=field)
        if message["role"] == "tool" and prompt[index - 1]["role"] != "tool" and "tool_calls" not in prompt[index - 1]:
            raise DataError(
                f"message {index}: a tool message must follow an assistant turn with tool calls", field=field
            )


def _trace(row: Row, rest: list[Message], offset: int) -> tuple[str, ExpertTrace | None]:
    """(column that holds the expert trace or '', the trace or None)."""
    found = {name: row[name] for name in TRACE_FIELDS if row.get(name) not in (None, "", [])}
    if _is_conversation(row.get("privileged_context")):
        found["privileged_context"] = row["privileged_context"]
    if rest:
        found["messages"] = rest
    if len(found) > 1:
        names = ", ".join(f"'{name}'" for name in found)
        raise DataError(f"the row has several expert traces ({names}); keep one", field=list(found)[-1])
    for name, value in found.items():
        return name, read_trace(value, name, offset if name == "messages" else 0)
    return "", None


def _is_conversation(value: Any) -> bool:
    """Whether privileged context has assistant turns. Plain text and other messages cannot become a trace."""
    return isinstance(value, list) and any(isinstance(m, dict) and m.get("role") == "assistant" for m in value)


def read_trace(value: Any, field: str, offset: int = 0) -> ExpertTrace:
    """The expert trace in messages (a list, or its JSON text); errors count messages from `offset`."""
    messages = read_messages(value, field)
    try:
        trace = ExpertTrace.from_messages(messages)
    except ValueError as error:
        problem = re.sub(r"^message (\d+)", lambda m: f"message {int(m[1]) + offset}", one_line(error))
        cure = "a trace is assistant turns, each with one tool message per call, then at most one final answer"
        raise DataError(f"{problem}; {cure}", field=field) from None
    _check_observations(messages, field, offset)
    return trace


def _check_observations(messages: list[Message], field: str, offset: int) -> None:
    """Observations are paired with calls by position; ids and names must agree with the pairing, if given."""
    waiting: list[Message] = []
    for index, message in enumerate(messages, offset):
        if message["role"] == "assistant":
            waiting = list(message.get("tool_calls", []))
            continue
        call = waiting.pop(0)
        pairs = ((message.get("tool_call_id"), call.get("id")), (message.get("name"), call["function"]["name"]))
        for found, expected in pairs:
            if found is not None and expected is not None and found != expected:
                raise DataError(
                    f"message {index} answers {quoted(found)} where {quoted(expected)} was called; "
                    "put tool messages in the order of the calls",
                    field=field,
                )


def read_messages(value: Any, field: str) -> list[Message]:
    """Messages (a list, or its JSON text), normalised: text contents, arguments as objects, no null entries."""
    if isinstance(value, str):
        value = read_json(value, field)
    if not isinstance(value, list):
        raise DataError(f"must be a list of messages, found {type_name(value)}", field=field)
    return [_message(message, index, field) for index, message in enumerate(value)]


def _message(message: Any, index: int, field: str) -> Message:
    def fail(problem: str) -> DataError:
        return DataError(f"message {index}: {problem}", field=field)

    if not isinstance(message, dict):
        raise fail(f"must be an object with 'role' and 'content', found {type_name(message)}")
    if message.get("role") not in ROLES:
        raise fail(f"role {quoted(message.get('role'))} is unknown; use one of {', '.join(ROLES)}")
    clean = {key: value for key, value in message.items() if value is not None}
    clean["content"] = _content(clean.get("content", ""), clean["role"], fail)
    for key in ("reasoning_content", "reasoning"):
        if not isinstance(clean.get(key, ""), str):
            raise fail(f"'{key}' must be text, found {type_name(clean[key])}")
    calls = clean.pop("tool_calls", [])
    if not isinstance(calls, list):
        raise fail(f"'tool_calls' must be a list, found {type_name(calls)}")
    if calls and clean["role"] != "assistant":
        raise fail(f"a {clean['role']} message cannot have tool calls; only assistant messages can")
    if calls:
        clean["tool_calls"] = [_call_entry(call, index, field) for call in calls]
    return clean


def _content(content: Any, role: str, fail: Callable[[str], DataError]) -> str:
    if isinstance(content, dict) and role == "tool":
        content = json.dumps(content, ensure_ascii=False)
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise fail("'content' has a part without text; only text parts can be used")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise fail(f"'content' must be text, found {type_name(content)}")
    if "\0" in content:
        raise fail("'content' has a NUL character; remove it")
    return content


def _call_entry(call: Any, index: int, field: str) -> Message:
    entry = {"type": "function", "function": _call(call, f"message {index}", field).to_json()}
    return entry | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def read_calls(value: Any) -> list[ToolCall] | None:
    """The column `reference_calls`: a list of {"name", "arguments"}, or its JSON text; None if the row has none."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value = read_json(value, "reference_calls")
    if not isinstance(value, list):
        raise DataError(f'must be a list of {{"name", "arguments"}}, found {type_name(value)}', field="reference_calls")
    return [_call(call, f"call {index}", "reference_calls") for index, call in enumerate(value)]


def _call(call: Any, where: str, field: str) -> ToolCall:
    body = call.get("function", call) if isinstance(call, dict) else None
    if isinstance(body, dict) and isinstance(body.get("arguments"), str):
        arguments = read_json(body["arguments"] or "{}", field, f"{where}: the arguments are ")
        call = {"name": body.get("name"), "arguments": arguments}
    try:
        return ToolCall.from_message(call)
    except ValueError as error:
        raise DataError(f'{where}: {one_line(error)}; write {{"name": …, "arguments": {{…}}}}', field=field) from None


def check_calls(calls: Sequence[ToolCall], tools: Sequence[ToolSchema] | None, field: str) -> None:
    """DataError if a call names no tool of the task. `tools=None`: the environment supplies the tools, no check."""
    if tools is None:
        return
    names = [tool["function"]["name"] for tool in tools]
    for call in calls:
        if call.name not in names:
            raise DataError(
                f"calls {quoted(call.name)}, which is not in 'tools'{nearest(call.name, names)}", field=field
            )


def read_tools(value: Any) -> list[ToolSchema] | None:
    """The column `tools`: a list of function schemas, with or without OpenAI's wrapper, or its JSON text; else None."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value = read_json(value, "tools")
    if not isinstance(value, list):
        raise DataError(f"must be a list of function schemas or its JSON text, found {type_name(value)}", field="tools")
    tools = [_tool(tool, index) for index, tool in enumerate(value)]
    names: set[str] = set()
    for tool in tools:
        name = tool["function"]["name"]
        if name in names:
            raise DataError(f"two tools are named {quoted(name)}; rename or remove one", field="tools")
        names.add(name)
    return tools


def _tool(tool: Any, index: int) -> ToolSchema:
    def fail(problem: str) -> DataError:
        return DataError(f"tool {index}: {problem}", field="tools")

    body = tool.get("function", tool) if isinstance(tool, dict) else tool
    if not isinstance(body, dict):
        raise fail(f"must be an object, found {type_name(body)}")
    name = body.get("name")
    if not isinstance(name, str) or not name.strip():
        raise fail(f"'name' must be non-empty text, found {quoted(name)}")
    if not isinstance(body.get("description") or "", str):
        raise fail(f"'description' must be text, found {type_name(body['description'])}")
    parameters = body.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise fail("'parameters' must be a JSON schema of type 'object'")
    if not isinstance(parameters.get("properties", {}), dict):
        raise fail(f"'parameters.properties' must be an object, found {type_name(parameters['properties'])}")
    # A bare schema may carry the wrapper's "type".
    function = {key: value for key, value in body.items() if key != "type"}
    return {"type": "function", "function": {**function, "parameters": parameters}}


def read_id(value: Any, default: str | None = None) -> str:
    """The column `id`: text or an integer."""
    value = default if value is None else value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"must be non-empty text or an integer, found {quoted(value)}", field="id")
    return value


def _answer(value: Any) -> str | None:
    if value is None or isinstance(value, str | int | float):
        return answer_text(value)
    raise DataError(
        f"must be text, found {type_name(value)}; keep other shapes in a column of another name", field="answer"
    )


def check_environment(env: str | None, registered: Collection[str]) -> None:
    """DataError if the column `env` names an environment that is not registered.

    A row cannot name a file: data must not choose which code is imported.
    """
    if env is None or env in registered:
        return
    names = sorted(registered)
    if ":" in env:
        problem = (
            f"a row cannot name a file or module ({quoted(env)}); set env.name to it and give the row a registered name"
        )
    else:
        problem = (
            f"unknown environment {quoted(env)}{nearest(env, names)} Correct it, or set env.name to your own class"
        )
    raise DataError(f"{problem}; registered: {', '.join(names)}", field="env")


def _env(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    raise DataError(f"must be the name of an environment, found {type_name(value)}", field="env")


def _env_args(value: Any) -> dict[str, Any]:
    return {} if value is None else read_object(value, "env_args")


def _column(name: str, value: Any) -> Any:
    """The value as reward functions get it. verifiers writes `info` as an object or as its JSON text."""
    if name == "info" and isinstance(value, str) and value.lstrip().startswith("{"):
        return read_json(value, name)
    return value


def read_object(value: Any, field: str) -> dict[str, Any]:
    """An object, or its JSON text."""
    if isinstance(value, str):
        value = read_json(value, field)
    if not isinstance(value, dict):
        raise DataError(f"must be an object or its JSON text, found {type_name(value)}", field=field)
    return value


def read_json(text: str, field: str, prefix: str = "") -> Any:
    """Parses JSON text. Refuses unpaired surrogates, which cannot be tokenized or written as UTF-8."""
    try:
        data = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg} at character {error.pos + 1}; correct the text there"
    except UnicodeEncodeError:
        problem = r"not valid text: half of a surrogate pair (\ud800 to \udfff); remove or complete the escape"
    except (ValueError, RecursionError) as error:
        problem = f"not readable JSON: {one_line(error)}"
    else:
        return data
    raise DataError(prefix + problem, field=field)


def nearest(name: str, known: Sequence[str]) -> str:
    """Hint for an error message, `; did you mean 'x'?`, with the nearest known name even if it is not close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean {quoted(close[0])}?" if close else "; none are listed"


def type_name(value: Any) -> str:
    """The type of a JSON value, in the words of error messages."""
    return "null" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)


def quoted(value: Any) -> str:
    """The value in quotes, cut to 60 characters, for error messages of one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…" + text[-1]


def one_line(error: Exception) -> str:
    """The text of an exception on one line, cut to 200 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"
