"""Our side of the whole-loop benchmark: the base model, a run of `grpo`, and the evaluation of both sides' checkpoints."""

from __future__ import annotations

import contextlib
import functools
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.whole_loop_phases import Phases
from benchmarks.whole_loop_task import Lookups, LookupTasks
from pact_fast.chat.rendering import make_renderer
from pact_fast.cli.session import make_session
from pact_fast.config import Config, load_config
from pact_fast.envs.adapters.trl import Trl
from pact_fast.envs.lookup_chain import TraceNoise
from pact_fast.envs.registry import make_tasks
from pact_fast.files import atomic_save_pretrained
from pact_fast.model.build import make_model
from pact_fast.model.tokenizer import make_tokenizer
from pact_fast.rollout.agent import AgentLoop
from pact_fast.rollout.embedded.engine import TransformersEngine
from pact_fast.train.collect import RolloutCollector
from pact_fast.train.evaluate import Sampling, evaluate, success_rate
from pact_fast.train.learner import Learner
from pact_fast.train.pretrain import pretrain
from pact_fast.train.run import Trainer
from pact_fast.train.seeds import seed_generators
from pact_fast.train.step import Stepper

TASK_MODULE = "benchmarks.whole_loop_task"


@dataclass(frozen=True)
class Budget:
    """Budget of both sides.

    hops            fewest and most relations of a question
    steps           optimizer steps, each on rollouts of its own
    points          evaluations along a run, the last at its end; both sides save a checkpoint for each
    prompts         of a step
    generations     rollouts of a prompt
    turns           assistant turns of a rollout
    turn_tokens     sampled tokens of a turn
    tokens          of a rollout, observations included
    learning_rate   constant
    evaluated       held-out tasks of an evaluation
    pretraining     steps that make the base model
    early_stop      probability per turn that a trace of pretraining answers too early
    wrong_relation  probability per turn that it looks up a wrong relation
    shape           of the model with random weights
    """

    hops: tuple[int, int] = (2, 3)
    steps: int = 9
    points: int = 3
    prompts: int = 8
    generations: int = 8
    turns: int = 6
    turn_tokens: int = 64
    tokens: int = 320
    learning_rate: float = 1.5e-4
    evaluated: int = 150
    pretraining: int = 500
    early_stop: float = 0.5
    wrong_relation: float = 0.07
    shape: dict[str, int] = field(default_factory=dict)

    @property
    def rollouts(self) -> int:
        """Of a step."""
        return self.prompts * self.generations

    @property
    def interval(self) -> int:
        """Steps between evaluations."""
        return self.steps // self.points


@dataclass(frozen=True)
class Base:
    """The folder of the model and tokenizer that both sides start from."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"


def make_base(budget: Budget, folder: Path, model: Path | None) -> Base:
    """The base of all seeds: random weights, or those of `model`, trained on noisy traces of these tasks."""
    base = Base(folder)
    if (base.model / "config.json").exists():
        return base
    settings = [f"model.random_init.{name}={value}" for name, value in budget.shape.items()]
    if model:
        settings = ["model.random_init=null", f"model.path={model}", "model.chat_template=chatml_hermes"]
        settings.append("pretrain.learning_rate=1.0e-4")
    config = load_config("quickstart", [*settings, f"pretrain.steps={budget.pretraining}"])
    tasks = LookupTasks(1000, budget.hops, TraceNoise(budget.early_stop, budget.wrong_relation))
    seed_generators(0)
    tokenizer = make_tokenizer(config.model, tasks)
    policy = make_model(config, tokenizer, path=model, device=torch.device("cpu"))
    pretrain(config, policy, make_renderer(config.model, tokenizer), tasks, lambda step, loss: None)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_save_pretrained(tokenizer, base.tokenizer)
    atomic_save_pretrained(policy, base.model)
    return base


def pact_config(budget: Budget, base: Base, rows: Path, out: Path, seed: int) -> Config:
    """The recipe `quickstart` with `grpo` on TRL's class; TRL's settings that mean the same are in `trl_settings`."""
    env = {"factory": f"{TASK_MODULE}:{Lookups.__name__}", "reward": [f"{TASK_MODULE}:success"]}
    settings = {
        "seed": seed,
        "output_dir": out,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "model.random_init": "null",
        "model.path": base.model,
        "model.tokenizer": base.tokenizer,
        "pretrain": "null",
        "data.train": rows,
        "data.shuffle": "false",
        "env": json.dumps({"name": "trl", "args": env}),
        "rollout.num_generations": budget.generations,
        "rollout.max_prompt_length": 512,
        "rollout.max_turns": budget.turns,
        "rollout.max_turn_tokens": budget.turn_tokens,
        "rollout.max_completion_length": budget.tokens,
        "rollout.max_batch_size": max(budget.rollouts, 2),
        "algorithm.name": "grpo",
        "algorithm.loss_type": "dapo",
        "algorithm.scale_rewards": "false",
        "trainer.max_steps": budget.steps,
        "trainer.prompts_per_step": budget.prompts,
        "trainer.learning_rate": budget.learning_rate,
        "trainer.lr_scheduler_type": "constant",
        "trainer.warmup_steps": 0,
        "trainer.save_steps": budget.interval,
        "trainer.save_total_limit": budget.points,
        "trainer.save_rollouts": 0,
        "trainer.log_completions": 0,
        "trainer.report_to": "none",
    }
    return load_config("quickstart", [f"{key}={value}" for key, value in settings.items()])


def run_pact(budget: Budget, base: Base, rows: Path, out: Path, seed: int) -> tuple[Phases, list[float], list[Path]]:
    """Train. Returns the times, the mean reward of every step, and the model of every evaluated step."""
    phases = Phases()
    with contextlib.ExitStack() as stack, silence():
        trainer = Trainer(pact_config(budget, base, rows, out, seed))
        watch_pact(stack, phases, budget.steps)
        trainer.train()
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = range(budget.interval, budget.steps + 1, budget.interval)
    models = [out / "checkpoints" / f"step_{step}" / "model" for step in steps]
    return phases, [entry["reward/mean"] for entry in metrics if "reward/mean" in entry], models


def watch_pact(stack: contextlib.ExitStack, phases: Phases, steps: int) -> None:
    """Measure training steps until `stack` closes. A step ends with its checkpoint."""
    watch = functools.partial(phases.watch, stack)
    watch(TransformersEngine, "step submit close", "generation")
    watch(AgentLoop, "run resolve_task trained_view", "agent loop")
    watch(Lookups, "reset _look_up", "environment")
    watch(Trl, "reward", "rewards")
    watch(RolloutCollector, "_score _advantages", "rewards")
    watch(Stepper, "_prompt_batches _metrics _on_all", "batch")
    watch(Learner, "_make_packs", "batch")
    watch(Learner, "prepare", "old log-probs")
    watch(Learner, "accumulate", "forward and backward")
    watch(Learner, "step", "optimizer")
    watch(TransformersEngine, "sleep update_weights", "weight sync")
    watch(Trainer, "_log_step _finish_save _maybe_evaluate_and_save", "logging and checkpoints")
    step, end = Stepper.__call__, Trainer._maybe_evaluate_and_save

    def timed_step(stepper: Stepper, number: int) -> Any:
        phases.start()
        return step(stepper, number)

    def timed_end(trainer: Trainer, state: Any) -> bool:
        stop = end(trainer, state)
        phases.end_step(state.step == steps)
        return stop

    replace(stack, Stepper, "__call__", timed_step)
    replace(stack, Trainer, "_maybe_evaluate_and_save", timed_end)


def replace(stack: contextlib.ExitStack, owner: type, name: str, function: Any) -> None:
    """Set a method of a class until `stack` closes."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, function)


def success_of(model: Path, base: Base, budget: Budget, rows: Path, seed: int) -> float:
    """Success of sampled rollouts on the tasks of a file: the same tasks and random numbers for every model of a seed."""
    config = pact_config(budget, base, rows, model, seed)
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": str(model)}),
            "data": config.data.model_copy(update={"eval": str(rows)}),
            "rollout": config.rollout.model_copy(update={"max_batch_size": 256}),
        }
    )
    with silence():
        session = make_session(config, make_tasks(config))
        try:
            tasks = session.tasks.held_out(budget.evaluated)
            return success_rate(evaluate(session.loop, tasks, sampling=Sampling(1.0), seed=seed)).mean
        finally:
            session.close()


@contextlib.contextmanager
def silence() -> Any:
    """Both trainers print progress."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
