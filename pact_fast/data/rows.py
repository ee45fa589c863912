"""Converts one data row to a Task. Every field is checked; errors are DataErrors that name the field and the cure."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from pact_fast.data.absent import answer_text
from pact_fast.data.keys import MESSAGE, TOOL
from pact_fast.data.schemas import clean_arguments, drop_nulls, object_schema
from pact_fast.data.text_calls import calls_in_text
from pact_fast.data.types import ExpertTrace, Message, Task, ToolCall, ToolSchema, call_id, call_keys
from pact_fast.errors import DataError, error_line
from pact_fast.text import short

Row = dict[str, Any]

TRACE_FIELDS = ("expert_trace", "trace", "demo")
SYSTEM_FIELDS = ("system", "system_prompt")
OWN_FIELDS = (
    *(
        "id",
        "prompt",
        "messages",
        *SYSTEM_FIELDS,
        "tools",
        *TRACE_FIELDS,
        "reference_calls",
        "answer",
        "env",
        "env_args",
    ),
)
ROLES = ("system", "developer", "user", "assistant", "tool")

MAX_DEPTH = 100  # of JSON
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TYPE_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}


def task_from_row(row: Row, default_id: str) -> Task:
    """The Task of a row in our own columns (docs/data.md): those of TRL, and a few more.

    Raises DataError without file and line, which the caller adds.
    """
    row = _absent(row)
    _check_columns(row)
    source = prompt_field(row)
    tools = read_tools(row.get("tools"))
    prompt, rest = _prompt(row[source], source, tools)
    trace_field, expert = _trace(row, rest, len(prompt), tools)
    prompt = _add_system(row, prompt)
    calls = read_calls(row.get("reference_calls"), tools)
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


# Columns of lists and objects. Their text "null" means that the row has none, as does the null itself.
_STRUCTURED = (
    *("prompt", "messages", *SYSTEM_FIELDS, "tools", *TRACE_FIELDS, "privileged_context", "reference_calls"),
    *("env", "env_args", "info", "question"),
)
_NEVER_ARGUMENTS = ("expert_trace", "reference_calls", "env_args", "tools")  # columns whose misspelling is an error


def _absent(row: Row) -> Row:
    """The row with null for JSON text "null"."""
    return {
        name: None if name in _STRUCTURED and isinstance(value, str) and value.strip() == "null" else value
        for name, value in row.items()
    }


def _check_columns(row: Row) -> None:
    """DataError for a column that is one of ours, misspelt. Other columns are arguments of reward functions."""
    for column in row:
        if column in OWN_FIELDS:
            continue
        close = difflib.get_close_matches(column.lower(), _NEVER_ARGUMENTS, n=1, cutoff=0.9)
        if close and row.get(close[0]) is None and row[column] not in (None, "", [], {}):
            raise DataError(f"unknown column; did you mean '{close[0]}'? Rename it", field=column)


def _add_system(row: Row, prompt: list[Message]) -> list[Message]:
    """The prompt with the system prompt that stands in a column of its own."""
    given = [name for name in SYSTEM_FIELDS if row.get(name) not in (None, "")]
    for name in given:
        text = row[name]
        if not isinstance(text, str):
            raise DataError(f"must be text, the system prompt, found {type_name(text)}", field=name)
        if prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": text}, *prompt]
        elif prompt[0]["content"].strip() != text.strip():
            raise DataError("the prompt has another system message; keep one of the two", field=name)
    return prompt


def prompt_field(row: Row) -> str:
    """The column that holds the prompt: `prompt` or `messages`, else `question`."""
    given = [name for name in ("prompt", "messages") if row.get(name) is not None]
    if len(given) == 2:
        raise DataError("the row has 'prompt' too; keep one of the two", field="messages")
    if not given and row.get("question") is None:
        raise DataError("missing; every row needs a 'prompt' (text or messages) or 'messages'", field="prompt")
    return given[0] if given else "question"


def _prompt(value: Any, field: str, tools: Sequence[ToolSchema] | None = None) -> tuple[list[Message], list[Message]]:
    """(prompt, messages after it). Only the column `messages` may continue after the prompt."""
    if isinstance(value, str) and field != "messages" and not _is_messages_text(value, field):
        value = [{"role": "user", "content": value}]
    messages = read_messages(value, field, tools)
    end = len(messages)
    if field == "messages":
        end = next((i for i, message in enumerate(messages) if message["role"] in ("assistant", "tool")), end)
    prompt = messages[:end]
    _check_prompt(prompt, field)
    return prompt, messages[end:]


_MESSAGES_TEXT = re.compile(r"\s*\[?\s*\{\s*[\"'](?:role|content)[\"']\s*:")


def _is_messages_text(text: str, field: str) -> bool:
    """Whether a text is the JSON text of messages. DataError if it only looks like it."""
    if not _MESSAGES_TEXT.match(text):
        return False
    value = read_json(text, field, "begins like a list of messages and is ")
    return isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value)


def _check_prompt(prompt: list[Message], field: str) -> None:
    if not prompt:
        raise DataError("no system or user message at its start; give the question as a user message", field=field)
    if prompt[-1]["role"] != "user":
        role = prompt[-1]["role"]
        raise DataError(f"the prompt ends with role '{role}'; it must end with the user's question", field=field)
    if not prompt[-1]["content"].strip():
        raise DataError("the user's question is empty; give its text or remove the row", field=field)
    for index, message in enumerate(prompt):
        if index and message["role"] == "system":
            raise DataError(f"message {index}: a system (or developer) message must come first", field=field)
        if message["role"] == "tool" and prompt[index - 1]["role"] != "tool" and "tool_calls" not in prompt[index - 1]:
            raise DataError(
                f"message {index}: a tool message must follow an assistant turn with tool calls", field=field
            )


def _trace(
    row: Row, rest: list[Message], offset: int, tools: Sequence[ToolSchema] | None
) -> tuple[str, ExpertTrace | None]:
    """(column that holds the expert trace or '', the trace or None). Errors count messages of the prompt's column on."""
    found = {name: row[name] for name in TRACE_FIELDS if row.get(name) not in (None, "", [])}
    if _is_conversation(row.get("privileged_context")):
        found["privileged_context"] = row["privileged_context"]
    if rest:
        found["messages"] = rest
    if len(found) > 1:
        names = ", ".join(f"'{name}'" for name in found)
        raise DataError(f"the row has several expert traces ({names}); keep one", field=list(found)[-1])
    for name, value in found.items():
        return name, read_trace(value, name, offset if name == "messages" else 0, tools)
    return "", None


def _is_conversation(value: Any) -> bool:
    """Whether privileged context has assistant turns. Plain text and other messages cannot become a trace."""
    return isinstance(value, list) and any(isinstance(m, dict) and m.get("role") == "assistant" for m in value)


def read_trace(value: Any, field: str, offset: int = 0, tools: Sequence[ToolSchema] | None = None) -> ExpertTrace:
    """The expert trace in messages (a list, or its JSON text); errors count messages from `offset`."""
    messages = read_messages(value, field, tools)
    try:
        return ExpertTrace.from_messages(messages)
    except ValueError as error:
        problem = re.sub(r"^message (\d+)", lambda m: f"message {int(m[1]) + offset}", error_line(error))
        cure = (
            "a trace is assistant turns, each with one tool message per call or a user message after it, then at most one "
            "final answer"
        )
        raise DataError(f"{problem}; {cure}", field=field) from None


def read_messages(value: Any, field: str, tools: Sequence[ToolSchema] | None = None) -> list[Message]:
    """Messages (a list, or its JSON text), normalised: our keys, text contents, arguments as objects, no padding."""
    if isinstance(value, str):
        value = read_json(value, field)
    if not isinstance(value, list):
        raise DataError(f"must be a list of messages, found {type_name(value)}", field=field)
    return [_message(message, index, field, tools) for index, message in enumerate(value)]


def _message(message: Any, index: int, field: str, tools: Sequence[ToolSchema] | None) -> Message:
    def fail(problem: str) -> DataError:
        return DataError(f"message {index}: {problem}", field=field)

    if not isinstance(message, dict):
        raise fail(f"must be an object with 'role' and 'content', found {type_name(message)}")
    if message.get("role") not in ROLES and (message.get("role") != "function" or not message.get("name")):
        raise fail(f"role {short(message.get('role'))} is unknown; use one of {', '.join(ROLES)}")
    try:
        clean = MESSAGE.read(message)
    except ValueError as error:
        raise fail(error_line(error)) from None
    role = clean["role"] = _ROLE_NAMES.get(clean["role"], clean["role"])
    content, reasoning = _content(clean.get("content", ""), role, fail)
    clean["content"] = content
    if not isinstance(clean.get("reasoning_content", ""), str):
        name = next(name for name, item in message.items() if item is clean["reasoning_content"])
        raise fail(f"'{name}' must be text, found {type_name(clean['reasoning_content'])}")
    if reasoning:
        clean["reasoning_content"] = "\n".join(filter(None, (clean.get("reasoning_content"), *reasoning)))
    if "tool_call_id" in clean:
        clean["tool_call_id"] = call_id(clean["tool_call_id"])
    calls = _calls_of(clean, fail)
    if calls and role != "assistant":
        raise fail(f"a {role} message cannot have tool calls; only assistant messages can")
    entries = [_call_entry(call, index, field, tools) for call in calls]
    if role == "assistant":
        entries, clean["content"] = _add_calls_in_text(entries, content, index, field, tools)
    if entries:
        clean["tool_calls"] = entries
    return clean


_ROLE_NAMES = {"developer": "system", "function": "tool"}  # roles that few templates know -> ours


def _calls_of(message: Message, fail: Callable[[str], DataError]) -> list[Any]:
    """Takes the calls out of a message. `function_call` is OpenAI's older form of a single call."""
    calls, single = message.pop("tool_calls", None) or [], message.pop("function_call", None)
    if isinstance(calls, str):
        calls = read_json(calls, "tool_calls")
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        raise fail(f"'tool_calls' must be a list, found {type_name(calls)}")
    if single and calls:
        raise fail("has 'function_call' and 'tool_calls'; keep 'tool_calls'")
    return [single] if single else calls


def _add_calls_in_text(
    entries: list[Message], content: str, index: int, field: str, tools: Sequence[ToolSchema] | None
) -> tuple[list[Message], str]:
    """(calls, content without them): calls may stand in the text of an assistant message, in the form of a model."""
    try:
        found, rest = calls_in_text(content, [tool["function"]["name"] for tool in tools or []])
    except ValueError as error:
        raise DataError(f"message {index}: {error_line(error)}", field=field) from None
    if not found:
        return entries, content
    written = [_call_entry(call, index, field, tools) for call in found]
    if entries and [e["function"] for e in entries] != [e["function"] for e in written]:
        raise DataError(f"message {index}: 'content' holds other calls than 'tool_calls'; keep one", field=field)
    return entries or written, rest


_TEXT_PARTS = (None, "text", "input_text", "output_text")
_REASONING_PARTS = ("thinking", "reasoning", "reasoning_text")


def _content(content: Any, role: str, fail: Callable[[str], DataError]) -> tuple[str, list[str]]:
    """(text of the content, texts of its reasoning parts)."""
    reasoning: list[str] = []
    if isinstance(content, dict) and role == "tool":
        content = json.dumps(content, ensure_ascii=False)
    if isinstance(content, list):
        texts: list[str] = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else "text"
            text = next(
                (part[k] for k in ("text", kind) if isinstance(part, dict) and isinstance(part.get(k), str)), None
            )
            if text is None or kind not in (*_TEXT_PARTS, *_REASONING_PARTS):
                raise fail("'content' has a part without text; only text parts can be used")
            (reasoning if kind in _REASONING_PARTS else texts).append(text)
        content = "".join(texts)
    if not isinstance(content, str):
        raise fail(f"'content' must be text, found {type_name(content)}")
    if "\0" in content:
        raise fail("'content' has a NUL character; remove it")
    return content, reasoning


def _call_entry(call: Any, index: int, field: str, tools: Sequence[ToolSchema] | None) -> Message:
    entry = {"type": "function", "function": _call(call, f"message {index}", field, tools).to_json()}
    found = call_id(call_keys(call).get("id"))
    return entry | ({"id": found} if found is not None else {})


def read_calls(value: Any, tools: Sequence[ToolSchema] | None = None) -> list[ToolCall] | None:
    """The column `reference_calls`: a list of {"name", "arguments"}, or its JSON text; None if the row has none."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value = read_json(value, "reference_calls")
    if not isinstance(value, list):
        raise DataError(f'must be a list of {{"name", "arguments"}}, found {type_name(value)}', field="reference_calls")
    return [_call(call, f"call {index}", "reference_calls", tools) for index, call in enumerate(value)]


def _call(call: Any, where: str, field: str, tools: Sequence[ToolSchema] | None) -> ToolCall:
    try:
        body = call_keys(call)
        if isinstance(body.get("arguments"), str):
            body["arguments"] = read_json(body["arguments"] or "{}", field, f"{where}: the arguments are ")
        found = ToolCall.from_message(body)
    except ValueError as error:
        raise DataError(f'{where}: {error_line(error)}; write {{"name": …, "arguments": {{…}}}}', field=field) from None
    schema = next(
        (tool["function"]["parameters"] for tool in tools or [] if tool["function"]["name"] == found.name), None
    )
    return ToolCall(found.name, clean_arguments(found.arguments, schema))


def check_calls(calls: Sequence[ToolCall], tools: Sequence[ToolSchema] | None, field: str) -> None:
    """DataError if a call names no tool of the task. `tools=None`: the environment supplies the tools, no check."""
    if tools is None:
        return
    names = [tool["function"]["name"] for tool in tools]
    for call in calls:
        if call.name not in names:
            raise DataError(
                f"calls {short(call.name)}, which is not in 'tools'{nearest(call.name, names)}", field=field
            )


def read_tools(value: Any) -> list[ToolSchema] | None:
    """The column `tools`: a list of function schemas, with or without OpenAI's wrapper, or its JSON text; else None."""
    if value is None or value == "":
        return None
    as_text = isinstance(value, str)  # which exporters do not pad
    if isinstance(value, str):
        value = read_json(value, "tools")
    if not isinstance(value, list):
        raise DataError(f"must be a list of function schemas or its JSON text, found {type_name(value)}", field="tools")
    tools = [_tool(tool, index, as_text) for index, tool in enumerate(value)]
    names: set[str] = set()
    for tool in tools:
        name = tool["function"]["name"]
        if name in names:
            raise DataError(f"two tools are named {short(name)}; rename or remove one", field="tools")
        names.add(name)
    return tools


def _tool(tool: Any, index: int, as_text: bool) -> ToolSchema:
    """A tool in OpenAI's form. `as_text`: it was JSON text, in which a null default is meant."""

    def fail(problem: str) -> DataError:
        return DataError(f"tool {index}: {problem}", field="tools")

    tool = tool.get("function") or tool if isinstance(tool, dict) else tool
    if not isinstance(tool, dict):
        raise fail(f"must be an object, found {type_name(tool)}")
    try:
        body = TOOL.read(tool)
    except ValueError as error:
        raise fail(error_line(error)) from None
    name = body.get("name")
    if not isinstance(name, str) or not name.strip():
        raise fail(f"'name' must be non-empty text, found {short(name)}")
    if not isinstance(body.get("description") or "", str):
        raise fail(f"'description' must be text, found {type_name(body['description'])}")
    parameters = body.get("parameters") or {}
    if isinstance(parameters, str):
        as_text = True
        parameters = read_json(parameters, "tools", f"tool {index}: 'parameters' is ") or {}
    if not isinstance(parameters, dict):
        raise fail("'parameters' must be a JSON schema of type 'object'")
    try:
        parameters = object_schema(drop_nulls(parameters, keep="default" if as_text else None))
    except ValueError as error:
        raise fail(error_line(error)) from None
    if parameters.get("type", "object") != "object":
        raise fail("'parameters' must be a JSON schema of type 'object'")
    if not isinstance(parameters.get("properties", {}), dict):
        raise fail(f"'parameters.properties' must be an object, found {type_name(parameters['properties'])}")
    return {"type": "function", "function": {**drop_nulls(body), "parameters": parameters}}


def read_id(value: Any, default: str | None = None) -> str:
    """The column `id`: text or an integer."""
    value = default if value is None else value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"must be non-empty text or an integer, found {short(value)}", field="id")
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
            f"a row cannot name a file or module ({short(env)}); set env.name to it and give the row a registered name"
        )
    else:
        problem = f"unknown environment {short(env)}{nearest(env, names)} Correct it, or set env.name to your own class"
    raise DataError(f"{problem}; registered: {', '.join(names)}", field="env")


def _env(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    raise DataError(f"must be the name of an environment, found {type_name(value)}", field="env")


def _env_args(value: Any) -> dict[str, Any]:
    return {} if value in (None, "") else drop_nulls(read_object(value, "env_args"))


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
        _check_depth(text, data)
        if _SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg} at character {error.pos + 1}; correct the text there"
    except UnicodeEncodeError:
        problem = r"not valid text: half of a surrogate pair (\ud800 to \udfff); remove or complete the escape"
    except (ValueError, RecursionError) as error:
        problem = f"not readable JSON: {error_line(error)}"
    else:
        return data
    raise DataError(prefix + problem, field=field)


def _check_depth(text: str, data: Any) -> None:
    """RecursionError if data is nested more than MAX_DEPTH deep, because copying or writing it would fail later."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise RecursionError(f"nested more than {MAX_DEPTH} levels deep")


def nearest(name: str, known: Sequence[str]) -> str:
    """Hint for an error message, `; did you mean 'x'?`, with the nearest known name even if it is not close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean {short(close[0])}?" if close else "; none are listed"


def type_name(value: Any) -> str:
    """The type of a JSON value, in the words of error messages."""
    return "null" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)
