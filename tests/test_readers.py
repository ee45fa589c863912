"""Task files become tasks, and a row that cannot says where and why."""

import enum
import gc
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pact_fast.data.readers import attach_traces, read_tasks, read_traces, tool_schema, write_tasks
from pact_fast.data.types import ExpertTrace, ExpertTurn, Task, ToolCall
from pact_fast.errors import DataError, PactError
from tests.support.data_rows import CALL, PARAMETERS, QUESTION, TRACE, WEATHER, toolhop_row

EXPERT = ExpertTrace((ExpertTurn("Look it up.", (ToolCall("weather", {"city": "Oslo"}),), ("7",)),), "7 degrees")


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def raw(tmp_path):
    def write(data, name="train.jsonl"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def problem(path, **kwargs):
    """The DataError of a file; always one bounded line."""
    with pytest.raises(DataError) as caught:
        read_tasks(path, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600, text
    assert str(path) in text
    return caught.value


# --- our columns, TRL's, verifiers' ---


def test_a_full_row_becomes_a_task(jsonl):
    row = {
        "id": "t1",
        "prompt": QUESTION,
        "tools": [WEATHER],
        "expert_trace": TRACE,
        "reference_calls": [CALL, {"name": "weather", "arguments": '{"city": "Rome"}'}],
        "answer": 7,
        "env": "lookup_chain",
        "env_args": {"hops": 2},
        "difficulty": 3,
        "note": None,
    }
    assert read_tasks(jsonl(row)) == [
        Task(
            id="t1",
            prompt=QUESTION,
            tools=[WEATHER],
            expert=EXPERT,
            reference_calls=[ToolCall("weather", {"city": "Oslo"}), ToolCall("weather", {"city": "Rome"})],
            answer="7",
            env="lookup_chain",
            env_args={"hops": 2},
            columns={"difficulty": 3, "note": None},
        )
    ]


def test_text_prompt_is_a_user_message_and_ids_count_rows_not_lines(raw):
    path = raw(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b", "id": 17}\r\n{"prompt": "c"}')
    tasks = read_tasks(path)
    assert [task.id for task in tasks] == ["train-0", "17", "train-2"]
    assert tasks[2].prompt == [{"role": "user", "content": "c"}]


@pytest.mark.parametrize("field", ["expert_trace", "trace", "demo", "privileged_context"])
def test_trace_column_names(jsonl, field):
    (task,) = read_tasks(jsonl({"prompt": QUESTION, "tools": [WEATHER], field: TRACE}))
    assert task.expert == EXPERT
    assert task.reference_calls == EXPERT.calls  # the default
    assert task.columns == {}


def test_messages_split_into_prompt_and_trace(jsonl):
    system = {"role": "system", "content": "Use tools."}
    (task,) = read_tasks(jsonl({"messages": [system, *QUESTION, *TRACE], "tools": [WEATHER]}))
    assert task.prompt == [system, *QUESTION]
    assert task.expert == EXPERT


def test_a_prompt_may_hold_earlier_turns(jsonl):
    history = [*QUESTION, *TRACE, {"role": "user", "content": "And Rome?"}]
    (task,) = read_tasks(jsonl({"prompt": history}))
    assert [message["role"] for message in task.prompt] == ["user", "assistant", "tool", "assistant", "user"]
    assert task.expert is None


def test_plain_privileged_context_stays_a_column(jsonl):
    for context in ("The answer is 7.", [{"role": "user", "content": "The answer is 7."}]):
        (task,) = read_tasks(jsonl({"prompt": "q", "privileged_context": context}))
        assert task.expert is None
        assert task.columns == {"privileged_context": context}


def test_json_text_is_read_where_parquet_users_write_it(jsonl):
    row = {
        "messages": json.dumps(QUESTION),
        "tools": json.dumps([WEATHER]),
        "expert_trace": json.dumps(TRACE),
        "reference_calls": json.dumps([CALL]),
        "env_args": json.dumps({"hops": 2}),
    }
    (task,) = read_tasks(jsonl(row))
    assert (task.tools, task.expert, task.env_args) == ([WEATHER], EXPERT, {"hops": 2})
    assert task.reference_calls == EXPERT.calls


def test_bare_tool_schemas_are_wrapped(jsonl):
    bare = {"type": "function", "name": "weather", "description": "d", "parameters": PARAMETERS}
    without_parameters = {"name": "now"}
    (task,) = read_tasks(jsonl({"prompt": "q", "tools": [bare, without_parameters]}))
    empty = {"name": "now", "parameters": {"type": "object", "properties": {}}}
    assert task.tools == [WEATHER, {"type": "function", "function": empty}]


def test_content_parts_are_joined(jsonl):
    parts = [{"type": "text", "text": "How warm "}, {"type": "text", "text": "is Oslo?"}]
    (task,) = read_tasks(jsonl({"prompt": [{"role": "user", "content": parts}]}))
    assert task.prompt == QUESTION


def test_null_entries_of_messages_are_left_out(jsonl):
    """A chat template that asks whether `tool_calls` is there must not find a null."""
    message = {"role": "user", "content": "How warm is Oslo?", "tool_calls": None, "name": None}
    (task,) = read_tasks(jsonl({"prompt": [message]}))
    assert task.prompt == QUESTION


def test_verifiers_rows(jsonl):
    tasks = read_tasks(
        jsonl(
            {"prompt": QUESTION, "answer": "7", "info": '{"level": 3}', "question": "kept"},
            {"question": "2+2?", "answer": "4", "info": {"level": 1}},
        )
    )
    assert tasks[0].columns == {"info": {"level": 3}, "question": "kept"}
    assert tasks[1].prompt == [{"role": "user", "content": "2+2?"}]
    assert [task.answer for task in tasks] == ["7", "4"]


def test_json_array_and_max_rows(raw):
    path = raw(b'\n [{"prompt": "a"}, {"prompt": "b"}, {"prompt": ""}]', name="data.json")
    assert [task.prompt[0]["content"] for task in read_tasks(path, max_rows=2)] == ["a", "b"]
    assert problem(path).line == 3


# --- verl, FTRL, ToolHop ---


def test_verl_parquet(tmp_path):
    rows = [
        {
            "data_source": "gsm8k",
            "prompt": QUESTION,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": {"index": i, "tools_kwargs": {"calc": {"create_kwargs": {"ground_truth": truth}}}},
        }
        for i, truth in enumerate(["7", "8"])
    ]
    path = tmp_path / "gsm8k.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    tasks = read_tasks(path)
    assert [task.id for task in tasks] == ["gsm8k-0", "gsm8k-1"]
    assert [task.answer for task in tasks] == ["7", "8"]
    assert tasks[1].prompt == QUESTION
    assert tasks[1].columns == {key: value for key, value in rows[1].items() if key != "prompt"}


def test_verl_ground_truth_of_another_shape_stays_a_column(jsonl):
    reward_model = {"style": "rule", "ground_truth": {"target": ["a", "b"]}}
    (task,) = read_tasks(jsonl({"prompt": QUESTION, "reward_model": reward_model}))
    assert task.answer is None
    assert task.columns["reward_model"] == reward_model


def test_ftrl_file():
    folder = os.environ.get("PACT_TEST_DATA")
    if not folder:
        pytest.skip("set PACT_TEST_DATA to a folder with ftrl/test.parquet")
    path = Path(folder) / "ftrl" / "test.parquet"
    rows = pq.read_table(path).to_pylist()
    tasks = read_tasks(path)
    assert len(tasks) == len(rows) == 100
    for i, (task, row) in enumerate(zip(tasks, rows, strict=True)):
        assert task.id == f"ftrl-{i}"
        assert task.prompt == row["messages"]
        assert task.tools == json.loads(row["tools"])
        assert task.env == "python_tools"
        assert task.env_args["codes"] == json.loads(row["codes"])
        assert task.env_args["unsolved_set"] == json.loads(row["unsolved_set"])
        assert task.env_args["scoring"] == "ftrl"
        assert task.answer == row["answer"]
        assert task.columns == {name: row[name] for name in ("solve_rate", "data_source", "split")}


def test_toolhop_functions_are_keyed_by_name_and_the_last_of_a_name_counts(raw):
    row = toolhop_row()
    unnumbered = {key: value for key, value in row.items() if key != "id"}
    tasks = read_tasks(raw(json.dumps([row, unnumbered]).encode(), name="ToolHop.json"))
    task = tasks[0]
    assert [t.id for t in tasks] == ["toolhop-41", "toolhop-1"]
    assert task.prompt == [{"role": "user", "content": "Sum of digits?"}]
    assert [(t["function"]["name"], t["function"]["description"]) for t in task.tools] == [
        ("who", "later"),
        ("digits", "d"),
    ]
    assert task.env_args == {"codes": {"who": row["functions"][2], "digits": row["functions"][1]}, "scoring": "toolhop"}
    assert task.env == "python_tools"
    assert task.answer == "15"
    assert task.columns == {"sub_task": row["sub_task"], "domain": "History"}


# --- parquet ---


def test_parquet_rows_lose_the_keys_that_only_other_rows_have(tmp_path):
    """Arrow gives every struct the union of all keys; a null argument is not part of the call."""
    rome = {"name": "pollen", "arguments": {"place": "Rome"}}
    trace = [
        {"role": "assistant", "content": None, "tool_calls": [{"function": rome}]},
        {"role": "tool", "content": "3"},
    ]
    rows = [{"prompt": QUESTION, "expert_trace": TRACE}, {"prompt": QUESTION, "expert_trace": trace}]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)
    first, second = read_tasks(path)
    assert first.expert == EXPERT
    assert second.expert.calls == [ToolCall("pollen", {"place": "Rome"})]
    assert second.expert.answer is None


def test_parquet_errors_name_the_row(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"prompt": ["a"] * 600 + [" "], "__index_level_0__": range(601)}), path)
    error = problem(path)
    assert (error.line, error.field) == (601, "prompt")
    assert read_tasks(path, max_rows=1)[0].columns == {}


def test_parquet_text_that_is_not_utf8(tmp_path):
    offsets = pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0")
    broken = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"a\xff\xfe"))
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"prompt": broken}), path)
    error = problem(path)
    assert (error.line, error.field) == (2, "prompt")


def test_parquet_that_is_cut_off(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"prompt": ["a"]}), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a readable parquet file" in str(problem(path))
    path.write_bytes(b"version 1\n")
    assert "not a parquet file" in str(problem(path))


def test_parquet_with_two_columns_of_one_name(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), path)
    assert "not a readable parquet file" in str(problem(path))


def test_parquet_with_no_rows(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    assert "no rows" in str(problem(path))


# --- bad rows ---

UNCALLED = {"role": "tool", "content": "7"}
TURN = TRACE[0]
BAD_ROWS = {
    "empty prompt text": ({"prompt": "  "}, "prompt", "empty"),
    "empty prompt list": ({"prompt": []}, "prompt", "no system or user message"),
    "empty question": ({"prompt": [{"role": "user", "content": ""}]}, "prompt", "empty"),
    "prompt of a wrong type": ({"prompt": 5}, "prompt", "found a number"),
    "prompt and messages": ({"prompt": "a", "messages": QUESTION}, "messages", "keep one"),
    "prompt is null": ({"prompt": None}, "prompt", "missing"),
    "prompt ends with assistant": (
        {"prompt": [*QUESTION, {"role": "assistant", "content": "x"}]},
        "prompt",
        "ends with role 'assistant'",
    ),
    "system only": ({"prompt": [{"role": "system", "content": "x"}]}, "prompt", "ends with role 'system'"),
    "late system": ({"prompt": [*QUESTION, {"role": "system", "content": "x"}, *QUESTION]}, "prompt", "come first"),
    "stray tool message": ({"prompt": [UNCALLED, *QUESTION]}, "prompt", "must follow an assistant"),
    "unknown role": ({"prompt": [{"role": "human", "content": "x"}]}, "prompt", "'human'"),
    "no role": ({"prompt": [{"content": "x"}]}, "prompt", "role None"),
    "message is text": ({"prompt": ["hello"]}, "prompt", "message 0"),
    "content is a number": ({"prompt": [{"role": "user", "content": 5}]}, "prompt", "'content' must be text"),
    "image part": (
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]},
        "prompt",
        "only text parts",
    ),
    "NUL in text": ({"prompt": "a\0b"}, "prompt", "NUL"),
    "user with tool calls": (
        {"prompt": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
        "prompt",
        "only assis",
    ),
    "messages start with assistant": ({"messages": TRACE}, "messages", "no system or user message"),
    "messages with two questions": (
        {"messages": [*QUESTION, *TRACE, *QUESTION], "tools": [WEATHER]},
        "messages",
        "message 4: the last message is the user's",
    ),
    "messages text is not JSON": ({"messages": "hello"}, "messages", "not valid JSON"),
    "half a surrogate pair": ({"prompt": "a", "tools": r'[{"name": "\ud83d"}]'}, "tools", "surrogate"),
    "tools text is not JSON": ({"prompt": "a", "tools": "[{"}, "tools", "not valid JSON"),
    "tools is an object": ({"prompt": "a", "tools": WEATHER}, "tools", "found an object"),
    "tool without a name": ({"prompt": "a", "tools": [{"function": {"parameters": {}}}]}, "tools", "tool 0: 'name'"),
    "tool is text": ({"prompt": "a", "tools": ["weather"]}, "tools", "tool 0"),
    "same tool twice": ({"prompt": "a", "tools": [WEATHER, WEATHER]}, "tools", "two tools are named 'weather'"),
    "parameters is a list": ({"prompt": "a", "tools": [{"name": "x", "parameters": ["y"]}]}, "tools", "type 'object'"),
    "parameters of type array": (
        {"prompt": "a", "tools": [{"name": "x", "parameters": {"type": "array"}}]},
        "tools",
        "type 'object'",
    ),
    "properties is a list": (
        {"prompt": "a", "tools": [{"name": "x", "parameters": {"properties": []}}]},
        "tools",
        "properties",
    ),
    "description is a number": ({"prompt": "a", "tools": [{"name": "x", "description": 5}]}, "tools", "description"),
    "trace without an observation": ({"prompt": "a", "trace": [TURN]}, "trace", "1 tool calls but 0 tool messages"),
    "trace with an extra observation": (
        {"prompt": "a", "trace": [TURN, UNCALLED, UNCALLED]},
        "trace",
        "2 tool messages",
    ),
    "trace starts with user": ({"prompt": "a", "expert_trace": QUESTION}, "expert_trace", "found 'user'"),
    "trace answers another tool": (
        {"prompt": "a", "demo": [TURN, {"role": "tool", "name": "pollen", "content": "7"}]},
        "demo",
        "'pollen' where 'weather'",
    ),
    "trace answers an unknown id": (
        {
            "prompt": "a",
            "trace": [
                {"role": "assistant", "tool_calls": [{"id": "1", **CALL}, {"id": "2", **CALL}]},
                {"role": "tool", "tool_call_id": "2", "content": "7"},
                {"role": "tool", "tool_call_id": "3", "content": "7"},
            ],
        },
        "trace",
        "message 2 answers '3', which is the id of no call",
    ),
    "trace calls an unlisted tool": (
        {"prompt": "a", "tools": [{"name": "wether"}], "trace": TRACE},
        "trace",
        "did you mean 'wether'",
    ),
    "trace calls a tool and there is none": ({"prompt": "a", "tools": [], "trace": TRACE}, "trace", "not in 'tools'"),
    "trace arguments are not JSON": (
        {
            "prompt": "a",
            "trace": [{"role": "assistant", "tool_calls": [{"name": "x", "arguments": "{city}"}]}, UNCALLED],
        },
        "trace",
        "the arguments are not valid JSON",
    ),
    "trace arguments are a list": (
        {"prompt": "a", "trace": [{"role": "assistant", "tool_calls": [{"name": "x", "arguments": "[1]"}]}, UNCALLED]},
        "trace",
        "must be an object",
    ),
    "tool_calls is a number": (
        {"prompt": "a", "trace": [{"role": "assistant", "tool_calls": 3}]},
        "trace",
        "found a num",
    ),
    "reasoning is a list": (
        {"prompt": "a", "trace": [{"role": "assistant", "reasoning_content": ["x"]}]},
        "trace",
        "'reasoning_content' must be text",
    ),
    "two traces": ({"prompt": "a", "trace": TRACE, "privileged_context": TRACE}, "privileged_context", "keep one"),
    "reference calls is an object": ({"prompt": "a", "reference_calls": CALL}, "reference_calls", "found an object"),
    "reference call without a name": (
        {"prompt": "a", "reference_calls": [{"arguments": {}}]},
        "reference_calls",
        "call 0",
    ),
    "reference call to an unlisted tool": (
        {"prompt": "a", "tools": [], "reference_calls": [CALL]},
        "reference_calls",
        "not in 'tools'",
    ),
    "answer is a list": ({"prompt": "a", "answer": ["x"]}, "answer", "must be text"),
    "env is a number": ({"prompt": "a", "env": 3}, "env", "name of an environment"),
    "env_args is a list": ({"prompt": "a", "env_args": [1]}, "env_args", "found a list"),
    "id is empty": ({"prompt": "a", "id": ""}, "id", "non-empty"),
    "id is a fraction": ({"prompt": "a", "id": 1.5}, "id", "1.5"),
    "same id twice": ({"prompt": "a", "id": "ok-0"}, "id", "also the id of row 1"),
    "info is cut off": ({"prompt": "a", "info": '{"level": '}, "info", "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_names_line_and_field(jsonl, case):
    row, field, words = BAD_ROWS[case]
    error = problem(jsonl({"prompt": "fine", "id": "ok-0"}, row), format="pact")
    assert (error.line, error.field) == (2, field)
    assert words in error.problem


def drop(row, name):
    return {key: value for key, value in row.items() if key != name}


FTRL = {"messages": QUESTION, "tools": [WEATHER], "codes": {"weather": "def weather(city): ..."}, "answer": "7"}
VERL = {"prompt": QUESTION}
BAD_FORMAT_ROWS = {
    "codes missing": ("ftrl", drop(FTRL, "codes") | {"unsolved_set": {}}, "codes"),
    "code is a number": ("ftrl", FTRL | {"codes": {"weather": 5}, "unsolved_set": {}}, "codes"),
    "unsolved_set is cut off": ("ftrl", FTRL | {"unsolved_set": '{"weather": ['}, "unsolved_set"),
    "unsolved_set of numbers": ("ftrl", FTRL | {"unsolved_set": {"weather": [7]}}, "unsolved_set"),
    "verl without reward_model": ("verl", VERL, "reward_model"),
    "reward_model is text": ("verl", VERL | {"reward_model": "rule"}, "reward_model"),
    "tools is a list": ("toolhop", toolhop_row() | {"tools": [WEATHER]}, "tools"),
    "tool of a sub-question is text": ("toolhop", toolhop_row() | {"tools": {"Who?": "who"}}, "tools"),
    "functions is an object": ("toolhop", toolhop_row() | {"functions": {}}, "functions"),
    "question missing": ("toolhop", drop(toolhop_row(), "question"), "prompt"),
}


@pytest.mark.parametrize("case", BAD_FORMAT_ROWS)
def test_bad_row_of_another_format(jsonl, case):
    format, row, field = BAD_FORMAT_ROWS[case]
    error = problem(jsonl(row), format=format)
    assert (error.line, error.field) == (1, field)


def test_unknown_columns_and_formats(jsonl):
    error = problem(jsonl({"instruction": "a", "output": "b"}))
    assert "'instruction', 'output'" in error.problem and "'reward_model'" in error.problem
    with pytest.raises(PactError, match="did you mean 'toolhop'"):
        read_tasks(jsonl({"prompt": "a"}), format="tool_hop")


# --- bad files ---

BAD_FILES = {
    "not JSON": (b'{"prompt": "a"}\n{"prompt": }\n', 2, "not valid JSON"),
    "line is a list": (b'{"prompt": "a"}\n[1]\n', 2, "one JSON object"),
    "not UTF-8": (b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', 2, "not UTF-8"),
    "NUL bytes": (b'{"prompt": "a"}\n\0\0\0\n', 2, "NUL"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), 1, "UTF-8"),
    "deep nesting": (b'{"prompt": ' + b"[" * 100_000, 1, "not readable JSON"),
    "number of 5000 digits": (b'{"prompt": ' + b"9" * 5000 + b"}", 1, "not readable JSON"),
    "half a surrogate pair": (b'{"prompt": "\\ud83d"}', 1, "surrogate"),
    "array of numbers": (b"[1]", 1, "must be one JSON object"),
    "empty": (b"", None, "no rows"),
    "blank lines": (b"\n\r\n  \n", None, "no rows"),
    "empty array": (b"[]", None, "no rows"),
    "cut-off array": (b'[{"prompt": "a"}', None, "not valid JSON"),
    "gzip": (gzip.compress(b'{"prompt": "a"}'), None, "gzip-compressed; decompress"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(raw, case):
    data, line, words = BAD_FILES[case]
    error = problem(raw(data))
    assert error.line == line
    assert words in error.problem


def test_missing_file_and_folder(tmp_path, jsonl):
    assert "no such file" in problem(tmp_path / "none.jsonl").problem
    jsonl({"prompt": "a"})
    assert "folder; name a file in it, such as train.jsonl" in problem(tmp_path).problem


def test_a_hundred_megabyte_line_is_read(raw):
    path = raw(b'{"prompt": "' + b"x" * 100_000_000 + b'"}\n')
    (task,) = read_tasks(path)
    assert len(task.prompt[0]["content"]) == 100_000_000


def test_whole_emoji_escapes_are_fine(raw):
    (task,) = read_tasks(raw(rb'{"prompt": "\ud83d\ude00"}'))
    assert task.prompt[0]["content"] == "\U0001f600"


# --- traces in a file of their own ---


def test_traces_join_by_id(jsonl):
    tasks = read_tasks(jsonl({"id": "a", "prompt": "q", "tools": [WEATHER]}, {"id": "b", "prompt": "q"}))
    traces = read_traces(jsonl({"id": "a", "expert_trace": TRACE}, name="expert.jsonl"))
    assert attach_traces(tasks, traces) == 1
    assert tasks[0].expert == EXPERT and tasks[0].reference_calls == EXPERT.calls
    assert tasks[1].expert is None and tasks[1].reference_calls is None


def test_traces_replace_traces_but_not_reference_calls_of_the_row(jsonl):
    own = [{"name": "weather", "arguments": {"city": "Rome"}}]
    tasks = read_tasks(
        jsonl(
            {"id": "own", "prompt": "q", "trace": TRACE, "reference_calls": own},
            {"id": "default", "prompt": "q", "trace": TRACE},
        )
    )
    other = ExpertTrace((ExpertTurn("", (ToolCall("pollen", {}),), ("3",)),))
    attach_traces(tasks, {"own": other, "default": other})
    assert tasks[0].expert == tasks[1].expert == other
    assert tasks[0].reference_calls == [ToolCall("weather", {"city": "Rome"})]
    assert tasks[1].reference_calls == other.calls


def test_a_trace_that_fits_no_task_changes_nothing(jsonl):
    tasks = read_tasks(jsonl({"id": "task-1", "prompt": "q", "tools": [{"name": "pollen"}]}, {"prompt": "q"}))
    with pytest.raises(DataError, match=r"'tosk-1' of an expert trace; did you mean 'task-1'\?"):
        attach_traces(tasks, {"train-1": EXPERT, "tosk-1": EXPERT})
    with pytest.raises(DataError, match=r"task 'task-1'.*'weather', which is not in 'tools'"):
        attach_traces(tasks, {"train-1": EXPERT, "task-1": EXPERT})
    assert all(task.expert is None for task in tasks)


@pytest.mark.parametrize(
    ("row", "field"),
    [({"expert_trace": TRACE}, "id"), ({"id": "b"}, "expert_trace"), ({"id": "a", "expert_trace": TRACE}, "id")],
)
def test_bad_trace_rows(jsonl, row, field):
    with pytest.raises(DataError) as caught:
        read_traces(jsonl({"id": "a", "trace": TRACE}, row))
    assert (caught.value.line, caught.value.field) == (2, field)


# --- writing ---


def test_written_tasks_read_back_equal(jsonl, tmp_path):
    rows = [
        {
            "id": "é",
            "prompt": QUESTION,
            "tools": [WEATHER],
            "trace": TRACE,
            "answer": "7",
            "env_args": {"n": 1},
            "x": [1],
        },
        {"prompt": [*QUESTION, *TRACE, *QUESTION], "reference_calls": [], "env": "lookup_chain"},
        {"prompt": "q", "privileged_context": "text", "question": "other", "reward_model": {"ground_truth": "7"}},
    ]
    tasks = read_tasks(jsonl(*rows)) + read_tasks(jsonl(toolhop_row()))
    write_tasks(tmp_path / "out.jsonl", tasks)
    assert read_tasks(tmp_path / "out.jsonl", format="pact") == tasks


def test_an_environments_task_without_tools_reads_back(tmp_path):
    task = Task("t", QUESTION, expert=EXPERT, reference_calls=EXPERT.calls, env="lookup_chain")
    write_tasks(tmp_path / "out.jsonl", [task])
    assert read_tasks(tmp_path / "out.jsonl") == [task]


@pytest.mark.parametrize("columns", [{"x": object()}, {"x": "\ud83d"}, {"tools": "mine"}])
def test_tasks_that_cannot_be_written(tmp_path, columns):
    with pytest.raises(PactError, match="task 'bad'"):
        write_tasks(tmp_path / "out.jsonl", [Task("ok", QUESTION), Task("bad", QUESTION, columns=columns)])
    assert not (tmp_path / "out.jsonl").exists()


def test_writing_into_a_missing_folder(tmp_path):
    with pytest.raises(PactError, match="cannot write"):
        write_tasks(tmp_path / "none" / "out.jsonl", [Task("a", QUESTION)])


# --- Python functions as tools ---


class Unit(enum.Enum):
    C = "C"
    F = "F"


def test_schema_of_a_function(jsonl):
    def weather(city: str, days: int = 1, unit: Unit = Unit.C) -> str:
        """Temperature of a city.

        Args:
            city: Where.
            days: How many.
            unit: Scale.

        Returns:
            The temperature.
        """

    schema = tool_schema(weather)
    assert schema == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Temperature of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where."},
                    "days": {"type": "integer", "description": "How many."},
                    "unit": {"type": "string", "enum": ["C", "F"], "description": "Scale."},
                },
                "required": ["city"],
            },
        },
    }
    assert read_tasks(jsonl({"prompt": "q", "tools": [schema]}))[0].tools == [schema]


def test_functions_that_make_no_schema():
    def untyped(city):
        """Temperature.

        Args:
            city: Where.
        """

    def undocumented(city: str): ...

    for function in (untyped, undocumented):
        with pytest.raises(PactError, match=f"tool '{function.__name__}'") as caught:
            tool_schema(function)
        assert "\n" not in str(caught.value)


def test_garbage_collection_is_as_before_when_rows_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1}\n')
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            assert len(read_tasks(tmp_path / "a.jsonl")) == 1
            with pytest.raises(DataError):
                read_tasks(tmp_path / "bad.jsonl")
            assert gc.isenabled() == enabled
        finally:
            gc.enable()
