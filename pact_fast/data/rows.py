"""From one data row to one Task. Every field is checked; a problem is a DataError that names the field and the cure."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from pact_fast.data.types import ExpertTrace, Message, Task, ToolCall, ToolSchema
from pact_fast.errors import DataError

Row = dict[str, Any]

TRACE_FIELDS = ("expert_trace", "trace", "demo")
OWN_FIELDS = ("id", "prompt", "messages", "tools", *TRACE_FIELDS, "reference_calls", "answer", "env", "env_args")
ROLES = ("system", "developer", "user", "assistant", "tool")

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}


def task_from_row(row: Row, default_id: str) -> Task:
    """The Task of a row in our own columns (docs/data.md), which are TRL's columns and a few more.

    Raises DataError without file and line; the caller knows them.
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
    """(prompt, messages after it). Only a `messages` column goes on after the prompt."""
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
    """Privileged context may be plain text, or messages without any assistant turn: no trace can be made of those."""
    return isinstance(value, list) and any(isinstance(m, dict) and m.get("role") == "assistant" for m in value)


def read_trace(value: Any, field: str, offset: int = 0) -> ExpertTrace:
    """Messages (a list, or its JSON text) to an expert trace; errors count messages from `offset`."""
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
    """Observations are paired with calls by position; ids and names, where given, must agree with that."""
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
                    f"message {index} answers {short(found)} where {short(expected)} was called; "
                    "put tool messages in the order of the calls",
                    field=field,
                )


def read_messages(value: Any, field: str) -> list[Message]:
    """Messages (a list, or its JSON text) with text contents, call arguments as objects and no null entries."""
    if isinstance(value, str):
        value = read_json(value, field)
    if not isinstance(value, list):
        raise DataError(f"must be a list of messages, found {kind(value)}", field=field)
    return [_message(message, index, field) for index, message in enumerate(value)]


def _message(message: Any, index: int, field: str) -> Message:
    def fail(problem: str) -> DataError:
        return DataError(f"message {index}: {problem}", field=field)

    if not isinstance(message, dict):
        raise fail(f"must be an object with 'role' and 'content', found {kind(message)}")
    if message.get("role") not in ROLES:
        raise fail(f"role {short(message.get('role'))} is unknown; use one of {', '.join(ROLES)}")
    clean = {key: value for key, value in message.items() if value is not None}
    clean["content"] = _content(clean.get("content", ""), clean["role"], fail)
    for key in ("reasoning_content", "reasoning"):
        if not isinstance(clean.get(key, ""), str):
            raise fail(f"'{key}' must be text, found {kind(clean[key])}")
    calls = clean.pop("tool_calls", [])
    if not isinstance(calls, list):
        raise fail(f"'tool_calls' must be a list, found {kind(calls)}")
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
        raise fail(f"'content' must be text, found {kind(content)}")
    if "\0" in content:
        raise fail("'content' has a NUL character; remove it")
    return content


def _call_entry(call: Any, index: int, field: str) -> Message:
    entry = {"type": "function", "function": _call(call, f"message {index}", field).to_json()}
    return entry | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def read_calls(value: Any) -> list[ToolCall] | None:
    """`reference_calls`: a list of {"name", "arguments"}, or its JSON text; None where the row has none."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value = read_json(value, "reference_calls")
    if not isinstance(value, list):
        raise DataError(f'must be a list of {{"name", "arguments"}}, found {kind(value)}', field="reference_calls")
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
    """Every call must name a tool of the task; `tools=None` means that the environment brings them."""
    if tools is None:
        return
    names = [tool["function"]["name"] for tool in tools]
    for call in calls:
        if call.name not in names:
            raise DataError(
                f"calls {short(call.name)}, which is not in 'tools'{nearest(call.name, names)}", field=field
            )


def read_tools(value: Any) -> list[ToolSchema] | None:
    """`tools`: a list of function schemas, wrapped as OpenAI does or bare, or its JSON text; None where absent."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value = read_json(value, "tools")
    if not isinstance(value, list):
        raise DataError(f"must be a list of function schemas or its JSON text, found {kind(value)}", field="tools")
    tools = [_tool(tool, index) for index, tool in enumerate(value)]
    names: set[str] = set()
    for tool in tools:
        name = tool["function"]["name"]
        if name in names:
            raise DataError(f"two tools are named {short(name)}; rename or remove one", field="tools")
        names.add(name)
    return tools


def _tool(tool: Any, index: int) -> ToolSchema:
    def fail(problem: str) -> DataError:
        return DataError(f"tool {index}: {problem}", field="tools")

    body = tool.get("function", tool) if isinstance(tool, dict) else tool
    if not isinstance(body, dict):
        raise fail(f"must be an object, found {kind(body)}")
    name = body.get("name")
    if not isinstance(name, str) or not name.strip():
        raise fail(f"'name' must be non-empty text, found {short(name)}")
    if not isinstance(body.get("description") or "", str):
        raise fail(f"'description' must be text, found {kind(body['description'])}")
    parameters = body.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise fail("'parameters' must be a JSON schema of type 'object'")
    if not isinstance(parameters.get("properties", {}), dict):
        raise fail(f"'parameters.properties' must be an object, found {kind(parameters['properties'])}")
    # A bare schema may carry the wrapper's "type".
    function = {key: value for key, value in body.items() if key != "type"}
    return {"type": "function", "function": {**function, "parameters": parameters}}


def read_id(value: Any, default: str | None = None) -> str:
    """`id`: text or an integer."""
    value = default if value is None else value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"must be non-empty text or an integer, found {short(value)}", field="id")
    return value


def _answer(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise DataError(f"must be text, found {kind(value)}; keep other shapes in a column of another name", field="answer")


def _env(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    raise DataError(f"must be the name of an environment, found {kind(value)}", field="env")


def _env_args(value: Any) -> dict[str, Any]:
    return {} if value is None else read_object(value, "env_args")


def _column(name: str, value: Any) -> Any:
    """verifiers writes `info` as an object or as its JSON text; reward functions get the object."""
    if name == "info" and isinstance(value, str) and value.lstrip().startswith("{"):
        return read_json(value, name)
    return value


def read_object(value: Any, field: str) -> dict[str, Any]:
    """An object, or its JSON text."""
    if isinstance(value, str):
        value = read_json(value, field)
    if not isinstance(value, dict):
        raise DataError(f"must be an object or its JSON text, found {kind(value)}", field=field)
    return value


def read_json(text: str, field: str, prefix: str = "") -> Any:
    """The data of a JSON text. Half surrogate pairs are refused: they cannot be tokenized or written as UTF-8."""
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
    """'; did you mean …' for an error message, '' if nothing is known."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean {short(close[0])}?" if close else "; none are listed"


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def short(value: Any) -> str:
    """A quoted value that keeps an error message on one short line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…" + text[-1]


def one_line(error: Exception) -> str:
    """An exception's text on one line of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"
