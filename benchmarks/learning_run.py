"""One run of the learning study: base model, task files, training, evaluation of its checkpoints → one record."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning_clock import FILE as CLOCK
from benchmarks.learning_methods import ALL
from benchmarks.learning_regimes import BASES, REGIMES, Regime
from benchmarks.learning_tasks import Part, write_demonstrated, write_files
from pact_fast.chat.rendering import make_renderer
from pact_fast.cli.session import make_session
from pact_fast.config import Config, load_config
from pact_fast.data.sources import TaskSource
from pact_fast.envs.registry import make_tasks
from pact_fast.errors import PactError
from pact_fast.files import atomic_save_pretrained, write_text
from pact_fast.model.build import make_model
from pact_fast.model.tokenizer import make_tokenizer
from pact_fast.rewards.score import score_evaluation
from pact_fast.train.evaluate import evaluation_jobs, evaluation_kinds, success_rate
from pact_fast.train.pretrain import pretrain
from pact_fast.train.run import Trainer
from pact_fast.train.seeds import seed_generators


@dataclass(frozen=True)
class Budget:
    """Compute budget of every method of a study.

    steps      optimizer steps
    prompts    prompts per step
    rollouts   rollouts per prompt; none in steps of SFT
    points     evaluations along the run, the last at its end
    evaluated  held-out tasks per evaluation
    bases      base models: seed i starts from base i mod bases
    """

    steps: int = 16
    prompts: int = 8
    rollouts: int = 6
    points: int = 2
    evaluated: int = 100
    bases: int = 5

    def __post_init__(self) -> None:
        if self.steps % self.points:
            raise PactError(f"steps ({self.steps}) must be a multiple of points ({self.points})")

    @property
    def settings(self) -> tuple[str, ...]:
        """Overrides of a run's configuration, as `key=value`."""
        return (
            f"trainer.max_steps={self.steps}",
            f"trainer.prompts_per_step={self.prompts}",
            f"rollout.num_generations={self.rollouts}",
            f"trainer.save_steps={self.steps // self.points}",
            f"trainer.save_total_limit={self.points}",
        )


@dataclass(frozen=True)
class Job:
    """One run of the study.

    regime         key of REGIMES
    method         key of the table of methods
    seed           of training and of the task files
    learning_rate  peak of the schedule
    part           held-out tasks that it is evaluated on: "validation" or "test"
    """

    regime: str
    method: str
    seed: int
    learning_rate: float
    part: Part

    @property
    def name(self) -> str:
        """Name of the run directory; a key of the results."""
        return f"{self.regime}-{self.method}-{self.seed}-{self.learning_rate:g}-{self.part}"


COMMON = (
    "device=cpu",
    "threads=1",
    "trainer.report_to=benchmarks.learning_clock:Clock",
    "trainer.log_completions=0",
    "trainer.save_rollouts=0",
    "rollout.max_batch_size=128",
    "rollout.max_turns=7",
    "rollout.max_turn_tokens=48",
    "rollout.max_completion_length=288",
)


def run_job(job: Job, budget: Budget, work: Path) -> dict[str, Any]:
    """Train and evaluate; the run directory is removed afterwards.

    Returns:
        The job's fields, and "curve": one entry for each evaluated step, with success ("sampled", "greedy"), and tokens
        sampled, CPU and wall-clock seconds of training up to there; "training_success" of the rollouts
        of every step, "zero_advantage_groups" and "trace_logprob_diff" (the metrics of these names), step by step.
    """
    regime, out = REGIMES[job.regime], work / "runs" / job.name
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        config = job_config(job, regime, budget, work, out)
        Trainer(config).train()
        points = [evaluate_checkpoint(config, step, job, work) for step in evaluated_steps(budget)]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clock = [json.loads(line) for line in (out / CLOCK).read_text().splitlines()]
    record = asdict(job) | {
        "curve": [point | costs(point["step"], metrics, clock, budget) for point in points],
        "training_success": [entry.get("success") for entry in metrics],
        "zero_advantage_groups": [entry.get("reward/zero_advantage_groups") for entry in metrics],
        "trace_logprob_diff": [entry.get("trace/logprob_diff") for entry in metrics],
    }
    shutil.rmtree(out)
    return record


def job_config(job: Job, regime: Regime, budget: Budget, work: Path, out: Path) -> Config:
    """The settings of a run. Makes the base model and the task files that they name, unless they are there."""
    files = work / "tasks" / f"{job.regime}-{job.seed}"
    with locked(files):
        if not (files / "done").exists():
            rows = regime.tasks or budget.steps * budget.prompts
            write_files(files, regime.train, regime.held_out, job.seed, rows, budget.evaluated)
            write_text(files / "done", "")
    method = ALL[job.method]
    settings = [
        *COMMON,
        *budget.settings,
        *regime.settings,
        f"data.train={files / 'train.jsonl'}",
        "env={name: lookup_chain, args: {}}",
        f"seed={job.seed}",
        f"output_dir={out}",
        *method.settings_in(regime),
        f"trainer.learning_rate={job.learning_rate}",
    ]
    if regime.base:
        folder = make_base(regime.base, job.seed % budget.bases, work)
        own = ["pretrain=null", "model.random_init=null", f"model.path={folder / 'model'}"]
        settings += [*own, f"model.tokenizer={folder / 'tokenizer'}"]
    return load_config(regime.source, settings)


def make_base(name: str, seed: int, work: Path) -> Path:
    """The folder of a base model, with `model` and `tokenizer`; trained unless it is there."""
    folder, base = work / "bases" / f"{name}-{seed}", BASES[name]
    with locked(folder):
        if (folder / "model" / "config.json").exists():
            return folder
        config = load_config("quickstart", [*COMMON[:2], *base.settings, f"seed={seed}"])
        torch.set_num_threads(1)
        tasks: TaskSource = make_tasks(config)
        seed_generators(seed)
        if base.after:
            source = make_base(base.after, seed, work)
            like = config.model.model_copy(update={"tokenizer": str(source / "tokenizer")})
            tokenizer = make_tokenizer(like, tasks)
            model = make_model(config, tokenizer, path=source / "model", device=torch.device("cpu"))
        else:
            tokenizer = make_tokenizer(config.model, tasks)
            model = make_model(config, tokenizer, device=torch.device("cpu"))
        seed_generators(seed)
        pretrain(config, model, make_renderer(config.model, tokenizer), base.tasks(tasks), lambda step, loss: None)
        folder.mkdir(exist_ok=True)
        atomic_save_pretrained(tokenizer, folder / "tokenizer")
        atomic_save_pretrained(model, folder / "model")
    return folder


def evaluated_steps(budget: Budget) -> list[int]:
    """The steps whose checkpoints are evaluated: at equal distances, the last at the end of the run."""
    return [budget.steps // budget.points * point for point in range(1, budget.points + 1)]


def evaluate_checkpoint(config: Config, step: int, job: Job, work: Path) -> dict[str, Any]:
    """Success of the checkpoint of a step, sampled and greedy, on the job's held-out tasks."""
    weights = Path(config.output_dir) / "checkpoints" / f"step_{step}" / "model"
    held_out = work / "tasks" / f"{job.regime}-{job.seed}" / f"{job.part}.jsonl"
    return {"step": step} | evaluate_model(config, weights, held_out, job.seed)


def evaluate_model(config: Config, weights: Path, held_out: Path, seed: int) -> dict[str, float]:
    """Success in [0, 1] of a model on the tasks of a file: "sampled" at the run's temperature, and "greedy".

    Rollouts of both share the batches of the engine.

    Args:
        config: The configuration of the run.
        weights: Folder of the model.
        held_out: The file.
        seed: Draws the samples.
    """
    data = config.data.model_copy(update={"eval": str(held_out)})
    model = config.model.model_copy(
        update={"path": str(weights), "tokenizer": config.model.tokenizer or config.model.path}
    )
    rollout = config.rollout.model_copy(update={"max_batch_size": 256, "max_prompt_length": 512})
    config = config.model_copy(update={"data": data, "model": model, "rollout": rollout})
    tasks = make_tasks(config)
    rows, kinds = tasks.held_out(1 << 30), evaluation_kinds(config)
    session = make_session(config, tasks)
    try:
        jobs = [entry for sampling in kinds.values() for entry in evaluation_jobs(rows, sampling, seed)]
        trajectories = session.loop.run(jobs)
    finally:
        session.close()
    score_evaluation(trajectories)
    n = len(rows)
    return {kind: success_rate(trajectories[i * n : (i + 1) * n]).mean for i, kind in enumerate(kinds)}


def evaluate_base(name: str, seed: int, budget: Budget, work: Path) -> dict[str, Any]:
    """Success of a regime's base model before training, on the test tasks: a record as of `run_job`, with step 0 alone.

    It has "with_trace", too: success where the prompt holds the task's expert trace.
    """
    job = Job(name, "base", seed, 0.0, "test")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        like = Job(name, "grpo", seed, 1e-6, "test")
        config = job_config(like, REGIMES[name], budget, work, work / "runs" / job.name)
        weights = Path(str(config.model.path))
        files = work / "tasks" / f"{name}-{seed}"
        point = evaluate_model(config, weights, files / "test.jsonl", seed)
        write_demonstrated(files / "test.jsonl", files / "test-with-trace.jsonl")
        with_trace = evaluate_model(config, weights, files / "test-with-trace.jsonl", seed)
    curve = [{"step": 0} | point | {"tokens": 0, "cpu_seconds": 0.0, "wall_seconds": 0.0}]
    return asdict(job) | {"curve": curve, "with_trace": with_trace}


def costs(step: int, metrics: list[dict], clock: list[dict], budget: Budget) -> dict[str, float]:
    """Tokens sampled, CPU and wall-clock seconds of the training steps up to `step`."""
    rollouts = budget.prompts * budget.rollouts
    tokens = sum(entry.get("lengths/sampled_mean", 0.0) * rollouts for entry in metrics if entry["step"] <= step)
    end = next(entry for entry in clock if entry["step"] == step)
    return {
        "tokens": round(tokens),
        "cpu_seconds": round(end["cpu"] - clock[0]["cpu"], 2),
        "wall_seconds": round(end["wall"] - clock[0]["wall"], 2),
    }


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let only one process at a time write to `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
