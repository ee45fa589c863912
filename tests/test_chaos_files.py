"""Fault injection into whole runs: files that cannot be written, truncated files, and killed tool processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pact_fast.envs.python_tools.pool import WORKER_FAILED
from pact_fast.errors import PactError
from pact_fast.report.rollout_files import read_lines
from pact_fast.train.metrics import MetricsWriter
from pact_fast.train.trackers.base import TrackedRun
from pact_fast.train.trackers.group import Trackers
from tests.support.runs import DEADLINE, STEPS, RunProcess, assert_same, contents, cut_back, metrics, saved

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

# Writes are refused by a limit on the size of files: to the program, a full disk.


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(baseline_run, tmp_path):
    run = cut_back(baseline_run, tmp_path / "run", 2)
    before = contents(run / "checkpoints")
    size = (run / "checkpoints/step_2/optimizer.safetensors").stat().st_size
    error = RunProcess(run, file_size=size - 1).error()
    assert f"cannot save the checkpoint {run}/checkpoints/step_3: " in error and "File too large" in error
    assert "free some space" in error and "earlier checkpoints are intact, continue with resume=auto" in error
    assert saved(run) == [1, 2] and contents(run / "checkpoints") == before
    RunProcess(run).succeed()
    assert_same(run, baseline_run)


@pytest.mark.parametrize("file", ["metrics.jsonl", "base"])
def test_any_other_file_that_cannot_be_written_is_named(file, baseline_run, tmp_path):
    if file == "base":
        run, size = tmp_path / "run", (baseline_run / "base/model.safetensors").stat().st_size - 1
    else:
        run = cut_back(baseline_run, tmp_path / "run", 2)
        size = json.loads((run / "checkpoints/step_2/state.json").read_text())["metrics_bytes"] + 100
    error = RunProcess(run, file_size=size).error()
    assert f"cannot write {run}/{file}: " in error and "File too large" in error
    assert "free some space" in error and "resume=auto" in error
    RunProcess(run).succeed()
    assert_same(run, baseline_run)


def test_rollouts_that_cannot_be_written_are_named(baseline_run, tmp_path):
    """Something stands in their place: their compressed file is smaller than the metrics, so no limit stops it alone."""
    run = cut_back(baseline_run, tmp_path / "run", 2)
    file = run / "rollouts/step_000003.jsonl.gz"
    file.unlink()
    file.mkdir()
    error = RunProcess(run).error()
    assert f"cannot write {file}: " in error and "resume=auto" in error
    file.rmdir()
    RunProcess(run).succeed()
    assert_same(run, baseline_run)


def test_metrics_on_a_full_disk_are_one_error(tmp_path):
    """A real full disk, /dev/full, also refuses writes when the file is closed."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = MetricsWriter(tmp_path, Trackers({}, TrackedRun("run", "0" * 8, tmp_path, {}), print))
    with pytest.raises(PactError, match=r"metrics\.jsonl: .*No space left on device; free some space"):
        writer.write(1, {"loss": 1.0})
    writer.close()


# Files that were cut


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "optimizer.safetensors", "model/model.safetensors"])
def test_a_truncated_checkpoint_is_passed_over(file, baseline_run, tmp_path):
    run = cut_back(baseline_run, tmp_path / "run", 3)
    path = run / "checkpoints/step_3" / file
    os.truncate(path, path.stat().st_size // 2)
    process = RunProcess(run).succeed()
    (warning,) = [line for line in process.output().splitlines() if "skipping the checkpoint" in line]
    assert f"{run}/checkpoints/step_3: {file} " in warning
    assert f"resuming {run} from step 2" in process.output()
    assert_same(run, baseline_run)


def test_metrics_cut_after_the_checkpoint_lose_nothing(baseline_run, tmp_path):
    run = cut_back(baseline_run, tmp_path / "run", 3)
    os.truncate(run / "metrics.jsonl", (run / "metrics.jsonl").stat().st_size - 20)
    RunProcess(run).succeed()
    assert_same(run, baseline_run)


@pytest.mark.parametrize("kept", [2, 0, None], ids=["in the third line", "in the first line", "removed"])
def test_metrics_cut_before_the_checkpoint_keep_whole_lines_and_repeat_none(kept, baseline_run, tmp_path):
    run = cut_back(baseline_run, tmp_path / "run", 3)
    path = run / "metrics.jsonl"
    if kept is None:
        path.unlink()
    else:
        os.truncate(path, sum(len(line) for line in path.read_bytes().splitlines(keepends=True)[:kept]) + 50)
    RunProcess(run).succeed()
    after = STEPS.index(4)  # records of the steps that were trained again
    assert metrics(run) == metrics(baseline_run)[: kept or 0] + metrics(baseline_run)[after:]


# Tools

CITIES = ["Oslo", "Rome", "Lima", "Bonn"]
TINY = {
    "model_type": "qwen3", "vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.06,
    "max_position_embeddings": 1024,
}  # fmt: skip
FAST = "def weather(city): return 7"
# "Oslo" never ends by itself, and shows in its name that it is at work
STUCK = """
def weather(city):
    if city == 'Oslo':
        import ctypes, time
        ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)
        time.sleep(3600)
    return 7
"""


def write_tasks(path: Path, code: str) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"name": "weather", "description": "Temperature.", "parameters": parameters}
    rows = []
    for city in CITIES:
        call = {"function": {"name": "weather", "arguments": {"city": city}}}
        trace = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "7"}]
        rows.append(
            {
                "id": city, "prompt": f"How warm is {city}?", "tools": [{"type": "function", "function": tool}],
                "expert_trace": [*trace, {"role": "assistant", "content": "7"}], "answer": "7",
                "env_args": {"codes": {"weather": code}, "scoring": "toolhop"},
            }
        )  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def caller(tmp_path_factory) -> tuple[Path, list[str]]:
    """A run that has taught a model to call the tool, and its recipe."""
    folder = tmp_path_factory.mktemp("caller")
    write_tasks(folder / "tasks.jsonl", FAST)
    settings = {
        "model": {"random_init": TINY},
        "data": {"train": str(folder / "tasks.jsonl")},
        "rollout": {"max_turns": 2, "max_turn_tokens": 40, "max_completion_length": 160, "max_prompt_length": 512},
        "algorithm": {"name": "sft"},
        "trainer": {"max_steps": 40, "prompts_per_step": 4, "learning_rate": 5e-3, "save_steps": 20},
        "threads": 1,
    }
    (folder / "tools.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    RunProcess(folder / "run", recipe=[str(folder / "tools.yaml")]).succeed()
    return folder / "run", [str(folder / "tools.yaml")]


def test_killed_tool_processes_cost_one_observation_each(caller, tmp_path):
    """SIGKILL, in turn, of the worker that serves a call and of the call's own process. A call may take an hour here, so that
    a death which goes unnoticed shows.
    """
    taught, recipe = caller
    name = f"tool-{os.getpid()}"
    write_tasks(tmp_path / "tasks.jsonl", STUCK.format(name=name))
    settings = [
        f"data.train={tmp_path / 'tasks.jsonl'}", f"model.path={taught / 'checkpoints/step_40/model'}",
        "model.random_init=null", "algorithm.name=grpo", "trainer.max_steps=2", "rollout.num_generations=2",
        "rollout.tool_timeout=4000",
    ]  # fmt: skip
    process = RunProcess(tmp_path / "run", *settings, recipe=recipe)
    killed: list[int] = []
    deadline = time.monotonic() + DEADLINE
    while process.running:
        if time.monotonic() > deadline:
            process.exit_code(0)  # which says that it hangs
        for tool in at_work(name):
            if tool not in killed:
                os.kill(ancestors(tool)[-3] if len(killed) % 2 == 0 else tool, signal.SIGKILL)
                killed.append(tool)
        time.sleep(0.02)
    process.succeed()
    assert len(killed) >= 2
    seen = ["".join(record["tokens"]) for n in (1, 2) for record in records(tmp_path / "run", n)]
    assert any(WORKER_FAILED in text for text in seen)
    assert any("error: the tool's process ended without a result (SIGKILL)" in text for text in seen)
    assert any(">7<" in "".join(text.split()) for text in seen)  # the other calls went on


def at_work(name: str) -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has just ended
                if (folder / "comm").read_text().strip() == name:
                    yield int(folder.name)


def ancestors(pid: int) -> list[int]:
    """Process ids of a tool: itself, its keeper, its worker, the fork server, and the trainer."""
    found = [pid]
    while b"python_tools/worker" in Path(f"/proc/{found[-1]}/cmdline").read_bytes():
        found.append(int(Path(f"/proc/{found[-1]}/stat").read_text().rpartition(")")[2].split()[1]))
    return found


def records(run: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in read_lines(run / f"rollouts/step_{step:06d}.jsonl.gz")]


def test_a_data_file_that_was_cut_is_refused_before_any_step(caller, tmp_path):
    taught, recipe = caller
    run, data = cut_back(taught, tmp_path / "run", 20), tmp_path / "tasks.jsonl"
    write_tasks(data, FAST)
    whole = data.read_bytes()
    os.truncate(data, len(whole) - len(whole.splitlines()[-1]) // 2)
    before = contents(run)
    error = RunProcess(run, f"data.train={data}", recipe=recipe).error()
    assert f"{data}:4: not valid JSON: " in error and "correct the text there" in error
    assert contents(run) == before
    data.write_bytes(whole)
    RunProcess(run, f"data.train={data}", recipe=recipe).succeed()
    assert_same(run, taught)
