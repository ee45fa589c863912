"""`pact-fast eval BENCH`: run a benchmark with a model, continue an interrupted one, print its table."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_fast import __version__
from pact_fast.cli.session import Session, make_session
from pact_fast.config import Config, recipes
from pact_fast.config.load import config_from, read_settings
from pact_fast.data.types import Task, Trajectory
from pact_fast.errors import PactError
from pact_fast.evaluation.benchmark import Benchmark, benchmark
from pact_fast.evaluation.results import ResultStore, Sample
from pact_fast.evaluation.summary import summarise, summary_table
from pact_fast.rewards.score import score_evaluation
from pact_fast.rollout.agent import Job
from pact_fast.train.checkpoint import run_weights
from pact_fast.train.evaluate import EVAL_STREAM, Sampling
from pact_fast.train.progress import Progress
from pact_fast.train.records import rollout_record
from pact_fast.train.run_lock import RunLock
from pact_fast.users.endpoint import ANSWERS, user_llm

JOBS = 1024  # trajectories that are prepared at once
# settings of a run that decide nothing about its samples: how fast, how many at once, how training used them
WITHOUT_EFFECT = (
    *("num_generations", "oversampling_factor", "temperature", "max_batch_size", "engine_timeout", "vllm_mode"),
    *("vllm_server_base_url", "vllm_server_timeout", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size"),
    *(
        "vllm_data_parallel_size",
        "vllm_enable_sleep_mode",
        "vllm_weight_transfer",
        "vllm_weights_dir",
        "verify_weights",
    ),
)


@dataclass(frozen=True)
class EvalRequest:
    """Parsed arguments of `pact-fast eval BENCHMARK`.

    name         of the benchmark, or `file.py:Class`
    model        run directory, recipe, YAML file, model folder or hub name
    settings     `key=value`
    engine       rollout.engine; None: that of the settings
    categories   names; None: all
    samples      per task
    temperature  of sampling; 0: greedy
    limit        most tasks per category; None: all
    out          folder of the results
    """

    name: str
    model: str
    settings: Sequence[str] = ()
    engine: str | None = None
    categories: list[str] | None = None
    samples: int = 1
    temperature: float = 0.0
    limit: int | None = None
    out: Path | None = None


class BenchmarkTasks:
    """The tasks of an evaluation as a TaskSource: a model with random weights trains its tokenizer on them."""

    def __init__(self, tasks: list[Task]):
        self._tasks = tasks

    def train(self, step: int, count: int) -> list[Task]:
        return [self._tasks[(step * count + i) % len(self._tasks)] for i in range(min(count, len(self._tasks)))]

    def held_out(self, count: int) -> list[Task]:
        return self._tasks[:count]


def benchmark_command(request: EvalRequest) -> int:
    """Evaluate, print the table, and print the summary as JSON."""
    kind = benchmark.get(request.name)
    chosen = kind.choose(request.categories)
    _check(request)
    config, run = benchmark_config(request, kind)
    bench = kind(config)
    tasks = {name: bench.tasks(name)[: request.limit] for name in chosen}
    if not any(tasks.values()):
        raise PactError(f"{request.name}: no tasks in {', '.join(chosen)}")
    out = request.out or Path("evals") / request.name.rpartition(":")[2]
    progress = Progress()
    lock = RunLock(out, progress.note)
    try:
        store = ResultStore(out, identity(request, config, run))
        _run(request, config, run, tasks, store, progress)
        keys = [(task.id, k) for members in tasks.values() for task in members for k in range(request.samples)]
        summary = {
            "benchmark": request.name, "model": request.model, "samples": request.samples,
            "temperature": request.temperature, **summarise(kind, store.samples(keys), request.samples),
        }  # fmt: skip
        store.write_summary(summary)
        progress.print(summary_table(kind, summary, f"{request.name} · {request.model}"))
        progress.note(f"results in {out}; failures: pact-fast view {out}")
    finally:
        progress.close()
        lock.release()
    print(json.dumps(summary, indent=2))
    return 0


def benchmark_config(request: EvalRequest, kind: type[Benchmark]) -> tuple[Config, Path | None]:
    """The settings of an evaluation, and the run directory that the model comes from, if it does.

    Of a run or a recipe, everything but its data and environment is taken; the benchmark's settings come next, then
    those of the command line.
    """
    path = Path(request.model)
    run = path if (path / "config.yaml").is_file() else None
    if run:
        data = read_settings(str(path / "config.yaml"))
    elif request.model in recipes() or (path.suffix in (".yaml", ".yml") and path.is_file()):
        data = read_settings(request.model)
    else:
        data = {"model": {"path": request.model}}
    data = {key: value for key, value in data.items() if key not in ("data", "env", "output_dir", "pretrain")}
    engine = [f"rollout.engine={request.engine}"] if request.engine else []
    return config_from(data, (*kind.settings, *engine, *request.settings), request.model), run


def identity(request: EvalRequest, config: Config, run: Path | None) -> dict[str, Any]:
    """Return the settings that every sample depends on, as JSON data.

    The number of samples, the categories and the limit of tasks are not among them: results can be extended later.
    """
    rollout = config.rollout.model_dump(exclude={*WITHOUT_EFFECT, "user_llm"})
    user = user_llm(config.rollout)
    return {
        "benchmark": request.name,
        "model": request.model,
        "weights": _weights(config, run),
        "temperature": request.temperature,
        "seed": config.seed,
        "model_settings": config.model.model_dump(exclude={"gradient_checkpointing"}),
        "env": config.env.model_dump(),
        "data": config.data.eval,
        "prompt_format": config.data.prompt_format,
        "rollout": rollout,
        **({"user_llm": user.decisive()} if user else {}),
        "pact_fast": __version__,
    }


def _check(request: EvalRequest) -> None:
    if request.samples < 1 or (request.limit is not None and request.limit < 1):
        raise PactError("--samples and --limit must be at least 1")
    if request.temperature < 0:
        raise PactError("--temperature must be at least 0 (greedy)")
    if request.samples > 1 and not request.temperature:
        raise PactError("--samples above 1 needs --temperature above 0: greedy samples are all the same")


def _run(
    request: EvalRequest,
    config: Config,
    run: Path | None,
    tasks: dict[str, list[Task]],
    store: ResultStore,
    progress: Progress,
) -> None:
    """Sample the unfinished tasks; a finished evaluation loads no model."""
    open_jobs = [
        (category, task, k)
        for k in range(request.samples)  # first one sample of everything
        for category, members in tasks.items()
        for task in members
        if (task.id, k) not in store
    ]
    if not open_jobs:
        return
    finished = request.samples * sum(map(len, tasks.values())) - len(open_jobs)
    if finished:
        progress.note(f"{finished} samples are finished; {len(open_jobs)} to go")
    source = BenchmarkTasks([task for members in tasks.values() for task in members])
    session = make_session(config, source, run, answers=store.folder / ANSWERS)
    try:
        with progress.phase(request.name, len(open_jobs)) as advance:
            for start in range(0, len(open_jobs), JOBS):
                _run_part(session, open_jobs[start : start + JOBS], request, store, advance)
    finally:
        session.close()


def _run_part(
    session: Session, part: list[tuple[str, Task, int]], request: EvalRequest, store: ResultStore, advance
) -> None:
    """Sample some trajectories at once; each is stored as it ends."""
    sampling = Sampling(request.temperature, session.config.rollout.filters)
    limit = session.config.rollout.max_prompt_length
    jobs: list[Job] = []
    names: list[tuple[str, Task, int]] = []
    for category, task, k in part:
        shown, _ = session.loop.resolve_task(task)
        if len(session.renderer.prompt_ids(shown.prompt, shown.tools)) > limit:
            store.add(Sample(task.id, category, k, {"success": 0.0}, "prompt_too_long"))
            advance("")
            continue
        # depends on the task alone: other categories, limits and interruptions change nothing
        key = (session.config.seed, EVAL_STREAM, zlib.crc32(task.id.encode()), k)
        jobs.append(Job(task, key, sampling.temperature, filters=sampling.filters))
        names.append((category, task, k))

    def finished(index: int, trajectory: Trajectory) -> None:
        category, task, k = names[index]
        score_evaluation([trajectory])
        sample = Sample(
            task.id, category, k, {name: float(value) for name, value in trajectory.env_rewards.items()},
            str(trajectory.stop_reason), len(trajectory.turns), int(trajectory.sampled.sum()),
        )  # fmt: skip
        record = None
        if sample.success < 1:
            record = rollout_record(session.renderer, task, trajectory, step=0, kind="eval") | {"sample": k}
        store.add(sample, record)
        advance("")

    session.loop.run(jobs, finished)


def _weights(config: Config, run: Path | None) -> str:
    """Which weights are evaluated: the checkpoint of a run, a digest of a local model, or the hub name."""
    if run:
        base, newest = run_weights(run)
        found = newest or base
        return f"{found.parent.name}/{found.name}" if found else "none"
    if config.model.path is None:
        return f"random, seed {config.seed}"
    folder = Path(config.model.path)
    return folder_digest(folder) if folder.is_dir() else config.model.path


def folder_digest(folder: Path) -> str:
    """Tells model folders apart: names, sizes, and both ends of every weight file (a mebibyte each)."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]
