"""Rows that broke other trainers: each is read as its writer meant it, or refused with file, line, field and cure."""

from __future__ import annotations

import json

import pytest

from pact_fast.algorithms.registry import make_algorithm
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.chat.templates import CHATML_HERMES
from pact_fast.chat.tool_schema import call_error
from pact_fast.config.load import parse_config
from pact_fast.data.readers import read_tasks, tool_schema
from pact_fast.data.sources import FileTasks
from pact_fast.data.types import ExpertTrace, ToolCall, split_reasoning
from pact_fast.envs.python_tools.env import PythonTools
from pact_fast.errors import DataError, PactError
from pact_fast.train.check_rows import check_rows, write_skipped
from tests.support.chat_tokenizers import CHATML, TAGS, build
from tests.support.data_rows import CALL, PARAMETERS, QUESTION, TRACE, WEATHER

CODES = {"weather": "def weather(city): return {'Oslo': 7}[city]"}
TOOLHOP, FTRL = {"codes": CODES, "scoring": "toolhop"}, {"codes": CODES, "scoring": "ftrl"}
OSLO = ToolCall("weather", {"city": "Oslo"})


@pytest.fixture
def read(tmp_path):
    def read(row, **kwargs):
        path = tmp_path / "rows.jsonl"
        rows = row if isinstance(row, list) else [row]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        return read_tasks(path, format="pact", **kwargs)

    return read


def refused(read, row, field, *words):
    with pytest.raises(DataError) as caught:
        read(row)
    assert (caught.value.line, caught.value.field) == (1, field)
    for word in words:
        assert word in caught.value.problem
    return caught.value


def traced(call=None, message=None, **row):
    """A row whose trace has one turn, with this call (or these keys of the message)."""
    turn = {"role": "assistant", **(message or {"tool_calls": [call]})}
    return {"prompt": "How warm is Oslo?", "tools": [WEATHER], "expert_trace": [turn, *TRACE[1:]], **row}


# --- 5: keys of messages, calls and tools ---

CALLS = {
    "parameters": {"type": "function", "function": {"name": "weather", "parameters": {"city": "Oslo"}}},
    "input": {"type": "tool_use", "name": "weather", "input": {"city": "Oslo"}},
    "args": {"name": "weather", "args": {"city": "Oslo"}},
    "json text": {"function": {"name": "weather", "parameters": '{"city": "Oslo"}'}},
    "arguments beside function": {"function": {"name": "weather"}, "arguments": {"city": "Oslo"}},
    "function is a name": {"function": "weather", "arguments": {"city": "Oslo"}},
    "index of a stream": {"index": 0, "id": "c1", "function": CALL},
}


@pytest.mark.parametrize("case", CALLS)
def test_arguments_under_other_names(read, case):
    (task,) = read(traced(CALLS[case]))
    assert task.expert.calls == task.reference_calls == [OSLO]
    (task,) = read({"prompt": "q", "tools": [WEATHER], "reference_calls": [CALLS[case]]})
    assert task.reference_calls == [OSLO]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"name": "weather", "argumnets": {"city": "Oslo"}}, ("'argumnets'", "did you mean 'arguments'?")),
        ({"name": "weather", "payload": {"city": "Oslo"}}, ("'payload'", "known keys are id, name, arguments")),
        ({"name": "weather", "arguments": {"city": "Oslo"}, "input": {"city": "Rome"}}, ("two names",)),
        ({"function": {"name": "weather", "paramters": {"city": "Oslo"}}}, ("did you mean 'parameters'?",)),
    ],
)
def test_unknown_keys_of_calls(read, call, words):
    refused(read, traced(call), "expert_trace", "message 0", *words)
    refused(read, {"prompt": "q", "tools": [WEATHER], "reference_calls": [call]}, "reference_calls", "call 0", *words)


TOOL_KEYS = {
    "MCP": {"name": "weather", "description": "d", "inputSchema": PARAMETERS},
    "Anthropic": {"name": "weather", "description": "d", "input_schema": PARAMETERS},
    "Gemini": {"name": "weather", "description": "d", "parametersJsonSchema": PARAMETERS},
    "JSON text": {"name": "weather", "description": "d", "parameters": json.dumps(PARAMETERS)},
    "wrapped": {"type": "function", "function": {"name": "weather", "description": "d", "input_schema": PARAMETERS}},
}


@pytest.mark.parametrize("case", TOOL_KEYS)
def test_schemas_under_other_names(read, case):
    (task,) = read({"prompt": "q", "tools": [TOOL_KEYS[case]]})
    assert task.tools == [WEATHER]


def test_arguments_without_a_schema_around_them(read):
    (task,) = read({"prompt": "q", "tools": [{"name": "weather", "parameters": {"city": {"type": "string"}}}]})
    assert task.tools[0]["function"]["parameters"] == {"type": "object", "properties": {"city": {"type": "string"}}}


@pytest.mark.parametrize(
    ("tool", "word"),
    [
        ({"name": "weather", "parametrs": PARAMETERS}, "did you mean 'parameters'?"),
        ({"name": "weather", "signature": PARAMETERS}, "unknown key 'signature'"),
        (
            {"name": "weather", "parameters": {"type": "object", "propertys": {"city": {}}}},
            "did you mean 'properties'?",
        ),
    ],
)
def test_unknown_keys_of_tools(read, tool, word):
    refused(read, {"prompt": "q", "tools": [tool]}, "tools", "tool 0", word)


MESSAGES = {
    "function_call": {"function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
    "toolCalls": {"toolCalls": [{"function": CALL}]},
    "a single call": {"tool_calls": {"function": CALL}},
    "text of the calls": {"tool_calls": json.dumps([{"function": CALL}])},
    "Hermes text": {"content": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'},
    "Llama text": {"content": '{"name": "weather", "parameters": {"city": "Oslo"}}'},
}


@pytest.mark.parametrize("case", MESSAGES)
def test_calls_of_a_message_in_other_forms(read, case):
    (task,) = read(traced(message=MESSAGES[case]))
    assert task.expert.calls == [OSLO]
    assert task.expert.turns[0].content == ""


def test_older_function_messages(read):
    trace = [
        {"role": "assistant", **MESSAGES["function_call"]},
        {"role": "function", "name": "weather", "content": "7"},
    ]
    (task,) = read(traced() | {"expert_trace": [*trace, TRACE[2]]})
    assert task.expert.turns[0].observations == ("7",)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>',
        "<tool_call>weather(Oslo)</tool_call>",
        '<|python_tag|>{"name": "weather", "parameters": {}}',
        "[TOOL_CALLS] [{}]",
        '{"name": "weather", "arguments": {"city": "Oslo"}}',
    ],
)
def test_a_call_as_text_of_the_last_message_is_no_answer(read, text):
    row = {
        "prompt": "q",
        "tools": [WEATHER],
        "messages": None,
        "trace": [*TRACE[:2], {"role": "assistant", "content": text}],
    }
    refused(read, row, "trace", "message 2")


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ({"tool_call": [{"function": CALL}]}, "did you mean 'tool_calls'?"),
        ({"tool_calls": [{"function": CALL}], "reasonning_content": "x"}, "did you mean 'reasoning_content'?"),
        ({"tool_calls": [{"function": CALL}], "loss_mask": 1}, "unknown key 'loss_mask'"),
        ({"tool_calls": [{"function": CALL}], "thoughts": "x"}, "unknown key 'thoughts'"),
    ],
)
def test_unknown_keys_of_messages(read, message, word):
    refused(read, traced(message=message), "expert_trace", "message 0", word)


@pytest.mark.parametrize("column", ["expert_traces", "expertTrace", "reference_call", "env_arg"])
def test_misspelt_columns(read, column):
    refused(read, {"prompt": "q", column: [{"a": 1}]}, column, "did you mean")


# --- 6: null padding, 27: nullable arguments ---

OPTIONAL = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "date": {"type": "string"}},
    "required": ["city"],
}


def test_padding_is_dropped_in_every_file_type(read, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    padded = {"city": {"type": "string", "enum": None}, "date": {"type": "string", "enum": None}, "unit": None}
    row = {
        "prompt": "q",
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {**OPTIONAL, "properties": padded}}}],
        "expert_trace": [
            {"role": "assistant", "tool_calls": [{"function": {**CALL, "arguments": {"city": "Oslo", "date": None}}}]},
            {"role": "tool", "content": "7", "tool_calls": None},
        ],
        "env_args": {"codes": {"weather": "def weather(city): ...", "pollen": None}},
    }  # fmt: skip
    (task,) = read(row)
    assert task.tools[0]["function"]["parameters"] == OPTIONAL
    assert task.expert.calls == [OSLO]
    assert list(task.env_args["codes"]) == ["weather"]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    (parquet,) = read_tasks(path)
    assert (parquet.tools, parquet.expert, parquet.env_args) == (task.tools, task.expert, task.env_args)
    text = {**row, "tools": json.dumps(row["tools"]), "expert_trace": json.dumps(row["expert_trace"])}
    assert read(text) == [task]


def test_null_stays_where_the_schema_needs_it(read):
    nullable = {"type": "string", "nullable": True}
    for schema in (nullable, {"type": ["string", "null"]}, {"anyOf": [{"type": "string"}, {"type": "null"}]}):
        for required in (["city", "date"], ["city"]):
            parameters = {
                "type": "object",
                "properties": {"city": {"type": "string"}, "date": schema},
                "required": required,
            }
            call = {"name": "weather", "arguments": {"city": "Oslo", "date": None}}
            (task,) = read(traced(call, tools=[{"name": "weather", "parameters": parameters}]))
            assert task.expert.calls[0].arguments == (
                {"city": "Oslo", "date": None} if "date" in required else OSLO.arguments
            )


def test_null_for_a_nullable_argument_is_no_error():
    def weather(city: str, date: str | None, days: list[int] | None = None) -> str:
        """Temperature.

        Args:
            city: Where.
            date: When.
            days: Which.
        """

    def error(tool, **arguments):
        return call_error(ToolCall("weather", arguments), [tool])

    schema = tool_schema(weather)
    assert error(schema, city="Oslo", date=None, days=None) is None
    assert error(schema, city=None, date=None) == "weather: argument 'city' must be string, not null"
    for date in ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"type": ["string", "null"], "enum": ["now"]}):
        tool = {"name": "weather", "parameters": {"type": "object", "properties": {"date": date}}}
        assert error(tool, date=None) is None
    tool = {"name": "weather", "parameters": {"type": "object", "properties": {"date": {"enum": ["now"]}}}}
    assert "not allowed" in error(tool, date=None)


# --- 7: reasoning markers ---


@pytest.mark.parametrize(
    ("message", "reasoning", "content"),
    [
        ({"content": "Look it up.\n</think>\n\n"}, "Look it up.", ""),
        ({"content": "<think>Look it up."}, "Look it up.", ""),
        ({"content": "", "thinking": "Look it up."}, "Look it up.", ""),
        ({"content": "Look it up.</think>7 degrees"}, "Look it up.", "7 degrees"),
        ({"content": "\n<think>\nLook it up.\n</think>\n7 degrees"}, "Look it up.", "7 degrees"),
        ({"content": "Well. <think>Look it up.</think> 7 degrees"}, "Look it up.", "Well.  7 degrees"),
        ({"content": "<think>One.</think>a<think>Two.</think>b"}, "One.\nTwo.", "ab"),
        ({"content": "<thinking>Look it up.</thinking>7"}, "Look it up.", "7"),
        ({"content": "[THINK]Look it up.[/THINK]7"}, "Look it up.", "7"),
        ({"content": "◁think▷Look it up.◁/think▷7"}, "Look it up.", "7"),
        ({"content": "<think>Look it up.</think>7", "reasoning_content": "Look it up."}, "Look it up.", "7"),
        ({"content": "</think>7", "reasoning": "Look it up."}, "Look it up.", "7"),
        ({"content": "7 degrees"}, "", "7 degrees"),
    ],
)
def test_reasoning_in_every_form(read, message, reasoning, content):
    assert split_reasoning(message) == (reasoning, content)
    (task,) = read(traced(message={"tool_calls": [{"function": CALL}], **message}))
    assert (task.expert.turns[0].reasoning, task.expert.turns[0].content) == (reasoning, content)


@pytest.mark.parametrize(
    "message",
    [
        {"content": "Look it up.\n</think>\n\n"},
        {"content": "<think>Look it up."},
        {"content": "", "thinking": "Look it up."},
        {"content": [{"type": "thinking", "thinking": "Look it up."}]},
    ],
)
def test_reasoning_in_every_form_is_supervised(read, message):
    (task,) = read(traced(message={"tool_calls": [{"function": CALL}], **message}))
    renderer = ChatRenderer(build(CHATML_HERMES, CHATML, TAGS, "<|im_end|>"))
    context = renderer.trace_context(task, task.expert, "turns")
    text = renderer.token_bytes.join(context.ids[context.level <= 4]).decode()
    assert text.strip() == "<think>\nLook it up.\n</think>"


def test_reasoning_parts_of_a_content(read):
    for kind in ("thinking", "reasoning"):
        parts = [{"type": kind, kind: "Look it up."}, {"type": "text", "text": "Wait."}]
        (task,) = read(traced(message={"tool_calls": [{"function": CALL}], "content": parts}))
        assert (task.expert.turns[0].reasoning, task.expert.turns[0].content) == ("Look it up.", "Wait.")


# --- 16: ids of any type ---


@pytest.mark.parametrize("ids", [(1, 2, 2, 1), ("a", "b", "b", "a"), (1, 2, "2", "1"), (1.0, 2.0, 2, 1), (0, 1, 1, 0)])
def test_observations_are_paired_by_id(read, ids):
    calls = [
        {"id": i, "function": {"name": "weather", "arguments": {"city": c}}}
        for i, c in zip(ids[:2], ("Oslo", "Rome"), strict=True)
    ]
    tools = [
        {"role": "tool", "tool_call_id": i, "content": c} for i, c in zip(ids[2:], ("Rome: 20", "Oslo: 7"), strict=True)
    ]
    (task,) = read(traced() | {"expert_trace": [{"role": "assistant", "tool_calls": calls}, *tools]})
    assert task.expert.turns[0].observations == ("Oslo: 7", "Rome: 20")
    assert ExpertTrace.from_messages([{"role": "assistant", "tool_calls": calls}, *tools]) == task.expert


def test_ids_that_do_not_pair(read):
    def row(calls, answers):
        turn = {"role": "assistant", "tool_calls": [{"id": i, **CALL} for i in calls]}
        return traced() | {
            "expert_trace": [turn, *({"role": "tool", "tool_call_id": i, "content": "7"} for i in answers)]
        }

    refused(read, row([1, 2], [1, 3]), "expert_trace", "message 2", "no call")
    refused(read, row([1, 2], [1, 1]), "expert_trace", "message 2", "already")
    assert read(row([1, 1], [1, 1]))  # ids that tell nothing: by position
    assert read(row([1, 2], [None, None]))


# --- 26: JSON text "null", 31: JSON text of messages, a system column; 8: developer ---


@pytest.mark.parametrize(
    "column", ["tools", "expert_trace", "reference_calls", "env_args", "env", "system", "privileged_context", "info"]
)
def test_the_text_null_is_absent(read, column):
    assert read({"prompt": "q", column: " null "}) == read({"prompt": "q", column: None})


def test_a_prompt_of_null_text_is_missing(read):
    refused(read, {"prompt": "null"}, "prompt", "missing")


SYSTEM = {"role": "system", "content": "Use tools."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": json.dumps([SYSTEM, *QUESTION])},
        {"prompt": json.dumps([SYSTEM, *QUESTION], indent=2)},
        {"question": json.dumps([SYSTEM, *QUESTION])},
        {"prompt": QUESTION, "system": "Use tools."},
        {"prompt": "How warm is Oslo?", "system_prompt": "Use tools."},
        {"messages": QUESTION, "system": "Use tools."},
        {"prompt": json.dumps([SYSTEM, *QUESTION]), "system": "Use tools."},
        {"prompt": [{"role": "developer", "content": "Use tools."}, *QUESTION]},
    ],
)
def test_messages_as_text_and_system_prompts(read, row):
    (task,) = read(row)
    assert task.prompt == [SYSTEM, *QUESTION]
    assert task.columns == {}


def test_prompts_that_only_look_like_messages(read):
    assert read({"prompt": '[1, 2] or {"a": 1}?'})[0].prompt[0]["content"] == '[1, 2] or {"a": 1}?'
    refused(read, {"prompt": "[{'role': 'user', 'content': 'x'}]"}, "prompt", "not valid JSON")
    refused(read, {"prompt": '[{"role": "user", "content": "x'}, "prompt", "not valid JSON")
    refused(read, {"prompt": [SYSTEM, *QUESTION], "system": "Other."}, "system", "keep one")
    refused(read, {"prompt": "q", "system": ["x"]}, "system", "must be text")


# --- the check of rendered rows: 8, 9, 18, 25, 30 ---


@pytest.fixture
def check(tmp_path):
    def check(*rows, template=CHATML_HERMES, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        size = settings.pop("window", 4096)
        config = {
            "model": {"random_init": {"model_type": "qwen3", "max_position_embeddings": size}},
            "data": {"train": str(path), "shuffle": False, "on_bad_row": settings.pop("on_bad_row", "error")},
            "rollout": {"max_prompt_length": 500, "max_completion_length": 100, **settings.pop("rollout", {})},
            "algorithm": settings.pop("algorithm", {}),
            "env": settings.pop("env", {}),
        }
        config = parse_config(config)
        tasks = FileTasks(config.data, 0, ["python_tools"])
        renderer = ChatRenderer(build(template, CHATML, TAGS, "<|im_end|>"))
        return tasks, check_rows(tasks, config, renderer, make_algorithm(config.algorithm))

    return check


def good(number=0, **changes):
    return traced({"function": CALL}, id=f"r{number}", answer="7", env_args=TOOLHOP) | changes


def bad(check, row, field, *words, **settings):
    """A bad row after eleven good ones is named with file, line, field and task."""
    with pytest.raises(DataError) as caught:
        check(*(good(n) for n in range(11)), row | {"id": "late"}, **settings)
    error = caught.value
    assert error.file.endswith("rows.jsonl")
    assert (error.line, error.field) == (12, field)
    assert "task late: " in error.problem
    for word in words:
        assert word in error.problem


def test_good_rows_pass(check):
    _, found = check(*(good(n) for n in range(5)))
    assert (found.rows, found.traces, dict(found.errors)) == (5, 5, {})
    assert 0 < found.prompt < found.trace < 1000


WITHOUT_SYSTEM = CHATML_HERMES.replace("messages[0].content if messages[0].role == 'system'", "''")
REFUSES = "{% for m in messages %}{% if 'tabu' in m.content %}{{ raise_exception('no tabu') }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("changes", "field", "word", "template"),
    [
        ({"prompt": "How warm? " * 300}, "prompt", "max_prompt_length=500", CHATML_HERMES),
        ({"env_args": {}}, "env_args", "no 'codes'", CHATML_HERMES),
        ({"env_args": {"codes": {"wether": "def wether(): ..."}}}, "tools", "did you mean 'wether'?", CHATML_HERMES),
        ({"env_args": {"codes": {"weather": ""}}}, "env_args", "Python source", CHATML_HERMES),
        ({"env_args": TOOLHOP | {"scoring": "toolhp"}}, "env_args", "did you mean 'toolhop'?", CHATML_HERMES),
        ({"env_args": {"codes": {"weather": "async def weather(city): ..."}}}, "env_args", "is async", CHATML_HERMES),
        ({"env_args": {"codes": {"weather": "def wether(city): ..."}}}, "env_args", "does not define", CHATML_HERMES),
        (
            {"tools": [{"name": "get-it"}], "expert_trace": None, "env_args": {"codes": {"get-it": "def get(): ..."}}},
            "env_args",
            "no Python name",
            CHATML_HERMES,
        ),
        ({"answer": None}, "answer", "'toolhop' compares with the answer", CHATML_HERMES),
        ({"answer": " , "}, "answer", "'toolhop' compares with the answer", CHATML_HERMES),
        ({"env_args": FTRL}, "env_args", "unsolved_set is empty", CHATML_HERMES),
        ({"env_args": FTRL | {"unsolved_set": {"weather": [""]}}}, "env_args", "none of them empty", CHATML_HERMES),
        ({"prompt": "tabu"}, "prompt", "cannot render", REFUSES + CHATML_HERMES),
        ({"prompt": [SYSTEM, *QUESTION]}, "prompt", "does not show the content of this 'system'", WITHOUT_SYSTEM),
        ({"prompt": QUESTION, "system": "a"}, "prompt", "does not show the content of this 'system'", WITHOUT_SYSTEM),
        (
            {"prompt": [{"role": "developer", "content": "Be brief."}, *QUESTION]},
            "prompt",
            "does not show the content of this 'system'",
            WITHOUT_SYSTEM,
        ),
    ],
)  # fmt: skip
def test_a_late_bad_row_is_found_before_the_first_step(check, changes, field, word, template):
    bad(check, good() | changes, field, word, template=template)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        ({"name": "weather"}, "missing required argument 'city'"),
        ({"name": "weather", "arguments": {"city": 7}}, "must be string, not integer"),
        ({"name": "weather", "arguments": {"town": "Oslo"}}, "missing required argument 'city'"),
    ],
)
def test_expert_calls_must_fit_the_tools(check, call, word):
    row = traced({"function": call}, answer="7", env_args=TOOLHOP)
    bad(check, row, "expert_trace", word)
    row["expert_trace"][1] = {"role": "tool", "content": '{"error": "no city"}'}
    check(row)  # an expert may show a mistake and its result


@pytest.mark.parametrize(
    "algorithm",
    [
        {},
        {"trace": {"rendering": "turns"}},
        {"trace": {"rendering": "hint"}},
        {"name": "sft"},
    ],
)
def test_a_trace_must_fit_the_window(check, algorithm):
    row = good()
    row["expert_trace"][1] = {"role": "tool", "content": "7 degrees\n" * 400}
    bad(check, row, "expert_trace", "model's window of 700", window=700, algorithm=algorithm)
    check(row, window=700, algorithm={"name": "grpo"})  # which does not train on traces
    check(row, window=40_000, algorithm=algorithm)


def test_the_rollout_counts_where_there_is_one(check):
    row = good()
    row["expert_trace"][1] = {"role": "tool", "content": "7 degrees\n" * 20}
    for name in ("pact", "sft"):
        size = check(row, algorithm={"name": name})[1].trace + (100 if name == "pact" else 0)
        how = {"algorithm": {"name": name}, "rollout": {"max_prompt_length": 160}}
        check(row, window=size, **how)
        bad(check, row, "expert_trace", f"are {size:,}", window=size - 1, **how)


OWN_ENVIRONMENT = """
from pact_fast.errors import DataError, PactError


class Own:
    blocking, tools = False, []
    reset = call = reward = None

    @classmethod
    def check_task(cls, task):
        task.prompt.clear()
        if not task.env_args.get("city"):
            raise {error}
"""


@pytest.mark.parametrize(
    ("error", "field"),
    [
        ("DataError('no city; give one', field='env_args')", "env_args"),
        ("PactError(f'task {task.id}: no city; give one')", ""),
    ],
)
def test_an_environment_of_the_users_checks_every_row(check, tmp_path, error, field):
    (tmp_path / "own.py").write_text(OWN_ENVIRONMENT.replace("{error}", error))
    env = {"name": f"{tmp_path / 'own.py'}:Own"}
    rows = [good(n, env_args={"city": "Oslo"}) for n in range(11)]
    with pytest.raises(DataError) as caught:
        check(*rows, good(env_args={}, id="late"), env=env)
    assert (caught.value.line, caught.value.field) == (12, field)
    assert caught.value.problem == "task late: no city; give one"
    tasks, _ = check(*rows, env=env)
    assert all(task.prompt for task in tasks)  # it got copies


def test_a_tool_without_a_source_is_refused_in_every_format(tmp_path):
    from tests.support.data_rows import toolhop_row

    row = toolhop_row()
    row["functions"] = row["functions"][:1]
    path = tmp_path / "toolhop.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (task,) = read_tasks(path)
    with pytest.raises(DataError, match="task toolhop-41: the tool 'digits' has no source"):
        PythonTools.check_task(task)


def test_sft_needs_a_trace_in_every_row(check):
    row = good()
    del row["expert_trace"]
    bad(check, row, "expert_trace", "needs an expert trace", algorithm={"name": "sft"})


@pytest.mark.parametrize("block", ["<think>\\n\\n</think>\\n\\n", "<think></think>", "<think> </think>\\n"])
def test_reasoning_after_a_closed_think_block(check, block):
    closed = CHATML_HERMES.replace("'<|im_start|>assistant\\n' if add", f"'<|im_start|>assistant\\n{block}' if add")
    assert closed != CHATML_HERMES
    row = good(expert_trace=[{**TRACE[0]}, *TRACE[1:]])
    with pytest.raises(PactError, match=r"has closed <think> already.*set model\.chat_template"):
        check(row, template=closed)
    check(good(expert_trace=[{"role": "assistant", "tool_calls": [CALL]}, *TRACE[1:]]), template=closed)
    check(row, template=closed, algorithm={"name": "grpo"})


def test_bad_rows_are_skipped_and_listed(check, tmp_path):
    rows = [good(0), good(1, prompt="x " * 900), {"prompt": ""}, good(2), good(3, env_args={})]
    tasks, found = check(*rows, on_bad_row="skip")
    tasks.skip(found.errors)
    assert [task.id for task in tasks] == ["r0", "r2"]
    note = write_skipped(tasks.skipped, tmp_path)
    assert note.startswith("skipped 3 rows")
    listed = [json.loads(line) for line in (tmp_path / "skipped_rows.jsonl").read_text().splitlines()]
    assert [(line["line"], line["field"]) for line in listed] == [(3, "prompt"), (2, "prompt"), (5, "env_args")]
    assert all(line["problem"] and line["file"].endswith("rows.jsonl") for line in listed)
    assert write_skipped([], tmp_path) is None
    assert not (tmp_path / "skipped_rows.jsonl").exists()


def test_no_usable_row_is_an_error(check):
    with pytest.raises(DataError, match="none of its 2 rows"):
        check({"prompt": ""}, {"prompt": "  "}, on_bad_row="skip")
    tasks, found = check(good(0, env_args={}), good(1, env_args={}), on_bad_row="skip")
    with pytest.raises(DataError, match=r"none of its 2 tasks can be used; the first: .*rows\.jsonl:1"):
        tasks.skip(found.errors)


def test_ids_of_rows_do_not_depend_on_skipped_ones(check):
    tasks, _ = check({"prompt": ""}, {"prompt": "a", "env_args": TOOLHOP, "answer": "7"}, on_bad_row="skip")
    assert [task.id for task in tasks] == ["rows-1"]


@pytest.mark.slow
def test_doctor_says_that_all_expert_calls_fail(tmp_path, capfd):
    from pact_fast.cli.main import main
    from tests.support.models import TINY

    def report(*sources):
        rows = [good(n, env_args=TOOLHOP | {"codes": {"weather": source}}) for n, source in enumerate(sources)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = {
            "model": {"random_init": TINY},
            "data": {"train": str(tmp_path / "rows.jsonl")},
            "rollout": {"max_completion_length": 24, "max_prompt_length": 600},
            "trainer": {"prompts_per_step": 2},
            "output_dir": str(tmp_path / "run"),
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        return main(["doctor", str(tmp_path / "recipe.yaml")]), capfd.readouterr().out

    fails, works = "def weather(city): return {}[city]", CODES["weather"]
    status, text = report(fails, fails)
    assert status == 1
    assert (
        "FAIL  environment: all 2 expert calls of the first tasks return an error, for example weather of task" in text
    )
    assert "KeyError" in text
    status, text = report(fails, works)
    assert status == 0
    assert "warn  environment: 1 of 2 expert calls return an error" in text
    assert report(works, works)[0] == 0


@pytest.mark.slow
def test_a_run_skips_bad_rows_and_resumes_without_them(tmp_path, capfd):
    from pact_fast.cli.main import main
    from tests.support.models import TINY

    path = tmp_path / "rows.jsonl"
    rows = [good(0), {"prompt": ""}, good(1), good(2, prompt="How warm? " * 900), good(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model": {"random_init": TINY},
        "data": {"train": str(path)},
        "rollout": {"num_generations": 2, "max_turn_tokens": 8, "max_completion_length": 24, "max_prompt_length": 600},
        "trainer": {"max_steps": 1, "prompts_per_step": 2, "save_steps": 1},
        "threads": 1,
        "output_dir": str(tmp_path / "run"),
        "resume": "auto",
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    train = ["train", str(tmp_path / "recipe.yaml")]
    assert main(train) == 2
    error = capfd.readouterr().err
    assert "rows.jsonl:2: field 'prompt'" in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert main([*train, "data.on_bad_row=skip"]) == 0
    assert "skipped 2 rows" in capfd.readouterr().err
    listed = (tmp_path / "run" / "skipped_rows.jsonl").read_text()
    assert [json.loads(line)["line"] for line in listed.splitlines()] == [2, 4]
    assert main([*train, "data.on_bad_row=skip", "trainer.max_steps=2"]) == 0
    assert (tmp_path / "run" / "skipped_rows.jsonl").read_text() == listed
    assert main(["doctor", train[1], "data.on_bad_row=skip"]) == 0
    report = capfd.readouterr().out
    assert "ok    rows: 4 rows checked" in report
    assert "warn  rows: 2 rows cannot be used and are skipped" in report
    assert main(["doctor", train[1]]) == 1
