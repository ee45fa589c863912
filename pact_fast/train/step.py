"""One training step: collect → score → batch → update → sync."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

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
    """The result of a training step.

    prompts  number of prompts of all ranks
    batches  one per prompt of this rank
    results  one per optimizer step
    metrics  a flat record for metrics.jsonl, the same on all ranks
    """

    prompts: int
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
        prompts = len(self._collector.outcomes)
        contexts, batches = self._prompt_batches(step, groups)
        results = self._update(batches, prompts)
        clock.append(time.perf_counter())
        self._engine.update_weights(learner.model, learner.updates)  # sync
        clock.append(time.perf_counter())

        sampled = sum(outcome.sampled for outcomes in self._collector.outcomes for outcome in outcomes)
        metrics = {
            **self._metrics(groups, batches, results),
            **self._algorithm.schedule(contexts[-1]),
            **_timing(clock, sampled, results),
            **(self._collector.filtered.metrics() if self._collector.filtered else {}),
            "async/stale_groups": float(stale),
            "async/staleness": self._staleness(sampled, version),
        }
        return StepResult(prompts, batches, results, self._on_all(metrics, groups))

    def _prompt_batches(self, step: int, groups: list[Group]) -> tuple[list[StepContext], list[PromptBatch]]:
        """Ask the algorithm for the trees and weights of this rank's prompts.

        This is done before the first optimizer step on the rollout batch, because `Learner.prepare` needs all of them.
        """
        outcomes = self._collector.outcomes
        size = len(outcomes) // self._learner.updates_per_batch
        contexts, batches = [], []
        for start in range(0, len(outcomes), size):
            contexts.append(
                StepContext(
                    config=self._config.algorithm,
                    renderer=self._renderer,
                    seed=self._config.seed,
                    step=step,
                    horizon=self._config.trainer.max_steps,
                    prompts=len(outcomes[start : start + size]),
                    sampled_tokens=sum(o.sampled for rollouts in outcomes[start : start + size] for o in rollouts),
                    max_completion_length=self._config.rollout.max_completion_length,
                    over_ranks=self._learner.world.sum_counts,
                )
            )
            members = [group for group in groups if start <= group.prompt_index < start + size]
            batches += self._algorithm.prompt_batches(members, contexts[-1])
        return contexts, batches

    def _update(self, batches: list[PromptBatch], prompts: int) -> list[UpdateResult]:
        """All optimizer steps on the rollout batch of `prompts` prompts."""
        self._learner.prepare(batches)
        size = prompts // self._learner.updates_per_batch
        return [
            self._learner.update([b for b in batches if start <= b.group.prompt_index < start + size])
            for start in range(0, prompts, size)
        ]

    def _metrics(
        self, groups: list[Group], batches: list[PromptBatch], results: list[UpdateResult]
    ) -> dict[str, float]:
        """Metrics of all ranks; those of rollouts on rank 0 only."""
        world = self._learner.world
        routes = [batch.route for batch in batches]
        counts = [sum(route in ("trace", "blend") for route in routes), routes.count("expert"), len(routes)]
        with_trace, experts, prompts = world.sum_counts(*counts)
        return {
            **rollout_metrics(groups, world),
            **control_token_prob(groups, self._renderer.control_ids, world),
            **update_metrics(results, world),
            "learning_rate": self._learner.learning_rate(),
            "updates/skipped": float(sum(result.skipped for result in results)),
            "routes/trace_fraction": with_trace / prompts,
            "routes/expert_fraction": experts / prompts,
        }

    def _on_all(self, metrics: dict[str, float], groups: list[Group]) -> dict[str, float]:
        """Rank 0's metrics and those logged by reward functions, on all ranks. PactError if two have the same name."""
        logged = logged_metrics(groups, self._learner.world)

        def join() -> list[Any]:
            try:
                return [with_logged(metrics, logged), None]
            except PactError as error:
                return [{}, str(error)]

        joined, problem = self._learner.world.broadcast_from_main(join, "the metrics")
        if problem is not None:
            raise PactError(problem)
        return joined

    def _staleness(self, sampled: int, version: int) -> float:
        """Mean age, in steps, of the weights that sampled the step's tokens. `version`: of the weights before the step."""
        total = sum(outcome.versions for outcomes in self._collector.outcomes for outcome in outcomes)
        return (version - total / sampled) / self._learner.updates_per_batch if sampled else 0.0


def with_logged(metrics: dict[str, float], logged: dict[str, float]) -> dict[str, float]:
    """The step's metrics and those that reward functions logged. PactError if one has the name of a built-in metric."""
    for name in logged.keys() & (metrics.keys() | {"step"}):
        raise PactError(f"a reward function logs the metric '{name}', which is built in; rename it in log_metric")
    return metrics | logged


def _timing(clock: list[float], sampled: int, results: list[UpdateResult]) -> dict[str, float]:
    """Seconds and throughput.

    Args:
        clock: Start, rollouts collected, weights updated, engine synchronised.
        sampled: Sampled tokens of the step.
        results: Of its optimizer steps.
    """
    started, collected, updated, ended = clock
    return {
        "time/rollout": collected - started,
        "time/weight_sync": ended - updated,
        "time/step": ended - started,
        # sampled tokens; without rollouts (SFT), those that the decoder computed
        "tokens_per_second": (sampled or sum(r.tokens for r in results)) / (ended - started),
    }
