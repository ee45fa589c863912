"""Tasks of files with too many rows to hold: the same tasks, in the same order, read when they are drawn."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pact_fast.config import DataConfig
from pact_fast.data import drawn_tasks, line_index, parquet_index, row_cache, sources
from pact_fast.data.indexed_tasks import IndexedTasks
from pact_fast.data.line_index import LineRows
from pact_fast.data.parquet_index import ParquetRows
from pact_fast.data.readers import read_tasks
from pact_fast.data.row_cache import FileChanged
from pact_fast.data.row_files import file_rows
from pact_fast.data.sources import FileTasks
from pact_fast.errors import DataError, PactError
from pact_fast.train.unique_ids import UniqueIds
from tests.support.data_rows import QUESTION, TRACE, WEATHER, toolhop_row

ROW = {"prompt": QUESTION, "tools": [WEATHER], "expert_trace": TRACE, "answer": "7"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, and few rows that are already many."""
    monkeypatch.setattr(row_cache, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(sources, "HELD_ROWS", 3)
    return tmp_path / "cache"


def lines(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(path: Path, count: int, **more: object) -> str:
    return lines(path, *({"id": f"t{n}", "prompt": f"{n}?", **more} for n in range(count)))


def ids(tasks) -> list[str]:
    return [task.id for task in tasks]


def indexed(names, max_rows=None, format="auto") -> IndexedTasks:
    return IndexedTasks(names, format, max_rows, ["weather"], "row", False)


# an index gives the rows that reading the file gives


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("seed", range(6))
def test_lines_by_number_are_the_lines_in_their_order(chunk, seed, tmp_path, monkeypatch):
    """Blank lines of every kind, line ends of Windows, byte-order marks, NULs, damaged UTF-8, no newline at the end."""
    monkeypatch.setattr(line_index, "CHUNK", chunk)
    rng = random.Random(seed)
    pieces = [
        b'{"prompt": "a"}', '{"prompt": "Größe \u2028"}'.encode(), b"  {}  ", b"", b"   ", b"\r", b"\xef\xbb\xbf",
        b'\xef\xbb\xbf{"a": 1}', "\u3000".encode(), b'{"b": "\xff"}', b'{"c": "\0"}', b"{", b"17", b'{"d": [1]}\r', b"\x0c",
    ]  # fmt: skip
    text = b"\n".join(rng.choice(pieces) for _ in range(60)) + rng.choice([b"", b"\n", b"\n\n \n"])
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"first": 1}\n' + text)
    expected = [(line, str(row)) for line, row in file_rows(path)]
    rows = LineRows(path)
    assert [(line, str(row)) for line, row in map(rows.row, range(len(rows)))] == expected
    some = LineRows(path, 20)
    assert len(some) == 20 and [str(some.row(n)[1]) for n in range(20)] == [row for _, row in expected[:20]]
    damaged = {number for number, (_, row) in enumerate(expected) if "NUL" in row or "UTF-8" in row}
    assert damaged <= set(rows.suspects)


def test_suspects_are_rows_that_do_not_look_like_json_objects(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 1}\r\n\n{"cut": \n[1]\n{"b": "\xff"}\n{"c": "\0"}\n{"d": 1}')
    assert LineRows(path).suspects == [2, 3, 4, 5]


@pytest.mark.parametrize("limit", [None, 1, 33, 80, 300, 700])
def test_rows_of_a_parquet_file_by_number_are_its_rows_in_their_order(limit, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    count = 600
    columns = {
        "prompt": [f"{n}?" for n in range(count)],
        "tools": pa.array([json.dumps([WEATHER]) for _ in range(count)]).dictionary_encode(),
        "nested": [{"a": n, "b": [None, n]} if n % 3 else None for n in range(count)],
        "day": pa.array(range(count), pa.date32()),
        "__index_level_0__": list(range(count)),
    }
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=70)
    expected = list(file_rows(path))[:limit]
    rows = ParquetRows("rows.parquet", path, limit)
    assert [rows.row(n) for n in range(len(rows))] == expected
    assert rows.row(len(rows) - 1) == expected[-1]


SOURCES = {
    "one file": ["a.jsonl"],
    "two files of one name": ["a.jsonl", "b/a.jsonl"],
    "a pattern": ["*.jsonl"],
    "an array of another format beside lines": ["hop.json", "a.jsonl"],
    "parquet": ["a.parquet", "a.jsonl"],
}


@pytest.mark.parametrize("max_rows", [None, 3])
@pytest.mark.parametrize("names", SOURCES)
def test_tasks_are_those_that_reading_all_rows_gives(names, max_rows, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "b").mkdir()
    rows = [ROW | {"prompt": f"{n}?", "env": "weather" if n % 2 else None} for n in range(5)]
    lines(tmp_path / "a.jsonl", *rows)
    lines(tmp_path / "b" / "a.jsonl", *rows, ROW | {"id": "own"})
    lines(tmp_path / "c.jsonl", {"id": 7, "prompt": "c", "reward_model": {"ground_truth": "x"}})
    (tmp_path / "hop.json").write_text(json.dumps([toolhop_row(), toolhop_row() | {"id": 42}]))
    pq.write_table(
        pa.Table.from_pylist([{**row, "tools": json.dumps(row["tools"])} for row in rows]), tmp_path / "a.parquet"
    )
    given = [str(tmp_path / name) for name in SOURCES[names]]
    expected = read_tasks(given, max_rows=max_rows, environments=["weather", "python_tools"])
    found = IndexedTasks(given, "auto", max_rows, ["weather", "python_tools"], "row", False)
    assert list(found) == expected and [task.source for task in found] == [task.source for task in expected]
    assert len(found) == len(expected) and found[len(found) - 1] == expected[-1]
    with pytest.raises(IndexError):
        found[len(found)]


def test_errors_of_rows_are_those_of_reading_all_rows(tmp_path):
    """Line, field and words; the format of the file is that of its first row."""
    good, wrong = {"prompt": "a"}, [{"prompt": ""}, {"prompt": "b", "env": "nowhere"}, {"prompt": 3}, {"answer": "x"}]
    for row in wrong:
        path = lines(tmp_path / "rows.jsonl", good, row)
        with pytest.raises(DataError) as expected:
            read_tasks(path, environments=["weather"])
        with pytest.raises(DataError) as found:
            indexed(path)[1]
        assert str(found.value) == str(expected.value) and ":2: " in str(found.value)
    for content in (b"", b"\n \n"):
        (tmp_path / "rows.jsonl").write_bytes(content)
        with pytest.raises(DataError, match="holds no rows"):
            indexed(str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        indexed(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="no known format"):
        indexed(lines(tmp_path / "other.jsonl", {"x": 1}))
    with pytest.raises(PactError, match="unknown data format"):
        indexed(lines(tmp_path / "other.jsonl", {"x": 1}), format="pcat")


# which tasks a step gets


@pytest.mark.parametrize("shuffle", [True, False])
def test_steps_get_the_tasks_that_they_get_of_rows_that_are_held(shuffle, tmp_path, monkeypatch):
    data = DataConfig(
        train=numbered(tmp_path / "train.jsonl", 11), eval=numbered(tmp_path / "eval.jsonl", 5), shuffle=shuffle
    )
    drawn = FileTasks(data, 3, [])
    monkeypatch.setattr(sources, "HELD_ROWS", 100)
    held = FileTasks(data, 3, [])
    assert drawn.reads_when_drawn and not held.reads_when_drawn
    assert [drawn.train(step, 4) for step in range(9)] == [held.train(step, 4) for step in range(9)]
    assert drawn.held_out(2) == held.held_out(2) and drawn.held_out(9) == held.held_out(9)
    assert len(drawn) == len(held) == 16 and list(drawn) == list(held) == [drawn[n] for n in range(16)]
    assert drawn.sample() == held.sample() == list(range(16)) and drawn.training() == held.training()


def test_the_format_of_prompts_is_that_of_rows_that_are_held(tmp_path):
    data = DataConfig(train=numbered(tmp_path / "train.jsonl", 5), prompt_format="matchtir")
    assert "<answer>" in FileTasks(data, 0, []).train(0, 1)[0].prompt[-1]["content"]


def test_traces_of_another_file_need_rows_that_are_held(tmp_path):
    expert = lines(tmp_path / "expert.jsonl", {"id": "t3", "expert_trace": TRACE})
    tasks = FileTasks(DataConfig(train=numbered(tmp_path / "train.jsonl", 5), expert=expert), 0, [])
    assert not tasks.reads_when_drawn and [task.id for task in tasks if task.expert] == ["t3"]


def test_an_epochs_order_is_drawn_once(tmp_path, monkeypatch):
    """Also where steps look at another epoch in turns, as dynamic sampling does."""
    tasks = FileTasks(DataConfig(train=numbered(tmp_path / "train.jsonl", 8)), 0, [])
    made = []
    real = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or real(seed))
    for _ in range(3):
        tasks.train(0, 8), tasks.train(100, 8)
    assert made == [(0, 0), (0, 100)]


BAD = ({"prompt": ""}, {"prompt": "x", "env": "nowhere"}, {"id": "late", "prompt": "too long"})


def with_bad_rows(path: Path, count: int = 12) -> str:
    rows = [{"id": f"t{n}", "prompt": f"{n}?"} for n in range(count)]
    rows[4], rows[7], rows[9] = BAD
    return lines(path, *rows)


def check(task) -> None:
    if task.prompt[-1]["content"] == "too long":
        raise DataError("too long", file=task.source[0], line=task.source[1])


def nothing(task) -> None:
    pass


def test_a_bad_row_ends_the_run_when_it_is_drawn(tmp_path):
    tasks = FileTasks(DataConfig(train=with_bad_rows(tmp_path / "train.jsonl"), shuffle=False), 0, [])
    assert ids(tasks.train(0, 4)) == ["t0", "t1", "t2", "t3"]
    with pytest.raises(DataError, match=r"train.jsonl:5: field 'prompt'"):
        tasks.train(1, 4)
    assert ids(tasks.train(9, 1)) == ["late"]
    tasks.check_drawn(check, nothing)
    with pytest.raises(DataError, match=r"train.jsonl:10: too long"):
        tasks.train(9, 1)


def test_in_place_of_a_bad_row_the_same_other_row_is_drawn_whatever_was_drawn_before(tmp_path):
    data = DataConfig(train=with_bad_rows(tmp_path / "train.jsonl"), on_bad_row="skip")

    def made() -> FileTasks:
        tasks = FileTasks(data, 5, [])
        tasks.check_drawn(check, nothing)
        return tasks

    whole = made()
    steps = [ids(whole.train(step, 4)) for step in range(9)]  # three epochs
    good = {f"t{n}" for n in range(12)} - {"t4", "t7", "t9"}
    assert {name for step in steps for name in step} == good
    assert len(whole.skipped) == 3 and {error.line for error in whole.skipped} == {5, 8, 10}
    for step in (8, 0, 5):  # as another rank, or a run that is resumed
        assert ids(made().train(step, 4)) == steps[step]
    told = made()  # of bad rows that were found before the first step
    told.skip({9: DataError("too long"), 4: DataError("empty")})
    assert [ids(told.train(step, 4)) for step in range(9)] == steps
    held = DataConfig(train=data.train, eval=data.train, on_bad_row="skip")
    tasks = FileTasks(held, 5, [])
    tasks.check_drawn(check, nothing)
    assert ids(tasks.held_out(9)) == ids(tasks.held_out(20)) == sorted(good, key=lambda name: int(name[1:]))
    other = FileTasks(data.model_copy(update={"train": data.train}), 6, [])
    other.check_drawn(check, nothing)
    assert [ids(other.train(step, 4)) for step in range(9)] != steps


def test_rows_that_are_all_bad_are_an_error_and_no_endless_search(tmp_path, monkeypatch):
    monkeypatch.setattr(drawn_tasks, "MAX_REDRAWS", 20)
    path = lines(tmp_path / "rows.jsonl", *({"prompt": "too long"} for _ in range(9)))
    tasks = FileTasks(DataConfig(train=path, on_bad_row="skip"), 0, [])
    tasks.check_drawn(check, nothing)
    with pytest.raises(DataError, match="none of 20 rows drawn in its place can be used"):
        tasks.train(0, 1)
    (tmp_path / "rows.jsonl").write_text("x\n" * 9)
    with pytest.raises(DataError, match="none of 20 rows drawn"):
        FileTasks(DataConfig(train=path, on_bad_row="skip"), 0, []).train(0, 1)


def test_a_further_check_of_training_rows_is_never_a_reason_to_skip(tmp_path):
    tasks = FileTasks(DataConfig(train=with_bad_rows(tmp_path / "train.jsonl"), on_bad_row="skip"), 0, [])

    def refuse(task):
        raise PactError(f"task {task.id} has no success")

    tasks.check_drawn(check, refuse)
    with pytest.raises(PactError, match="has no success"):
        tasks.train(0, 1)


def test_the_sample_has_first_rows_rows_from_anywhere_and_suspects(tmp_path, monkeypatch):
    monkeypatch.setattr(drawn_tasks, "CHECKED_FIRST", 4)
    monkeypatch.setattr(drawn_tasks, "CHECKED_ANYWHERE", 6)
    path = tmp_path / "train.jsonl"
    numbered(path, 1000)
    with path.open("a") as file:
        file.write('{"id": "cut", "prompt": \n')
    tasks, again, other = (FileTasks(DataConfig(train=str(path)), seed, []) for seed in (0, 0, 1))
    sample = tasks.sample()
    assert sample[:4] == [0, 1, 2, 3] and sample[-1] == 1000 and 9 <= len(sample) <= 11
    assert again.sample() == sample != other.sample()


def test_an_id_that_occurs_twice_is_named(tmp_path):
    """Training and held-out rows may have the same ids."""
    rows = [{"id": name, "prompt": "?"} for name in "abcdbe"]
    path, other = lines(tmp_path / "rows.jsonl", *rows), lines(tmp_path / "other.jsonl", *rows[:4])
    for train, problem in ((path, r"rows.jsonl:5: field 'id': 'b' is also the id of row 2"), (other, None)):
        tasks = FileTasks(DataConfig(train=train, eval=other), 0, [])
        seen = UniqueIds(tasks)
        for position, task in enumerate(tasks):
            seen.see(position, task)
        with pytest.raises(DataError, match=problem) if problem else contextlib.nullcontext():
            seen.check()


# the cache


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("rows/*/*") if path.is_dir())


def test_an_index_is_made_once_and_a_changed_file_has_another(tmp_path, cache, monkeypatch):
    path = tmp_path / "train.jsonl"
    data = DataConfig(train=numbered(path, 9))
    first = FileTasks(data, 0, [])
    (made,) = entries(cache)
    write = line_index.write_index
    monkeypatch.setattr(line_index, "write_index", lambda *_: pytest.fail("made again"))
    assert FileTasks(data, 0, []).train(0, 9) == first.train(0, 9)
    assert entries(cache) == [made]
    monkeypatch.setattr(line_index, "write_index", write)
    numbered(path, 8)
    assert len(FileTasks(data, 0, [])) == 8
    assert len(entries(cache)) == 1 and entries(cache) != [made]
    with pytest.raises(FileChanged, match="has changed since the run began"):
        first.train(0, 1)


def test_a_file_that_changes_is_no_row_to_skip(tmp_path):
    path = tmp_path / "train.jsonl"
    tasks = FileTasks(DataConfig(train=numbered(path, 9), on_bad_row="skip"), 0, [])
    numbered(path, 7)
    with pytest.raises(FileChanged):
        tasks.train(0, 1)
    path.unlink()
    with pytest.raises(PactError, match="cannot read"):
        tasks.train(0, 1)


def test_a_file_that_changes_while_it_is_indexed_is_an_error(tmp_path, cache, monkeypatch):
    path = tmp_path / "train.jsonl"
    numbered(path, 9)
    write = line_index.write_index

    def slow(*arguments):
        write(*arguments)
        numbered(path, 8)

    monkeypatch.setattr(line_index, "write_index", slow)
    with pytest.raises(FileChanged):
        FileTasks(DataConfig(train=str(path)), 0, [])
    assert not entries(cache)


def test_what_a_killed_process_left_is_removed(tmp_path, cache):
    path = numbered(tmp_path / "train.jsonl", 9)
    FileTasks(DataConfig(train=path), 0, [])
    (made,) = entries(cache)
    (made.parent / ".abc.tmp").mkdir()
    numbered(tmp_path / "train.jsonl", 8)
    FileTasks(DataConfig(train=path), 0, [])
    assert len(entries(cache)) == 1


def test_one_process_makes_an_index_and_the_others_wait_for_it(tmp_path):
    """Locks belong to open files, so that threads stand for processes here."""
    path = tmp_path / "train.jsonl"
    path.write_text("x")
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.2)
        (folder / "done").write_text("yes")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: row_cache.CacheEntry(path, "x", make).open("done").read(), range(4)))
    assert found == [b"yes"] * 4 and len(made) == 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_cache_that_is_cleared_is_made_again(kind, tmp_path, cache):
    path = numbered(tmp_path / "train.jsonl", 9)
    if kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        path = str(tmp_path / "train.parquet")
        pq.write_table(pa.table({"prompt": [f"{n}?" for n in range(9)]}), path)
    tasks = FileTasks(DataConfig(train=path), 0, [])
    before = tasks.train(0, 9)
    shutil.rmtree(cache)
    assert tasks.train(0, 9) == before and len(entries(cache)) == 1


def test_without_a_cache_folder_the_index_is_in_a_private_folder(tmp_path, cache):
    cache.write_text("a file")
    assert len(FileTasks(DataConfig(train=numbered(tmp_path / "train.jsonl", 9)), 0, [])) == 9


def test_nothing_but_numbers_is_read_from_the_cache(tmp_path, cache, monkeypatch):
    """The cache holds no pickles, so that files planted in it cannot run code."""
    FileTasks(DataConfig(train=numbered(tmp_path / "train.jsonl", 9)), 0, [])
    (made,) = entries(cache)
    assert sorted(path.name for path in made.iterdir()) == ["blanks", "offsets", "suspects.json"]
    assert np.fromfile(made / "offsets", np.uint64).tolist()[:2] == [0, len('{"id": "t0", "prompt": "0?"}\n')]
    text = Path(line_index.__file__).read_text() + Path(parquet_index.__file__).read_text()
    assert "pickle" not in text and "np.load" not in text
