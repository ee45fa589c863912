"""Rollouts on disk: compressed, thinned by a rule, and not read where a count is enough."""

import json
from pathlib import Path

import pytest

from pact_fast.errors import PactError
from pact_fast.report import rollout_files
from pact_fast.report.rollout_files import read_index, read_lines, thin_out, write_rollout_file
from pact_fast.report.run_data import read_run


def lines(step: int, count: int) -> list[str]:
    return [json.dumps({"step": step, "task_id": f"é{i}", "tokens": ["a"] * 50}) + "\n" for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rollouts").mkdir()
    return tmp_path / "rollouts"


def counted(monkeypatch) -> list[str]:
    """Names of the files that are read."""
    read: list[str] = []
    monkeypatch.setattr(rollout_files, "read_lines", lambda path: read.append(path.name) or read_lines(path))
    return read


def test_what_is_written_is_read(folder):
    write_rollout_file(folder, "step_000003", lines(3, 4))
    path = folder / "step_000003.jsonl.gz"
    assert b"".join(read_lines(path)).decode() == "".join(lines(3, 4))
    before = path.read_bytes()
    write_rollout_file(folder, "step_000003", lines(3, 4))  # a repeated step
    assert path.read_bytes() == before and len(before) < len("".join(lines(3, 4)))
    assert sorted(p.name for p in folder.iterdir()) == ["index.jsonl", path.name]


def test_counting_reads_no_file_that_the_index_knows(folder, monkeypatch):
    for step in range(1, 5):
        write_rollout_file(folder, f"step_{step:06d}", lines(step, step))
    read = counted(monkeypatch)
    assert read_run(folder.parent, rollouts=100).rollouts_written == 10 and read == []
    (folder / "step_000009.jsonl").write_text("".join(lines(9, 2)))  # of a version that did not compress
    index = folder / "index.jsonl"
    index.write_text(index.read_text()[:-20])  # killed in the middle of a line
    run = read_run(folder.parent, rollouts=100)
    assert run.rollouts_written == 12 and sorted(read) == ["step_000004.jsonl.gz", "step_000009.jsonl"]
    assert [r.step for r in run.rollouts] == [9] * 2 + [4] * 4 + [3] * 3 + [2] * 2 + [1]


def test_a_file_that_was_replaced_is_counted_anew(folder, monkeypatch):
    write_rollout_file(folder, "step_000001", lines(1, 3))
    stale = (folder / "index.jsonl").read_text()
    write_rollout_file(folder, "step_000001", lines(1, 5))
    (folder / "index.jsonl").write_text(stale)
    assert read_run(folder.parent, rollouts=100).rollouts_written == 5
    assert read_index(folder)["step_000001.jsonl.gz"][1] == 3


def test_one_step_is_read_without_looking_at_the_others(folder, monkeypatch):
    for step in (1, 2):
        write_rollout_file(folder, f"step_{step:06d}", lines(step, 2))
    write_rollout_file(folder, "eval_000002", lines(2, 1))
    (folder / "index.jsonl").unlink()
    read = counted(monkeypatch)
    run = read_run(folder.parent, rollouts=9, step=2)
    assert run.rollouts_written == 3 and len(run.rollouts) == 3
    assert sorted(read) == ["eval_000002.jsonl.gz", "step_000002.jsonl.gz"]
    with pytest.raises(PactError, match=r"holds no rollouts of step 7.*keep_rollouts"):
        read_run(folder.parent, rollouts=9, step=7)


@pytest.mark.parametrize("keep", [1, 25, 1000, None])
def test_the_newest_steps_are_kept_and_every_tenth_of_the_others(folder, keep):
    for step in range(1, 101):
        write_rollout_file(folder, f"step_{step:06d}", lines(step, 1))
        write_rollout_file(folder, f"skipped_{step:06d}", lines(step, 1))
        thin_out(folder, step, keep)
    left = sorted(int(p.name[5:11]) for p in folder.glob("step_*"))
    assert left == [step for step in range(1, 101) if step % 10 == 0 or keep is None or step > 100 - keep]
    assert len(list(folder.glob("skipped_*"))) == 100
    assert read_run(folder.parent, rollouts=1).rollouts_written == len(left)


def test_a_damaged_file_ends_where_the_damage_is(folder):
    write_rollout_file(folder, "step_000001", lines(1, 500))
    path = folder / "step_000001.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-200])
    found = list(read_lines(path))
    assert len(found) < 500
    path.write_bytes(b"no gzip")
    assert list(read_lines(path)) == []
