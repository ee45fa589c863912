"""The training loop: rollout → rewards → plans → optimizer steps → evaluation → checkpoint.

Everything random is a function of (seed, step, place), never of what ran before, and nothing depends on how fast a tool
answered. So a run that is killed and resumed repeats the steps it lost bit for bit (on CPU, with the same number of threads).
"""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from pact_fast.algorithms import make_algorithm
from pact_fast.algorithms.base import Group, Plan, Update
from pact_fast.config import Config
from pact_fast.data.types import Task, Trajectory
from pact_fast.report.console import rollout_table, summary_table
from pact_fast.rewards.advantages import token_advantages
from pact_fast.rewards.functions import call_reward_functions, load_reward_functions
from pact_fast.rewards.trajectory import compute_rewards
from pact_fast.rollout.agent import AgentLoop, Job
from pact_fast.rollout.factory import make_engine
from pact_fast.trainer import checkpoint, lora, setup
from pact_fast.trainer.ahead import Ahead
from pact_fast.trainer.evaluate import Rate, evaluate, reward_means, success_rate
from pact_fast.trainer.learner import Learner, UpdateResult
from pact_fast.trainer.metrics import MetricsWriter, control_token_prob, rollout_metrics, update_metrics
from pact_fast.trainer.pretrain import pretrain
from pact_fast.trainer.progress import Progress
from pact_fast.trainer.rundir import open_run, rollout_record, save_whole, versions, write_rollouts, write_text


class Trainer:
    """Builds a run from its configuration and trains it.

    summary = Trainer(load_config("quickstart")).train()
    """

    def __init__(self, config: Config):
        self.started = time.time()
        self.config = config
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = setup.pick_device(config)
        self.tasks = setup.make_tasks(config)
        self.run = open_run(config)
        self.reward_functions = load_reward_functions(config.algorithm.reward.functions)
        self.make_env = setup.make_environments(config)
        saved = self.run / "tokenizer"
        self.tokenizer = setup.make_tokenizer(config.model, self.tasks, saved)
        self.renderer = setup.make_renderer(config.model, self.tokenizer)
        self.renderer.check()
        if not saved.exists():
            save_whole(self.tokenizer, saved)
        self.progress = Progress()

    def train(self) -> dict[str, Any]:
        """Train to the end; returns (and writes) the summary."""
        started = self.started
        found = checkpoint.latest(self.run / "checkpoints") if self.config.resume == "auto" else None
        self._assemble(*self._models(found))
        first, elapsed, base = 0, 0.0, None
        if found:
            first, elapsed, base = self._restore(found)
        else:
            checkpoint.rewind_metrics(self.run / "metrics.jsonl", 0)
        self.metrics = MetricsWriter(self.run, first)
        self.ahead = Ahead(self._rollouts, self.config.trainer.max_steps, self.config.trainer.max_off_policy_steps)
        try:
            self.engine.update_weights(self.model, self.learner.updates)
            if base is None:
                base = self._evaluate(0, "base")
            for step in range(first, self.config.trainer.max_steps):
                self._step(step)
                self._after(step + 1, base, elapsed + time.time() - started)
            return self._finish(base, elapsed + time.time() - started)
        finally:
            self.ahead.close()
            self.progress.close()
            self.metrics.close()
            self.loop.close()
            self.engine.shutdown()

    # -- building ------------------------------------------------------------------------------------------------------------

    def _models(self, found: Path | None) -> tuple[PreTrainedModel, PreTrainedModel | None]:
        """The policy, from a checkpoint or from the start, and the frozen reference if there is a KL term."""
        config = self.config
        base_dir = self.run / "base"
        if config.pretrain and not (base_dir / "config.json").exists():
            self._pretrain(base_dir)
        start = base_dir if config.pretrain else None
        model = setup.make_policy(
            config, self.tokenizer, base=start, checkpoint=found and found / "model", device=self.device
        )
        setup.check_context(config, model)
        if not config.algorithm.beta:
            return model, None
        if config.model.lora:
            return model, model  # its adapters are off while it is the reference
        reference = setup.make_model(config, self.tokenizer, path=start, device=self.device)
        return model, reference.eval().requires_grad_(False)

    def _pretrain(self, target: Path) -> None:
        """Make the base model; the folder appears only when it is complete."""
        config = self.config
        assert config.pretrain is not None
        model = setup.make_model(config, self.tokenizer, device=self.device)
        with self.progress.phase("base model", config.pretrain.steps) as advance:
            pretrain(config, model, self.renderer, self.tasks, lambda step, loss: advance(f"loss {loss:.3f}"))
        save_whole(model, target)

    def _assemble(self, model: PreTrainedModel, reference: PreTrainedModel | None) -> None:
        config = self.config
        autocast = setup.precision(config, self.device)
        self.model = model
        self.engine = make_engine(config, model, self.renderer, folder=self.run, autocast=autocast)
        self.loop = AgentLoop(self.engine, self.renderer, self.make_env, config.rollout)
        self.algorithm = make_algorithm(config.algorithm)
        per_update = config.trainer.prompts_per_update or config.trainer.prompts_per_step
        self.updates_per_step = config.trainer.prompts_per_step // per_update
        self.learner = Learner(
            model,
            config.trainer,
            config.algorithm,
            total_updates=config.trainer.max_steps * self.updates_per_step,
            shares_batches=self.updates_per_step > 1,
            temperature=config.rollout.temperature,
            reference=reference,
            autocast=autocast,
            foreign_sampler=config.rollout.engine == "vllm",
        )

    def _restore(self, found: Path) -> tuple[int, float, dict[str, Any] | None]:
        saved = checkpoint.load(found)
        names = self._parameter_names()
        checkpoint.load_optimizer(self.learner.optimizer, names, saved.tensors["optimizer"], saved.state["optimizer"])
        checkpoint.set_rng_state(saved.state["rng"], saved.tensors["rng"])
        self.learner.updates = saved.state["updates"]
        checkpoint.rewind_metrics(self.run / "metrics.jsonl", saved.state["metrics_bytes"])
        self.progress.note(f"resuming {self.run} from step {saved.step}")
        return saved.step, saved.state["wall_seconds"], saved.state["base"]

    def _parameter_names(self) -> dict[torch.Tensor, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}

    # -- one step ------------------------------------------------------------------------------------------------------------

    def _step(self, step: int) -> None:
        config = self.config
        started = time.perf_counter()
        groups, lagging = self._fresh(step, self.ahead.get(step))
        rollout_seconds = time.perf_counter() - started
        before = self.learner.updates
        self.engine.sleep()
        plans, results, schedule = self._update(step, groups)
        sync = time.perf_counter()
        self.engine.update_weights(self.model, self.learner.updates)
        sync_seconds = time.perf_counter() - sync
        seconds = time.perf_counter() - started
        sampled = sum(int(t.sampled.sum()) for g in groups for t in g.trajectories)
        values = {
            **rollout_metrics(groups),
            **control_token_prob(groups, self.renderer.control_ids),
            **update_metrics(results),
            **schedule,
            "learning_rate": self.learner.learning_rate(),
            "routes/trace_share": float(np.mean([plan.route in ("trace", "blend") for plan in plans])),
            "async/lagging_groups": float(lagging),
            "async/staleness": self._staleness(groups, before),
            "time/rollout": rollout_seconds,
            "time/weight_sync": sync_seconds,
            "time/step": seconds,
            "tokens_per_second": (sampled or sum(r.tokens for r in results)) / seconds,
        }
        self.metrics.write(step + 1, values)
        self.progress.step(step + 1, config.trainer.max_steps, values)
        self._keep_rollouts(step + 1, plans)

    def _fresh(self, step: int, groups: list[Group]) -> tuple[list[Group], int]:
        """The groups, and how many of them lagged: those sampled by weights that are too old are sampled again."""
        oldest = self.learner.updates - self.config.trainer.max_off_policy_steps * self.updates_per_step
        lagging = [g.index for g in groups if any((t.versions[t.sampled] < oldest).any() for t in g.trajectories)]
        if lagging:
            tasks = [groups[index].task for index in lagging]
            for index, group in zip(lagging, self.ahead.run(lambda: self._rollouts(step, tasks)), strict=True):
                group.index = index
                groups[index] = group
        return groups, len(lagging)

    def _rollouts(self, step: int, tasks: list[Task] | None = None) -> list[Group]:
        """Sample, reward and compute advantages, prompt by prompt; `tasks`: default, those of the step."""
        config = self.config
        if tasks is None:
            tasks = self.tasks.train(step, config.trainer.prompts_per_step)
        tasks = [self.loop.prepare(task)[0] for task in tasks]
        groups = [Group(task, index, self.loop.prompt_ids(task)) for index, task in enumerate(tasks)]
        if not self.algorithm.needs_rollouts:
            return groups
        count = config.rollout.num_generations
        jobs = [
            Job(group.task, (config.seed, step, group.index, k), config.rollout.temperature)
            for group in groups
            for k in range(count)
        ]
        with self.progress.rollouts(len(jobs)) as advance:
            trajectories = self.loop.run(jobs, lambda index, trajectory: advance())
        for group in groups:
            group.trajectories = trajectories[group.index * count : (group.index + 1) * count]
        self._reward(groups)
        for group in groups:
            self._advantages(group)
        return groups

    def _staleness(self, groups: list[Group], updates: int) -> float:
        """Mean age in steps of the weights that sampled the step's tokens."""
        versions = [t.versions[t.sampled] for group in groups for t in group.trajectories]
        found = np.concatenate(versions) if versions else np.zeros(0)
        return float(updates - found.mean()) / self.updates_per_step if len(found) else 0.0

    def _reward(self, groups: list[Group]) -> None:
        pairs = [(group.task, t) for group in groups for t in group.trajectories]
        trajectories = [t for _, t in pairs]
        extra = call_reward_functions(
            self.reward_functions, [task for task, _ in pairs], trajectories, [t.to_messages() for t in trajectories]
        )
        for (task, trajectory), functions in zip(pairs, extra, strict=True):
            compute_rewards(self.config.algorithm.reward, task, trajectory, dict(trajectory.reward_parts), functions)
            if not self.algorithm.turn_advantages and "success" in trajectory.reward_parts:
                # outcome only: the environment's verdict instead of the matching
                trajectory.reward = trajectory.reward_parts["success"] + sum(functions.values())

    def _advantages(self, group: Group) -> None:
        reward = self.config.algorithm.reward
        group.advantages = token_advantages(
            group.trajectories,
            gamma=reward.gamma,
            combine=reward.combine,
            scale=self.config.algorithm.scale_rewards,
            use_turns=self.algorithm.turn_advantages,
        )

    def _update(self, step: int, groups: list[Group]) -> tuple[list[Plan], list[UpdateResult], dict[str, float]]:
        config = self.config
        size = len(groups) // self.updates_per_step
        plans: list[Plan] = []
        # all routes are drawn, and all weights fixed, before the first optimizer step of the batch
        for start in range(0, len(groups), size):
            members = groups[start : start + size]
            update = Update(
                config=config.algorithm,
                renderer=self.renderer,
                seed=config.seed,
                step=step,
                horizon=config.trainer.max_steps,
                prompts=len(members),
                sampled_tokens=sum(int(t.sampled.sum()) for g in members for t in g.trajectories),
                max_completion_length=config.rollout.max_completion_length,
            )
            plans += [self.algorithm.plan(group, update) for group in members]
        self.learner.prepare(plans)
        results = []
        for start in range(0, len(groups), size):
            results.append(self.learner.update(plans[start : start + size]))
        return plans, results, self.algorithm.schedule(update)

    # -- between steps -------------------------------------------------------------------------------------------------------

    def _after(self, done: int, base: dict[str, Any] | None, wall_seconds: float) -> None:
        trainer = self.config.trainer
        if trainer.eval_steps and done % trainer.eval_steps == 0 and done < trainer.max_steps:
            self._evaluate(done, "eval")
        if done % trainer.save_steps == 0 or done == trainer.max_steps:
            self._save(done, base, wall_seconds)

    def _save(self, step: int, base: dict[str, Any] | None, wall_seconds: float) -> None:
        names = self._parameter_names()
        tensors, optimizer = checkpoint.optimizer_tensors(self.learner.optimizer, names)
        rng_state, rng_tensors = checkpoint.rng_state()

        def write_model(path: Path) -> None:
            if self.config.model.lora:
                lora.save(self.model, path, self.config.model.lora)
            else:
                self.model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)

        state = {
            "optimizer": optimizer,
            "rng": rng_state,
            "updates": self.learner.updates,
            "wall_seconds": wall_seconds,
            "base": base,
            "metrics_bytes": (self.run / "metrics.jsonl").stat().st_size,
        }
        checkpoint.save(
            self.run / "checkpoints", step, tensors={"optimizer": tensors, "rng": rng_tensors}, state=state,
            write_model=write_model, keep=self.config.trainer.save_total_limit,
        )  # fmt: skip

    def _evaluate(self, step: int, label: str, greedy: bool = True) -> dict[str, Any] | None:
        """Sampled (temperature 1) and greedy success on held-out tasks; None when there are none."""
        tasks = self.tasks.held_out(self.config.trainer.eval_tasks)
        if not tasks:
            return None
        results: dict[str, Rate] = {}
        values: dict[str, float] = {}
        for name, temperature in (("success", 1.0), ("greedy", 0.0)):
            with self.progress.rollouts(len(tasks), f"{label}: {name}") as advance:
                trajectories = self.ahead.run(
                    functools.partial(
                        evaluate, self.loop, tasks, temperature=temperature, seed=self.config.seed,
                        on_finish=lambda i, t: advance(),
                    )
                )  # fmt: skip
            results[name] = success_rate(trajectories)
            values |= {f"eval/{name}": results[name].mean}
            values |= {
                f"eval/{name}/{key}": value for key, value in reward_means(trajectories).items() if key != "success"
            }
            if name == "success":
                self._show(step, tasks, trajectories)
        self.metrics.write(step, values)
        self.progress.note(f"{label} at step {step}: sampled {results['success']}, greedy {results['greedy']}")
        return {name: rate.to_json() for name, rate in results.items()}

    def _show(self, step: int, tasks: list[Task], trajectories: list[Trajectory]) -> None:
        keep = self.config.trainer.rollout_keep
        records = [
            rollout_record(self.renderer, task, t, step=step, kind="eval")
            for task, t in list(zip(tasks, trajectories, strict=True))[:keep]
        ]
        write_rollouts(self.run, step, "eval", records)
        if records and self.config.trainer.log_completions:
            self.progress.print(rollout_table(records, limit=self.config.trainer.log_completions))

    def _keep_rollouts(self, step: int, plans: list[Plan]) -> None:
        """The first rollouts of the prompts in turn, so that every prompt is seen before any is seen twice."""
        places = sorted((k, p) for p, plan in enumerate(plans) for k in range(len(plan.group.trajectories)))
        records = [
            rollout_record(
                self.renderer,
                plans[p].group.task,
                plans[p].group.trajectories[k],
                step=step,
                kind="train",
                plan=plans[p],
                k=k,
            )
            for k, p in places[: self.config.trainer.rollout_keep]
        ]
        write_rollouts(self.run, step, "train", records)

    def _finish(self, base: dict[str, Any] | None, wall_seconds: float) -> dict[str, Any]:
        from pact_fast.report import write_report

        started = time.time()
        final = self._evaluate(self.config.trainer.max_steps, "trained")
        summary: dict[str, Any] = {
            "recipe": self.run.name,
            "algorithm": self.config.algorithm.name,
            "steps": self.config.trainer.max_steps,
            "base_success": base and base["success"],
            "success": final and final["success"],
            "base_greedy": base and base["greedy"],
            "greedy": final and final["greedy"],
            "wall_seconds": round(wall_seconds + time.time() - started, 1),
            "seed": self.config.seed,
            "versions": versions(),
        }
        write_text(self.run / "summary.json", json.dumps(summary, indent=2) + "\n")
        report = write_report(self.run)
        self.progress.print(summary_table(summary))
        self.progress.note(f"report: {report}")
        return summary
