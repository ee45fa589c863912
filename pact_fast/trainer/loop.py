"""The training loop: rollout → rewards → plans → optimizer steps → evaluation → checkpoint.

Everything random is a function of (seed, step, place), never of what ran before, and nothing depends on how fast a tool
answered. So a run that is killed and resumed repeats the steps it lost bit for bit (on CPU, with the same number of threads).

Several processes (docs/scaling.md) go through all of this together: each samples its share of the rollouts, all of them
get all rollouts, and from there on everybody computes the same plans. The lead process writes and speaks.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from pact_fast.algorithms import make_algorithm
from pact_fast.algorithms.base import Group, Plan, Update
from pact_fast.config import Config
from pact_fast.data.types import Task, Trajectory
from pact_fast.distributed.world import join
from pact_fast.errors import PactError
from pact_fast.report.console import rollout_table, summary_table
from pact_fast.rewards.advantages import token_advantages
from pact_fast.rewards.functions import call_reward_functions, load_reward_functions
from pact_fast.rewards.trajectory import compute_rewards
from pact_fast.rollout.adapter import adapter_tensors
from pact_fast.rollout.agent import AgentLoop, Job
from pact_fast.rollout.factory import make_engine, samplers
from pact_fast.rollout.weights import checkpoint_weights, save_settings
from pact_fast.trainer import checkpoint, lora, setup
from pact_fast.trainer.ahead import Ahead
from pact_fast.trainer.evaluate import Rate, evaluation_jobs, outcome_reward, reward_means, success_rate
from pact_fast.trainer.learner import Learner, PacksTooLarge, UpdateResult
from pact_fast.trainer.metrics import MetricsWriter, control_token_prob, rollout_metrics, update_metrics
from pact_fast.trainer.pretrain import pretrain
from pact_fast.trainer.progress import Progress
from pact_fast.trainer.rundir import open_run, rollout_record, save_whole, versions, write_rollouts, write_text, writing
from pact_fast.trainer.stopping import Stopped, StopRequest


class Trainer:
    """Builds a run from its configuration and trains it.

    summary = Trainer(load_config("quickstart")).train()
    """

    def __init__(self, config: Config):
        self.started = time.monotonic()
        self.config = config
        if config.threads:
            torch.set_num_threads(config.threads)
        kind = setup.device_kind(config)
        trainer = config.trainer
        self.world = join(kind, timeout=trainer.ddp_timeout, sequence_parallel=trainer.sequence_parallel_size)
        self.device = torch.device(kind, self.world.local_rank) if kind == "cuda" else torch.device(kind)
        self.tasks = setup.make_tasks(config)
        self.run = Path(config.output_dir)
        self._lead_first(lambda: open_run(config), "the run directory")
        self.reward_functions = load_reward_functions(config.algorithm.reward.functions)
        self.make_env = setup.make_environments(config)
        self._lead_first(self._save_tokenizer, "the tokenizer")
        self.tokenizer = setup.make_tokenizer(config.model, self.tasks, self.run / "tokenizer")
        self.renderer = setup.make_renderer(config.model, self.tokenizer)
        self.renderer.check()
        self.skipped = 0  # updates in a row
        self.progress = Progress(quiet=not self.world.lead)
        self._pack_limit = self.run / "max_tokens_per_pack"  # after an update that ran out of memory
        self._choose_pack_tokens()

    def train(self) -> dict[str, Any] | None:
        """Train to the end; returns (and writes) the summary. None if the run was asked to stop before (SIGTERM).

        Asked while there is nothing to save, before the first step or after the last, it raises Stopped, a SystemExit.
        """
        with StopRequest() as self.stop:
            try:
                return self._train()
            except Stopped:
                self.progress.note("asked to stop, and nothing had to be saved; go on with resume=auto")
                raise
            finally:
                self.progress.close()

    def _train(self) -> dict[str, Any] | None:
        found = self._newest()
        self._assemble(*self._models(found))
        first, elapsed, base, owed = 0, 0.0, None, False
        if found:
            first, elapsed, base, owed = self._restore(found)
        elif self.world.lead:
            checkpoint.rewind_metrics(self.run / "metrics.jsonl", 0)
        began = self.started - elapsed
        self.metrics = MetricsWriter(self.run, first) if self.world.lead else None
        self.ahead = Ahead(self._sample, self.config.trainer.max_steps, self.config.trainer.max_off_policy_steps)
        try:
            self.engine.update_weights(self.model, self.learner.updates)
            if base is None:
                base = self._evaluate(0, "base")
            if owed:
                self._evaluate(first, "eval")
            self.stop.patient = True  # from here on there is a step to be saved
            for step in range(first, self.config.trainer.max_steps):
                self._step(step)
                if self._after(step + 1, base, time.monotonic() - began):
                    return None
            self.stop.patient = False
            return self._finish(base, began)
        except PacksTooLarge as error:
            write_text(self._pack_limit, str(error.tokens))
            raise
        finally:
            self.ahead.close()
            if self.metrics:
                self.metrics.close()
            self.loop.close()
            self.engine.shutdown()

    # -- building ------------------------------------------------------------------------------------------------------------

    def _lead_first(self, make: Callable[[], object], what: str) -> None:
        """Something on disk that the lead process makes, and the others then find. Its error is everybody's."""

        def attempt() -> str | None:
            try:
                make()
            except PactError as error:
                return str(error)
            return None

        problem = self.world.from_lead(attempt, what)
        if problem is not None:
            raise PactError(problem)

    def _choose_pack_tokens(self) -> None:
        """trainer.max_tokens_per_pack: null becomes a number, and what has once been too large is not tried again."""
        trainer = self.config.trainer
        if self._pack_limit.exists():
            known = int(self._pack_limit.read_text())
            trainer.max_tokens_per_pack = min(known, trainer.max_tokens_per_pack or known)
        if trainer.max_tokens_per_pack is not None:
            return
        from pact_fast.planning.memory import fitting_pack_tokens

        free = setup.free_memory(self.device)
        found = fitting_pack_tokens(self.config, self.world.size, self.device.type, free)
        trainer.max_tokens_per_pack = min(self.world.gather(found, "the size of packs"))
        self.progress.note(
            f"packs have at most {trainer.max_tokens_per_pack} tokens (trainer.max_tokens_per_pack=null)"
        )

    def _newest(self) -> Path | None:
        """The checkpoint to go on from, the same for all processes."""
        if self.config.resume != "auto":
            return None

        def find() -> str | None:
            found = checkpoint.latest(self.run / "checkpoints")
            return str(found) if found else None

        path = self.world.from_lead(find, "the newest checkpoint")
        return Path(path) if path else None

    def _save_tokenizer(self) -> None:
        saved = self.run / "tokenizer"
        if not saved.exists():
            save_whole(setup.make_tokenizer(self.config.model, self.tasks, saved), saved)

    def _models(self, found: Path | None) -> tuple[PreTrainedModel, PreTrainedModel | None]:
        """The policy, from a checkpoint or from the start, and the frozen reference if there is a KL term."""
        config = self.config
        base_dir = self.run / "base"
        if config.pretrain:
            with nullcontext() if self.world.lead else self.stop.suspended():
                self._lead_first(lambda: self._pretrain(base_dir), "the base model")
        start = base_dir if config.pretrain else None
        model = setup.make_policy(
            config, self.tokenizer, base=start, checkpoint=found and found / "model", device=self.device,
            split=self.world.size > 1,
        )  # fmt: skip
        setup.check_context(config, model)
        if not config.algorithm.beta:
            return model, None
        if config.model.lora:
            return model, model  # its adapters are off while it is the reference
        several = self.world.size > 1
        reference = setup.make_model(config, self.tokenizer, path=start, device=self.device, split=several)
        return model, reference.eval().requires_grad_(False)

    def _pretrain(self, target: Path) -> None:
        """Make the base model, if it is not there; the folder appears only when it is complete."""
        config = self.config
        if (target / "config.json").exists():
            return
        assert config.pretrain is not None
        model = setup.make_model(config, self.tokenizer, device=self.device)
        with self.progress.phase("base model", config.pretrain.steps) as advance:
            pretrain(config, model, self.renderer, self.tasks, lambda step, loss: advance(f"loss {loss:.3f}"))
        save_whole(model, target)

    def _assemble(self, model: PreTrainedModel, reference: PreTrainedModel | None) -> None:
        config = self.config
        autocast = setup.precision(config, self.device)
        self.model = model
        self.samplers = samplers(config, self.world)
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
            world=self.world,
            dtype=config.model.dtype,
        )
        # after the learner, which may split the model over processes
        self.engine = make_engine(config, model, self.renderer, folder=self.run, autocast=autocast, world=self.world)
        self.loop = AgentLoop(self.engine, self.renderer, self.make_env, config.rollout)

    def _restore(self, found: Path) -> tuple[int, float, dict[str, Any] | None, bool]:
        """(steps done, seconds, the base's evaluation, whether the evaluation after the last step is still to be done)."""
        saved = checkpoint.load(found)
        self.learner.backend.load_state(saved.tensors["optimizer"])
        checkpoint.set_rng_state(saved.state["rng"], saved.tensors["rng"])
        self.learner.updates = saved.state["updates"]
        if self.world.lead:
            checkpoint.rewind_metrics(self.run / "metrics.jsonl", saved.state["metrics_bytes"])
        self.progress.note(f"resuming {self.run} from step {saved.step}")
        state = saved.state
        return saved.step, state["wall_seconds"], state["base"], state.get("owes_evaluation", False)

    # -- one step ------------------------------------------------------------------------------------------------------------

    def _step(self, step: int) -> None:
        config = self.config
        started = time.perf_counter()
        groups, lagging = self._fresh(step, self._exchange(self.ahead.get(step)))
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
            "updates/skipped": float(sum(result.skipped for result in results)),
            "routes/trace_share": float(np.mean([plan.route in ("trace", "blend") for plan in plans])),
            "async/lagging_groups": float(lagging),
            "async/staleness": self._staleness(groups, before),
            "time/rollout": rollout_seconds,
            "time/weight_sync": sync_seconds,
            "time/step": seconds,
            "tokens_per_second": (sampled or sum(r.tokens for r in results)) / seconds,
        }
        if self.metrics:
            self.metrics.write(step + 1, values)
        self.progress.step(step + 1, config.trainer.max_steps, values)
        self._keep_rollouts(step + 1, plans)
        self._check_skipped(step + 1, plans, results)

    def _check_skipped(self, step: int, plans: list[Plan], results: list[UpdateResult]) -> None:
        """An update whose loss or gradient was not finite has changed nothing; its batch is kept to be looked at."""
        for result in results:
            self.skipped = self.skipped + 1 if result.skipped else 0
        if not any(result.skipped for result in results):
            return
        kept = self.run / "rollouts" / f"skipped_{step:06d}.jsonl"
        places = [(k, p) for p, plan in enumerate(plans) for k in range(len(plan.group.trajectories))]
        self._write_rollouts(step, "skipped", plans, places)
        self.progress.note(
            f"step {step}: loss or gradient is not finite; the update is skipped, its batch is in {kept}"
        )
        if self.skipped > self.config.trainer.max_skipped_updates:
            raise PactError(
                f"{self.skipped} updates in a row had a loss or gradient that is not finite (trainer.max_skipped_updates); "
                f"look at {kept}, lower trainer.learning_rate, and go on from the last checkpoint with resume=auto"
            )

    def _fresh(self, step: int, groups: list[Group]) -> tuple[list[Group], int]:
        """The groups, and how many of them lagged: those sampled by weights that are too old are sampled again."""
        oldest = self.learner.updates - self.config.trainer.max_off_policy_steps * self.updates_per_step
        lagging = [g.index for g in groups if any((t.versions[t.sampled] < oldest).any() for t in g.trajectories)]
        if lagging:
            tasks = [groups[index].task for index in lagging]
            again = self._exchange(self.ahead.run(lambda: self._sample(step, tasks)))
            for index, group in zip(lagging, again, strict=True):
                group.index = index
                groups[index] = group
        return groups, len(lagging)

    def _sample(self, step: int, tasks: list[Task] | None = None) -> tuple[list[Group], list[Trajectory]]:
        """The step's prompts, and this process's share of their rollouts, with rewards; `tasks`: default, the step's."""
        config = self.config
        if tasks is None:
            tasks = self.tasks.train(step, config.trainer.prompts_per_step)
        tasks = [self.loop.prepare(task)[0] for task in tasks]
        groups = [Group(task, index, self.loop.prompt_ids(task)) for index, task in enumerate(tasks)]
        if not self.algorithm.needs_rollouts:
            return groups, []
        keep = config.rollout.num_generations
        begun = math.ceil(keep * config.rollout.oversampling_factor)
        jobs = [
            Job(group.task, (config.seed, step, group.index, k), config.rollout.temperature, group.index)
            for group in groups
            for k in range(begun)
        ]
        share = self._share(len(jobs), begun if begun > keep else 1)  # who cancels has to see the whole group
        tasks = [jobs[place].task for place in share if place % begun < keep]
        with self.progress.rollouts(len(tasks), "rollouts") as advance:
            trajectories = self.loop.run([jobs[place] for place in share], lambda *_: advance(), keep)
        self._reward(tasks, trajectories)
        return groups, trajectories

    def _share(self, jobs: int, unit: int = 1) -> range:
        """Places of this process's jobs: a block, so that rollouts of one prompt meet its prefix in one engine. `unit`: so
        many neighbours stay together.
        """
        if self.world.rank not in self.samplers:
            return range(0)
        index, count, units = self.samplers.index(self.world.rank), len(self.samplers), jobs // unit
        return range(index * units // count * unit, (index + 1) * units // count * unit)

    def _run(self, jobs: list[Job], name: str) -> list[Trajectory]:
        """This process's share of the jobs."""
        mine = [jobs[place] for place in self._share(len(jobs))]
        with self.progress.rollouts(len(mine), name) as advance:
            return self.loop.run(mine, lambda index, trajectory: advance())

    def _exchange(self, sampled: tuple[list[Group], list[Trajectory]]) -> list[Group]:
        """All rollouts of the step, and their advantages."""
        groups, mine = sampled
        trajectories = [t for part in self.world.gather(mine, "rollouts") for t in part]
        count = self.config.rollout.num_generations
        for group in groups if trajectories else ():
            group.trajectories = trajectories[group.index * count : (group.index + 1) * count]
            self._advantages(group)
        return groups

    def _staleness(self, groups: list[Group], updates: int) -> float:
        """Mean age in steps of the weights that sampled the step's tokens."""
        versions = [t.versions[t.sampled] for group in groups for t in group.trajectories]
        found = np.concatenate(versions) if versions else np.zeros(0)
        return float(updates - found.mean()) / self.updates_per_step if len(found) else 0.0

    def _reward(self, tasks: list[Task], trajectories: list[Trajectory]) -> None:
        extra = call_reward_functions(
            self.reward_functions, tasks, trajectories, [t.to_messages() for t in trajectories]
        )
        for task, trajectory, functions in zip(tasks, trajectories, extra, strict=True):
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

    def _after(self, done: int, base: dict[str, Any] | None, wall_seconds: float) -> bool:
        """Evaluate and save as the settings say; whether to stop here.

        A run that is asked to stop leaves its evaluation to the run that goes on, so that none is missing in the end.
        """
        trainer = self.config.trainer
        last = done == trainer.max_steps
        stop = self._asked_to_stop()
        owed = bool(trainer.eval_steps) and done % (trainer.eval_steps or 1) == 0 and not last
        if owed and not stop:
            self._evaluate(done, "eval")
            owed, stop = False, self._asked_to_stop()
        if done % trainer.save_steps == 0 or last or stop:
            self._save(done, base, wall_seconds, owed)
        if stop:
            self.progress.note(f"asked to stop: step {done} is saved; go on with resume=auto")
        return stop

    def _asked_to_stop(self) -> bool:
        return self.world.any(self.stop.asked)

    def _save(self, step: int, base: dict[str, Any] | None, wall_seconds: float, owes_evaluation: bool) -> None:
        rng_state, rng_tensors = checkpoint.rng_state()
        adapters = self.config.model.lora
        state = {
            "rng": rng_state,
            "updates": self.learner.updates,
            "wall_seconds": wall_seconds,
            "base": base,
            "owes_evaluation": owes_evaluation,
            "metrics_bytes": (self.run / "metrics.jsonl").stat().st_size if self.metrics else 0,
        }
        found = adapter_tensors(self.model)

        def write_model(path: Path) -> None:
            if adapters:
                lora.save(self.model, found, path, adapters)
            else:
                save_settings(self.model, path)
            self.tokenizer.save_pretrained(path)

        checkpoint.save(
            self.run / "checkpoints", step, tensors={"optimizer": self.learner.backend.state(), "rng": rng_tensors},
            state=state, write_model=write_model, weights=None if adapters else checkpoint_weights(self.model),
            keep=self.config.trainer.save_total_limit, world=self.world,
        )  # fmt: skip

    def _evaluate(self, step: int, label: str, greedy: bool = True) -> dict[str, Any] | None:
        """Sampled (temperature 1) and greedy success on held-out tasks; None when there are none."""
        tasks = self.tasks.held_out(self.config.trainer.eval_tasks)
        if not tasks:
            return None
        results: dict[str, Rate] = {}
        values: dict[str, float] = {}
        for name, temperature in (("success", 1.0), ("greedy", 0.0)):
            jobs = evaluation_jobs(tasks, temperature, self.config.seed)
            mine = self.ahead.run(functools.partial(self._run, jobs, f"{label}: {name}"))
            trajectories = [t for part in self.world.gather(mine, "an evaluation") for t in part]
            outcome_reward(trajectories)
            results[name] = success_rate(trajectories)
            values |= {f"eval/{name}": results[name].mean}
            values |= {
                f"eval/{name}/{key}": value for key, value in reward_means(trajectories).items() if key != "success"
            }
            if name == "success":
                self._show(step, tasks, trajectories)
        if self.metrics:
            self.metrics.write(step, values)
        self.progress.note(f"{label} at step {step}: sampled {results['success']}, greedy {results['greedy']}")
        return {name: rate.to_json() for name, rate in results.items()}

    def _show(self, step: int, tasks: list[Task], trajectories: list[Trajectory]) -> None:
        if not self.world.lead:
            return
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
        self._write_rollouts(step, "train", plans, places[: self.config.trainer.rollout_keep])

    def _write_rollouts(self, step: int, kind: str, plans: list[Plan], places: list[tuple[int, int]]) -> None:
        """`places`: (rollout, plan)."""
        if not self.world.lead:
            return
        records = [
            rollout_record(
                self.renderer,
                plans[p].group.task,
                plans[p].group.trajectories[k],
                step=step,
                kind=kind,
                plan=plans[p],
                k=k,
            )
            for k, p in places
        ]
        write_rollouts(self.run, step, kind, records)

    def _finish(self, base: dict[str, Any] | None, began: float) -> dict[str, Any]:
        from pact_fast.report import write_report

        final = self._evaluate(self.config.trainer.max_steps, "trained")
        summary: dict[str, Any] = {
            "recipe": self.run.name,
            "algorithm": self.config.algorithm.name,
            "steps": self.config.trainer.max_steps,
            "base_success": base and base["success"],
            "success": final and final["success"],
            "base_greedy": base and base["greedy"],
            "greedy": final and final["greedy"],
            "wall_seconds": round(time.monotonic() - began, 1),
            "seed": self.config.seed,
            "versions": versions(),
        }
        if not self.world.lead:
            return summary
        write_text(self.run / "summary.json", json.dumps(summary, indent=2) + "\n")
        with writing(self.run / "report.html"):
            report = write_report(self.run)
        self.progress.print(summary_table(summary))
        self.progress.note(f"report: {report}")
        return summary
