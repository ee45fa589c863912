"""One training step: collect → score → plan → update → sync."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from pact_fast.algorithms.base import Algorithm, Group, PromptBatch, StepContext
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import Config
from pact_fast.rollout.engine import Engine
from pact_fast.train.collect import RolloutCollector
from pact_fast.train.learner import Learner, UpdateResult
from pact_fast.train.metrics import control_token_prob, rollout_metrics, update_metrics


@dataclass
class StepResult:
    """Prompt batches, one UpdateResult per optimizer step, and the step's metrics."""

    batches: list[PromptBatch]
    results: list[UpdateResult]
    metrics: dict[str, float]


class Stepper:
    """Runs training steps; called as `stepper(step)`. All ranks call it."""

    def __init__(
        self,
        config: Config,
        algorithm: Algorithm,
        learner: Learner,
        engine: Engine,
        collector: RolloutCollector,
        renderer: ChatRenderer,
    ):
        self._config, self._algorithm, self._learner = config, algorithm, learner
        self._engine, self._collector, self._renderer = engine, collector, renderer

    def __call__(self, step: int) -> StepResult:
        """Train on the rollouts of `step` (from 0), and give the engine the new weights."""
        learner, started = self._learner, time.perf_counter()
        sampled_version = learner.updates
        max_lag = self._config.trainer.max_off_policy_steps * learner.updates_per_batch
        groups, stale = self._collector.collect(step, oldest_version=learner.updates - max_lag)  # collect, score
        collected = time.perf_counter()
        self._engine.sleep()
        contexts, batches = self._plan(step, groups)
        results = self._update(batches)
        updated = time.perf_counter()
        self._engine.update_weights(learner.model, learner.updates)  # sync
        ended = time.perf_counter()
        sampled = sum(int(t.sampled.sum()) for group in groups for t in group.trajectories)
        return StepResult(batches, results, {
            **rollout_metrics(groups),
            **control_token_prob(groups, self._renderer.control_ids),
            **update_metrics(results),
            **self._algorithm.schedule(contexts[-1]),
            "learning_rate": learner.learning_rate(),
            "updates/skipped": float(sum(result.skipped for result in results)),
            "routes/trace_fraction": float(np.mean([batch.route in ("trace", "blend") for batch in batches])),
            "async/stale_groups": float(stale),
            "async/staleness": _staleness(groups, sampled_version, learner.updates_per_batch),
            "time/rollout": collected - started,
            "time/weight_sync": ended - updated,
            "time/step": ended - started,
            "tokens_per_second": (sampled or sum(r.tokens for r in results)) / (ended - started),
        })  # fmt: skip

    def _plan(self, step: int, groups: list[Group]) -> tuple[list[StepContext], list[PromptBatch]]:
        """Trees and weights of all prompts: every route is drawn before the first optimizer step of the rollout batch."""
        size = len(groups) // self._learner.updates_per_batch
        contexts, batches = [], []
        for start in range(0, len(groups), size):
            members = groups[start : start + size]
            contexts.append(
                StepContext(
                    config=self._config.algorithm,
                    renderer=self._renderer,
                    seed=self._config.seed,
                    step=step,
                    horizon=self._config.trainer.max_steps,
                    prompts=len(members),
                    sampled_tokens=sum(int(t.sampled.sum()) for g in members for t in g.trajectories),
                    max_completion_length=self._config.rollout.max_completion_length,
                )
            )
            batches += [self._algorithm.prompt_batch(group, contexts[-1]) for group in members]
        return contexts, batches

    def _update(self, batches: list[PromptBatch]) -> list[UpdateResult]:
        """The optimizer steps on a rollout batch."""
        self._learner.prepare(batches)
        size = len(batches) // self._learner.updates_per_batch
        return [self._learner.update(batches[start : start + size]) for start in range(0, len(batches), size)]


def _staleness(groups: list[Group], version: int, updates_per_step: int) -> float:
    """Mean age, in steps, of the weights that sampled the tokens."""
    versions = [t.versions[t.sampled] for group in groups for t in group.trajectories]
    found = np.concatenate(versions) if versions else np.zeros(0)
    return float(version - found.mean()) / updates_per_step if len(found) else 0.0
