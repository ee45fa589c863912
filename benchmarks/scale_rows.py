"""Files of many rows: cost of opening them, of drawing rows, and of a run up to its first step."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.scale_parts import MB, Measured
from pact_fast.files import cache_folder

ROW_BYTES = 4000
PROMPTS = 256  # of a step


def write_rows(path: Path, rows: int, size: int = ROW_BYTES) -> None:
    """Write rows of `size` bytes: prompt, three tools, a trace of two calls, an answer."""
    schema = {"type": "object", "properties": {"city": {"type": "string", "description": "Name of the city"}}}
    names = ("weather", "distance", "population")
    tools = [
        {"type": "function", "function": {"name": name, "description": "Looks it up.", "parameters": schema}}
        for name in names
    ]
    trace = []
    for name in names[:2]:
        call = {"function": {"name": name, "arguments": {"city": "Oslo"}}}
        trace += [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "7"}]
    trace.append({"role": "assistant", "content": "7 degrees"})
    rest = json.dumps({"tools": tools, "expert_trace": trace, "answer": "7", "env_args": {"codes": CODES}})
    words = "How warm is it in Oslo, and how far is it from here? "
    with path.open("w", encoding="utf-8") as file:
        for index in range(rows):
            start = f'{{"id": "row-{index}", "prompt": "Question {index}: '
            space = max(20, size - len(start) - len(rest) - 3)
            file.write(f'{start}{(words * (space // len(words) + 1))[:space]}", {rest[1:]}\n')


CODES = {name: f"def {name}(city):\n    return 7" for name in ("weather", "distance", "population")}


def measure_rows(rows: int, size: int = ROW_BYTES, parquet: bool = False) -> Measured:
    """A file of so many rows is opened for the first time and the tasks of three steps are drawn, in a new process.

    MB: its peak memory beyond what the imports take; "again s": as a process that finds the index.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        write_rows(path, rows, size)
        if parquet:
            path = _as_parquet(path)
        first, second = (_draw(path, Path(folder)) for _ in range(2))
    return Measured(rows, first["cpu"], {"MB": first["bytes"] / MB, "wall s": first["wall"], "again s": second["cpu"]})


def _draw(path: Path, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scale_rows", str(path)]
    found = subprocess.run(
        command, env=os.environ | {"XDG_CACHE_HOME": str(folder)}, capture_output=True, text=True, check=True
    )
    return json.loads(found.stdout)


def _drawn(path: Path) -> dict[str, float]:
    from pact_fast.config import DataConfig
    from pact_fast.data.sources import FileTasks

    if path.suffix == ".parquet":
        import pyarrow.parquet  # noqa: F401  # an import, which the rows do not cause

    before = peak()
    began, wall = time.process_time(), time.monotonic()
    tasks = FileTasks(DataConfig(train=str(path)), 0, ())
    for step in range(3):
        tasks.train(step, PROMPTS)
    return {"cpu": time.process_time() - began, "wall": time.monotonic() - wall, "bytes": peak() - before}


def peak() -> int:
    """Peak bytes of this process; `ru_maxrss` would count those of the process that started it, too."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def _as_parquet(path: Path) -> Path:
    """The rows of a JSON lines file as parquet, in groups of 100,000."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    target = path.with_suffix(".parquet")
    writer = None
    with path.open("rb") as file:
        while lines := file.readlines(1 << 24):
            rows = [
                {k: v if isinstance(v, str) else json.dumps(v) for k, v in json.loads(line).items()} for line in lines
            ]
            table = pa.Table.from_pylist(rows)
            writer = writer or pq.ParquetWriter(target, table.schema)
            writer.write_table(table, row_group_size=100_000)
    assert writer
    writer.close()
    path.unlink()
    return target


def measure_start(rows: int) -> Measured:
    """A run with a tiny model on so many rows: until its first step is done, as a new process.

    MB: peak memory of the process; "again s": of wall time, as a run that finds the index.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", rows)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(_recipe(folder)))
        found = [_first_step(folder, folder / f"run{number}") for number in range(2)]
    (cpu, wall, size), (_, again, _) = found
    return Measured(rows, cpu, {"wall s": wall, "again s": again, "MB": size / MB})


def _recipe(folder: Path) -> dict[str, object]:
    model = {
        "model_type": "qwen3", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 8192,
    }  # fmt: skip
    return {
        "model": {"random_init": model},
        "data": {"train": str(folder / "rows.jsonl")},
        "rollout": {"num_generations": 2, "max_turn_tokens": 8, "max_completion_length": 16, "max_prompt_length": 4000},
        "trainer": {"max_steps": 1, "prompts_per_step": 2, "save_rollouts": False},
        "threads": 1,
    }


def _first_step(folder: Path, run: Path) -> tuple[float, float, int]:
    """(seconds of CPU time, of wall time, peak bytes) of a run of one step."""
    command = [sys.executable, "-m", "pact_fast", "train", str(folder / "recipe.yaml"), f"output_dir={run}"]
    cache = folder / "pact_fast"
    cache.mkdir(exist_ok=True)
    for library in cache_folder().glob("*.so"):  # compiled kernels
        with contextlib.suppress(FileExistsError):
            (cache / library.name).symlink_to(library)
    began = time.monotonic()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | {"XDG_CACHE_HOME": str(folder)}, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError((folder / "log").read_text(errors="replace")[-2000:])
    shutil.rmtree(run)
    return used.ru_utime + used.ru_stime, time.monotonic() - began, used.ru_maxrss * 1024


if __name__ == "__main__":
    print(json.dumps(_drawn(Path(sys.argv[1]))))
