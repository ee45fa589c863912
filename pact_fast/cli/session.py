"""`pact-fast eval` and `pact-fast rollout`: a model and tasks, no training."""

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
from pact_fast.envs.registry import EnvironmentFactory, make_tasks
from pact_fast.errors import PactError
from pact_fast.model.build import check_context, make_policy
from pact_fast.model.device import pick_device, precision
from pact_fast.model.tokenizer import make_tokenizer
from pact_fast.rollout.agent import AgentLoop
from pact_fast.rollout.registry import make_engine
from pact_fast.train.checkpoint import run_weights
from pact_fast.train.evaluate import evaluate, reward_means, success_rate
from pact_fast.train.progress import Progress
from pact_fast.train.records import rollout_record


@dataclass
class Policy:
    """A model ready to act."""

    config: Config
    renderer: ChatRenderer
    loop: AgentLoop
    tasks: TaskSource

    def close(self) -> None:
        self.loop.close()
        self.loop.engine.shutdown()


def load_policy(source: str, settings: Sequence[str]) -> Policy:
    """From a run directory (its newest complete checkpoint) or a recipe."""
    run = Path(source)
    base: Path | None = None
    weights: Path | None = None
    saved: Path | None = None
    if run.is_dir():
        if not (run / "config.yaml").exists():
            raise PactError(f"{run} is no run directory: it has no config.yaml")
        config = load_config(str(run / "config.yaml"), list(settings))
        (base, weights), saved = run_weights(run), run / "tokenizer"
        if not base and not weights:
            raise PactError(
                f"{run} has no complete checkpoint yet; wait for the first one (trainer.save_steps) or train it"
            )
    else:
        config = load_config(source, list(settings))
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config)
    tasks = make_tasks(config)
    tokenizer = make_tokenizer(config.model, tasks, saved)
    renderer = make_renderer(config.model, tokenizer)
    check_template(renderer)
    model = make_policy(config, tokenizer, base=base, checkpoint=weights, device=device).eval()
    check_context(config, model)
    engine = make_engine(config, model, renderer, autocast=precision(config, device))
    engine.update_weights(model, 0)
    return Policy(config, renderer, AgentLoop(engine, renderer, EnvironmentFactory(config), config.rollout), tasks)


def evaluate_command(source: str, settings: Sequence[str], out: Path | None) -> int:
    policy = load_policy(source, settings)
    tasks = _tasks(policy, "eval", policy.config.trainer.eval_tasks)
    progress = Progress()
    result: dict[str, object] = {"source": source, "tasks": len(tasks)}
    for name, temperature in (("sampled", policy.config.rollout.temperature), ("greedy", 0.0)):
        with progress.rollouts(len(tasks), name) as advance:
            trajectories = evaluate(
                policy.loop, tasks, temperature=temperature, seed=policy.config.seed, on_finish=lambda i, t: advance()
            )
        rate = success_rate(trajectories)
        result[name] = {"success": rate.to_json(), **reward_means(trajectories)}
        progress.note(
            f"{name:8} success {rate}  " + "  ".join(f"{k} {v:.3f}" for k, v in reward_means(trajectories).items())
        )
    progress.close()
    policy.close()
    print(json.dumps(result, indent=2))
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def rollout_command(source: str, settings: Sequence[str], count: int, split: str, out: Path | None) -> int:
    policy = load_policy(source, settings)
    tasks = _tasks(policy, split, count)
    progress = Progress()
    with progress.rollouts(len(tasks)) as advance:
        trajectories = evaluate(
            policy.loop, tasks, temperature=policy.config.rollout.temperature, seed=policy.config.seed,
            on_finish=lambda i, t: advance(),
        )  # fmt: skip
    progress.close()
    policy.close()
    records = [
        rollout_record(policy.renderer, task, t, step=0, kind="eval")
        for task, t in zip(tasks, trajectories, strict=True)
    ]
    if out:
        out.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        print(f"{len(records)} rollouts written to {out}")
        return 0
    from pact_fast.report.console import print_rollout

    for record in records:
        print_rollout(record)
    return 0


def _tasks(policy: Policy, split: str, count: int) -> list[Task]:
    tasks = policy.tasks.train(0, count) if split == "train" else policy.tasks.held_out(count)
    if not tasks:
        raise PactError("there are no held-out tasks; set data.eval, or use --split train")
    return tasks
