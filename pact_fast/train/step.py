"""One training step: collect → score → plan → update → sync."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from pact_fast.algorithms.base import Algorithm, Group, PromptBatch, StepContext
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import Config
from pact_fast.errors import PactError
from pact_fast.rollout.engine import Engine
from pact_fast.train.collect import RolloutCollector
from pact_fast.train.learner import Learner, UpdateResult
from pact_fast.train.metrics import control_token_prob, logged_metrics, rollout_metrics, update_metrics


@dataclass
class StepResult:
    """What a training step did.

    batches  one per prompt
    results  one per optimizer step
    metrics  a flat record for metrics.jsonl
    """

    batches: list[PromptBatch]
    results: list[UpdateResult]
    metrics: dict[str, float]


class Stepper:
    """Runs training steps, called as `stepper(step)` on all ranks.

    Args:
        config: The run's configuration.
        algorithm: Turns groups into prompt batches.
        learner: Makes the optimizer steps.
        engine: Receives the new weights.
        collector: Samples and scores the rollouts.
        renderer: The chat renderer of the run.
    """

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
        """Train on the rollouts of `step` (from 0) and send the engine the new weights."""
        learner, version, clock = self._learner, self._learner.updates, [time.perf_counter()]

        max_lag = self._config.trainer.max_off_policy_steps * learner.updates_per_batch
        groups, stale = self._collector.collect(step, oldest_version=version - max_lag)  # collect and score
        clock.append(time.perf_counter())
        self._engine.sleep()
        contexts, batches = self._plan(step, groups)
        results = self._update(batches)
        clock.append(time.perf_counter())
        self._engine.update_weights(learner.model, learner.updates)  # sync
        clock.append(time.perf_counter())

        metrics = {
            **self._metrics(groups, batches, results),
            **self._algorithm.schedule(contexts[-1]),
            **_timing(clock, groups, results),
            **(self._collector.filtered.metrics() if self._collector.filtered else {}),
            "async/stale_groups": float(stale),
            "async/staleness": _staleness(groups, version, learner.updates_per_batch),
        }
        return StepResult(batches, results, with_logged(metrics, logged_metrics(groups)))

    def _plan(self, step: int, groups: list[Group]) -> tuple[list[StepContext], list[PromptBatch]]:
        """Ask the algorithm for the trees and weights of all prompts.

        This is done before the first optimizer step on the rollout batch, because `Learner.prepare` needs all of them.
        """
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
            batches += self._algorithm.prompt_batches(members, contexts[-1])
        return contexts, batches

    def _update(self, batches: list[PromptBatch]) -> list[UpdateResult]:
        """All optimizer steps on the rollout batch."""
        self._learner.prepare(batches)
        size = len(batches) // self._learner.updates_per_batch
        return [self._learner.update(batches[start : start + size]) for start in range(0, len(batches), size)]

    def _metrics(
        self, groups: list[Group], batches: list[PromptBatch], results: list[UpdateResult]
    ) -> dict[str, float]:
        return {
            **rollout_metrics(groups),
            **control_token_prob(groups, self._renderer.control_ids),
            **update_metrics(results),
            "learning_rate": self._learner.learning_rate(),
            "updates/skipped": float(sum(result.skipped for result in results)),
            "routes/trace_fraction": float(np.mean([batch.route in ("trace", "blend") for batch in batches])),
            "routes/expert_fraction": float(np.mean([batch.route == "expert" for batch in batches])),
        }


def with_logged(metrics: dict[str, float], logged: dict[str, float]) -> dict[str, float]:
    """The step's metrics and those that reward functions logged. PactError if one has the name of a built-in metric."""
    for name in logged.keys() & (metrics.keys() | {"step"}):
        raise PactError(f"a reward function logs the metric '{name}', which is built in; rename it in log_metric")
    return metrics | logged


def _timing(clock: list[float], groups: list[Group], results: list[UpdateResult]) -> dict[str, float]:
    """Seconds and throughput. `clock`: start, rollouts collected, weights updated, engine synchronised."""
    started, collected, updated, ended = clock
    sampled = sum(int(t.sampled.sum()) for group in groups for t in group.trajectories)
    return {
        "time/rollout": collected - started,
        "time/weight_sync": ended - updated,
        "time/step": ended - started,
        # sampled tokens; without rollouts (SFT), those that the decoder computed
        "tokens_per_second": (sampled or sum(r.tokens for r in results)) / (ended - started),
    }


def _staleness(groups: list[Group], version: int, updates_per_step: int) -> float:
    """Mean age, in steps, of the weights that sampled the step's tokens. `version`: of the weights before the step."""
    parts = [t.versions[t.sampled] for group in groups for t in group.trajectories]
    versions = np.concatenate(parts) if parts else np.zeros(0)
    return float(version - versions.mean()) / updates_per_step if len(versions) else 0.0
