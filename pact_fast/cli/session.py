"""`pact-fast eval` and `pact-fast rollout`: sample from a model without training it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pact_fast.chat.rendering import ChatRenderer, make_renderer
from pact_fast.chat.template_check import check_template
from pact_fast.config import Config, load_config
from pact_fast.data.sources import TaskSource
from pact_fast.data.types import Task
from pact_fast.envs.registry import EnvironmentFactory, environment, environment_name, make_tasks
from pact_fast.errors import PactError
from pact_fast.files import write_named
from pact_fast.model.build import check_context, make_policy
from pact_fast.model.device import pick_device, precision
from pact_fast.model.tokenizer import make_tokenizer
from pact_fast.rollout.agent import AgentLoop
from pact_fast.rollout.registry import make_engine
from pact_fast.train.check_rows import check_environment
from pact_fast.train.checkpoint import run_weights
from pact_fast.train.evaluate import evaluate, evaluation_kinds, reward_means, success_rate
from pact_fast.train.progress import Progress
from pact_fast.train.records import rollout_record
from pact_fast.train.user_model import with_frozen_model
from pact_fast.users.endpoint import ANSWERS, EndpointUsers


@dataclass
class Session:
    """A model, its engine and tasks, ready to sample.

    config    resolved configuration
    renderer  chat renderer of the model
    loop      agent loop on a running engine
    tasks     source of training and held-out tasks
    users     those that a language model behind an endpoint plays, if one does
    """

    config: Config
    renderer: ChatRenderer
    loop: AgentLoop
    tasks: TaskSource
    users: EndpointUsers | None = None

    def select(self, split: str, count: int) -> list[Task]:
        """`count` tasks of "train" or "eval". PactError if there are no held-out tasks."""
        tasks = self.tasks.train(0, count) if split == "train" else self.tasks.held_out(count)
        if not tasks:
            raise PactError("there are no held-out tasks; set data.eval, or use --split train")
        for task in tasks:
            self._check(task)
        return tasks

    def _check(self, task: Task) -> None:
        """DataError if the task does not meet the requirements of its environment; training checks rows completely."""
        name = task.env or environment_name(self.config.env, self.config.data)
        check_environment(task, environment.get(name))

    def close(self) -> None:
        """Stop the agent loop and the engine."""
        self.loop.close()
        if self.users:
            self.users.close()
        self.loop.engine.shutdown()


def open_session(source: str, settings: Sequence[str]) -> Session:
    """Load a model and start its engine.

    Args:
        source: A run directory (its newest complete checkpoint, else its base model), a recipe or a YAML file.
        settings: `key=value` overrides.

    Raises:
        PactError: `source` is none of these, or the run has no model yet.
    """
    run = Path(source) if Path(source).is_dir() else None
    if run and not (run / "config.yaml").exists():
        raise PactError(f"{run} is not a run directory: it has no config.yaml")
    config = load_config(str(run / "config.yaml") if run else source, list(settings))
    return make_session(config, make_tasks(config), run, answers=run / ANSWERS if run else None)


def make_session(config: Config, tasks: TaskSource, run: Path | None = None, *, answers: Path | None = None) -> Session:
    """Load the model of a configuration and start its engine.

    Args:
        config: The configuration.
        tasks: Source of the session's tasks.
        run: The run directory whose newest model and tokenizer are taken; None: those that the configuration names.
        answers: Where answers of a user behind an endpoint are kept, unless `rollout.user_llm` says where.

    Raises:
        PactError: The run has no model yet, or a part of the configuration cannot be had.
    """
    base: Path | None = None
    weights: Path | None = None
    if run:
        base, weights = run_weights(run)
        if not base and not weights:
            raise PactError(
                f"{run} has no complete checkpoint yet; wait for the first one (trainer.save_steps) or train it"
            )
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config)
    tokenizer = make_tokenizer(config.model, tasks, run / "tokenizer" if run else None)
    renderer = make_renderer(config.model, tokenizer)
    check_template(renderer)
    model = make_policy(config, tokenizer, base=base, checkpoint=weights, device=device).eval()
    check_context(config, model)
    autocast = precision(config, device)
    engine = make_engine(config, model, renderer, autocast=autocast)
    engine = with_frozen_model(engine, config, tokenizer, renderer, run, device=device, autocast=autocast)
    engine.update_weights(model, 0)
    users = EndpointUsers.of(config.rollout, answers)
    loop = AgentLoop(engine, renderer, EnvironmentFactory(config), config.rollout, users)
    return Session(config, renderer, loop, tasks, users)


def evaluate_command(source: str, settings: Sequence[str], out: Path | None) -> int:
    """`pact-fast eval`: print success rates as JSON, and write them to `out` if given."""
    session = open_session(source, settings)
    tasks = session.select("eval", session.config.trainer.eval_tasks)
    progress = Progress()
    result: dict[str, object] = {"source": source, "tasks": len(tasks)}
    for name, sampling in evaluation_kinds(session.config).items():
        with progress.rollouts(len(tasks), name) as advance:
            trajectories = evaluate(
                session.loop, tasks, sampling=sampling, seed=session.config.seed, on_finish=lambda i, t: advance()
            )
        rate = success_rate(trajectories)
        means = reward_means(trajectories)
        result[name] = {
            **sampling.to_json(), "samples": len(trajectories), "success": None,
            "interval": [rate.low, rate.high] if rate.n else None, **means,
        }  # fmt: skip
        parts = "  ".join(f"{k} {v:.3f}" for k, v in means.items())
        progress.note(f"{sampling}, {len(trajectories)} samples: success {rate}  {parts}")
    progress.close()
    session.close()
    text = json.dumps(result, indent=2)
    if out:
        write_named(out, text + "\n")  # first: the reader of stdout may have closed it
    print(text)
    return 0


def rollout_command(source: str, settings: Sequence[str], count: int, split: str, out: Path | None) -> int:
    """`pact-fast rollout`: sample one trajectory for each of `count` tasks; print them or write JSONL to `out`."""
    session = open_session(source, settings)
    tasks = session.select(split, count)
    progress = Progress()
    with progress.rollouts(len(tasks)) as advance:
        trajectories = evaluate(
            session.loop, tasks, sampling=evaluation_kinds(session.config)["sampled"], seed=session.config.seed,
            on_finish=lambda i, t: advance(),
        )  # fmt: skip
    progress.close()
    session.close()
    records = [
        rollout_record(session.renderer, task, t, step=0, kind="eval")
        for task, t in zip(tasks, trajectories, strict=True)
    ]
    if out:
        write_named(out, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        print(f"{len(records)} rollouts written to {out}")
        return 0
    from pact_fast.report.console import print_rollout

    for record in records:
        print_rollout(record)
    return 0
