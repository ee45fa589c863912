"""Which tasks a step gets from files."""

import json
from itertools import chain

import pytest

from pact_fast.config import DataConfig
from pact_fast.data.sources import FileTasks
from pact_fast.errors import DataError

TRACE = [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, {"role": "tool", "content": "1"}]


@pytest.fixture
def write(tmp_path):
    def write(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def train(write):
    return write("train.jsonl", *({"id": f"t{n}", "prompt": f"{n}?"} for n in range(7)))


def ids(tasks):
    return [task.id for task in tasks]


def test_every_epoch_has_all_tasks_in_its_own_order(train):
    source = FileTasks(DataConfig(train=train), 0, [])
    epochs = [ids(source.train(epoch, 7)) for epoch in range(3)]
    assert all(sorted(epoch) == [f"t{n}" for n in range(7)] for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert epochs[0] != ids(FileTasks(DataConfig(train=train), 1, []).train(0, 7))


def test_a_step_is_a_function_of_its_number_also_across_epochs(train):
    source = FileTasks(DataConfig(train=train), 0, [])
    steps = [ids(source.train(step, 5)) for step in range(5)]
    epochs = [ids(source.train(epoch, 7)) for epoch in range(4)]
    assert list(chain.from_iterable(steps)) == list(chain.from_iterable(epochs))[:25]
    for step in (4, 0, 3, 1):  # as a resumed run, and one that looks back
        assert ids(FileTasks(DataConfig(train=train), 0, []).train(step, 5)) == steps[step]
        assert ids(source.train(step, 5)) == steps[step]


def test_without_shuffling_tasks_come_in_file_order(train):
    source = FileTasks(DataConfig(train=train, shuffle=False), 0, [])
    assert ids(source.train(1, 5)) == ["t5", "t6", "t0", "t1", "t2"]


def test_held_out_tasks_are_the_first_of_their_file(train):
    source = FileTasks(DataConfig(train=train, eval=train, max_rows=4), 0, [])
    assert ids(source.held_out(2)) == ["t0", "t1"] and ids(source.held_out(9)) == ["t0", "t1", "t2", "t3"]
    assert FileTasks(DataConfig(train=train), 0, []).held_out(3) == []
    assert len(list(source)) == 8


def test_traces_join_by_id_and_those_of_rows_that_were_not_read_are_no_error(train, write):
    expert = write("expert.jsonl", *({"id": name, "expert_trace": TRACE} for name in ("t1", "t6")))
    source = FileTasks(DataConfig(train=train, expert=expert, max_rows=3), 0, [])
    assert ids(task for task in source if task.expert) == ["t1"]
    wrong = write("wrong.jsonl", {"id": "t9", "expert_trace": TRACE})
    with pytest.raises(DataError, match="no task has the id 't9'"):
        FileTasks(DataConfig(train=train, expert=wrong), 0, [])


def test_the_format_of_prompts_is_of_training_and_held_out_rows(train, write):
    asked = write("asked.jsonl", {"id": "a", "prompt": "Give <answer>x</answer>."})
    source = FileTasks(DataConfig(train=train, eval=asked, prompt_format="matchtir"), 0, [])
    first, *_, last = [task.prompt[-1]["content"] for task in source]
    assert first.endswith("\n\n0?") and "between <answer> and </answer>" in first
    assert last == "Give <answer>x</answer>."  # asks for the tags itself
    plain = FileTasks(DataConfig(train=train), 0, [])
    assert next(iter(plain)).prompt[-1]["content"] == "0?"
