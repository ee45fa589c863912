"""Any content of a file gives a task, or a DataError that names file, line and field; never another exception."""

import copy
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pact_fast.data.readers import attach_traces, read_tasks, read_traces, write_tasks
from pact_fast.errors import DataError
from tests.support.data_rows import CALL, QUESTION, TRACE, WEATHER, toolhop_row

ROWS = 100  # of each kind
VALID = {
    "pact": {
        "id": "a",
        "prompt": [{"role": "system", "content": "s"}, *QUESTION],
        "tools": [WEATHER],
        "expert_trace": TRACE,
        "reference_calls": [CALL, {"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
        "answer": "7",
        "env": "lookup_chain",
        "env_args": {"hops": 2},
        "info": '{"level": 3}',
    },
    "conversation": {"messages": [*QUESTION, *TRACE], "tools": json.dumps([WEATHER]), "privileged_context": "text"},
    "verl": {
        "data_source": "d",
        "prompt": QUESTION,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "7"},
        "extra_info": {"index": 0, "tools_kwargs": {}},
    },
    "ftrl": {
        "messages": QUESTION,
        "tools": [WEATHER],
        "codes": {"weather": "def weather(city): return 7"},
        "unsolved_set": {"weather": ["7"]},
        "answer": "7",
    },
    "toolhop": toolhop_row(),
}
FORMAT = {"conversation": "pact"}
JUNK = [
    None, True, 0, -1, 1.5, float("nan"), 10**40, "", " ", "x", "\n", "\0", "[", "{}", "[]", "null", "[1]", '"x"',
    "9" * 5000,
    r'"\ud800"', r'["\ud800"]', '{"a": NaN}', "role", [], {}, [None], [[]], [{}], {"": None}, {"role": "assistant"},
    {"role": "tool", "content": None}, {"name": 1}, {"function": 3}, {"type": "function", "function": {"name": ""}},
    "[" * 5000, "ü" * 1000, {"content": [{"text": 3}]}, {"arguments": "{"}, [[[[[[]]]]]],
]  # fmt: skip


def places(value, path=()):
    """All paths into a value, the value itself left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutate(row, rng):
    """A copy with one to three values replaced, removed, doubled, swapped or turned into JSON text."""
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        spots = list(places(row))
        if not spots:
            break
        *path, key = rng.choice(spots)
        parent = row
        for step in path:
            parent = parent[step]
        match rng.randrange(6):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, list):
                parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(rng.choice(parent)))
            case 2:
                *_, other = rng.choice(spots)
                if isinstance(parent, dict):
                    parent[str(other)] = parent.pop(key)
            case 3:
                parent[key] = json.dumps(parent[key])
            case _:
                parent[key] = copy.deepcopy(rng.choice(JUNK))
    return row


def check(path, line, has_field=True, **kwargs):
    """True if the file was read; False if it was refused as it should be."""
    try:
        tasks = read_tasks(path, **kwargs)
    except DataError as error:
        text = str(error)
        assert error.file == str(path) and error.line == line, text
        assert error.field or not has_field, text
        assert "\n" not in text and len(text) < 700, text
        return False
    # A task that was accepted is sound: its messages are text, its calls are parsed, and it can be written.
    for task in tasks:
        assert task.prompt[-1]["role"] == "user" and task.prompt[-1]["content"].strip()
        assert all(isinstance(message["content"], str) for message in task.prompt)
        assert all(isinstance(tool["function"]["name"], str) for tool in task.tools)
        assert all(isinstance(call.arguments, dict) for call in task.reference_calls or [])
    write_tasks(path.with_suffix(".out"), tasks)
    return True


@pytest.mark.parametrize("name", VALID)
def test_mutated_rows(tmp_path, name):
    rng = random.Random(name)
    path = tmp_path / "fuzz.jsonl"
    accepted = 0
    for _ in range(ROWS):
        row = mutate(VALID[name], rng)
        path.write_text("\n" + json.dumps(row), encoding="utf-8")
        accepted += check(path, 2, format=FORMAT.get(name, name))
        check(path, 2)  # recognition must hold out too
    assert 0.1 * ROWS < accepted < 0.9 * ROWS  # neither all refused nor all let through


@pytest.mark.parametrize("name", VALID)
def test_mutated_bytes(tmp_path, name):
    rng = random.Random(name)
    path = tmp_path / "fuzz.jsonl"
    text = json.dumps(VALID[name]).encode()
    accepted = 0
    for _ in range(ROWS):
        data = bytearray(text)
        for _ in range(rng.randint(1, 3)):
            start = rng.randrange(1, len(data))  # a first byte "[" would make it an array, which has no lines
            data[start : start + rng.randrange(3)] = rng.randbytes(rng.randrange(3)).replace(b"\n", b"")
        path.write_bytes(b"\n\n" + data)
        accepted += check(path, 3, has_field=False)
    assert accepted < ROWS


def test_mutated_trace_files(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "fuzz.jsonl"
    for _ in range(ROWS):
        path.write_text(json.dumps(mutate({"id": "a", "expert_trace": TRACE}, rng)), encoding="utf-8")
        try:
            traces = read_traces(path)
        except DataError as error:
            assert error.file == str(path) and error.line == 1 and error.field
            continue
        path.write_text(json.dumps({"id": next(iter(traces)), "prompt": "q"}), encoding="utf-8")
        assert attach_traces(read_tasks(path), traces) == 1


def test_mutated_parquet_rows(tmp_path):
    """Columns as JSON text or as structs, whichever Arrow can hold."""
    rng = random.Random(0)
    path = tmp_path / "fuzz.parquet"
    for i in range(ROWS):
        name = rng.choice(list(VALID))
        row = mutate(VALID[name], rng)
        if i % 2:
            row = {key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in row.items()}
        try:
            pq.write_table(pa.Table.from_pylist([row]), path)
        except (pa.ArrowException, OverflowError):
            continue
        if row:
            check(path, 1)


def test_mutated_parquet_bytes(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "fuzz.parquet"
    pq.write_table(
        pa.table({"prompt": ["a", "b"] * 50, "tools": [json.dumps([WEATHER])] * 100}), path, compression="none"
    )
    data = path.read_bytes()
    for _ in range(ROWS):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(4, len(data))] = rng.randrange(256)
        path.write_bytes(broken[: rng.choice([len(data), len(data), rng.randrange(4, len(data))])])
        try:
            read_tasks(path)
        except DataError as error:
            assert error.file == str(path)
            assert "\n" not in str(error)
