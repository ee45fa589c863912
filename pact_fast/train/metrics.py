"""metrics.jsonl and the trackers, one flat record per step."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from pact_fast.algorithms.base import Group
from pact_fast.components import Component
from pact_fast.files import io_errors
from pact_fast.kernels import summarise
from pact_fast.train.learner import UpdateResult
from pact_fast.train.trackers.group import Trackers


class MetricsWriter:
    """Appends records to run/metrics.jsonl, flushed to disk one by one, and sends them to the trackers."""

    def __init__(self, run: Path, trackers: Trackers):
        self._run, self._trackers = run, trackers
        self._file = (run / "metrics.jsonl").open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write one record. Values that are not finite become null: JSON has no NaN.

        Raises:
            PactError: The disk is full or not writable.
        """
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with io_errors(self._run / "metrics.jsonl"):
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self._trackers.log(step, finite)

    def close(self, failed: bool = False) -> None:
        """Close file and trackers; `failed`: the run ends by an exception. `write` has reported a full disk."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._trackers.close(failed)


def rollout_metrics(groups: list[Group]) -> dict[str, float]:
    """Rewards, lengths, turns, tool calls and stop reasons of a step's rollouts.

    Lengths are those of all branches, what they share counted once.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    if not trajectories:
        return {}
    rewards = np.array([t.reward for t in trajectories])
    learnt = [any(np.any(a) for a in group.advantages) for group in groups]
    sampled = [sum(int(t.sampled.sum()) for t in group.trajectories) for group in groups]
    values = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/zero_advantage_groups": 1.0 - float(np.mean(learnt)),
        "reward/zero_advantage_tokens": 1.0 - float(np.dot(sampled, learnt)) / max(sum(sampled), 1),
        "lengths/completion_mean": float(np.mean([len(t.ids) for t in trajectories])),
        "lengths/completion_max": float(max(len(t.ids) for t in trajectories)),
        "lengths/sampled_mean": float(np.mean([t.sampled.sum() for t in trajectories])),
        "turns/mean": float(np.mean([len(t.turns) for t in trajectories])),
        "tools/calls_mean": float(np.mean([len(t.calls) for t in trajectories])),
        "tools/malformed_fraction": _fraction(
            [isinstance(a, str) for t in trajectories for turn in t.turns for a in turn.attempts]
        ),
    }
    for part in sorted({key for t in trajectories for key in t.reward_parts}):
        # over the rollouts that the part applies to: a function that returns None leaves no entry
        values[f"reward/{part}"] = float(
            np.mean([t.reward_parts[part] for t in trajectories if part in t.reward_parts])
        )
    if any(len(t.branches) for t in trajectories):
        values["branches/mean"] = float(np.mean([1 + len(t.branches) for t in trajectories]))
    if "reward/success" in values:
        values["success"] = values["reward/success"]
    for reason in sorted({t.stop_reason for t in trajectories}):
        values[f"stop/{reason}"] = _fraction([t.stop_reason == reason for t in trajectories])
    for component in (Component.REASONING, Component.TOOL_CALL, Component.ANSWER):
        counts = [int(((t.components == component) & t.sampled).sum()) for t in trajectories]
        values[f"lengths/{component.name.lower()}_mean"] = float(np.mean(counts))
    return values


def logged_metrics(groups: list[Group]) -> dict[str, float]:
    """Means of the values that reward functions logged with `log_metric`."""
    logged: dict[str, list[float]] = {}
    for trajectory in (t for group in groups for t in group.trajectories):
        for name, value in trajectory.metrics.items():
            logged.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in sorted(logged.items())}


def update_metrics(results: list[UpdateResult]) -> dict[str, float]:
    """Losses and statistics of a step's optimizer steps. Statistics are sums, so they are added before division."""
    stats: dict[str, Any] = {}
    for result in results:
        for key, value in result.stats.items():
            stats[key] = stats[key] + value if key in stats else value
    tokens = sum(r.tokens for r in results)
    values = {
        "loss": float(np.mean([r.loss for r in results])),
        "grad_norm": float(np.mean([r.grad_norm for r in results])),
        "tokens/computed": float(tokens),
        "tokens/unshared": float(sum(r.tokens_unshared for r in results)),
        "tokens/supervised": float(sum(r.supervised for r in results)),
        "tokens/packs": float(sum(r.packs for r in results)),
        "sharing/flops_saved": 1.0 - _ratio(sum(r.flops for r in results), sum(r.flops_unshared for r in results)),
        "sharing/load_balance": _ratio(sum(r.flops for r in results), sum(r.flops_waited for r in results)),
        "sharing/pack_efficiency": _ratio(tokens, sum(r.capacity for r in results)),
    }
    for phase in results[0].seconds if results else ():
        values[f"time/{phase}"] = sum(r.seconds[phase] for r in results)
    return {**values, **mismatch_metrics(results), **(summarise(stats) if stats else {})}


def mismatch_metrics(results: list[UpdateResult]) -> dict[str, float]:
    """Trainer's − sampler's log-prob of sampled tokens, under the same (prompt-only) context.

    abs_mean, p50, p99 and max are of the absolute difference and show whether the engine computes what the trainer
    computes; `mean` is signed.
    """
    parts = [diff for result in results for diff in result.logprob_diff if len(diff)]
    if not parts:
        return {}
    component, diff = np.concatenate(parts).T
    size = np.abs(diff)
    values = {"mismatch/mean": float(diff.mean()), **_quantiles("mismatch", size)}
    for value in np.unique(component):
        values |= _quantiles(f"mismatch/{Component(int(value)).name.lower()}", size[component == value])
    return values


def _quantiles(prefix: str, values: np.ndarray) -> dict[str, float]:
    p50, p99 = np.quantile(values, (0.5, 0.99))
    return {
        f"{prefix}/abs_mean": float(values.mean()),
        f"{prefix}/p50": float(p50),
        f"{prefix}/p99": float(p99),
        f"{prefix}/max": float(values.max()),
    }


def control_token_prob(groups: list[Group], control: frozenset[int]) -> dict[str, float]:
    """Mean sampler probability of sampled control tokens (end of turn, markers). An early sign of a collapsing policy."""
    ids = np.array(sorted(control))
    parts = [np.exp(t.logprobs[t.sampled & np.isin(t.ids, ids)]) for group in groups for t in group.trajectories]
    probabilities = np.concatenate(parts) if parts else np.zeros(0)
    return {"control_token_prob": float(probabilities.mean())} if len(probabilities) else {}


def _ratio(part: float, whole: float) -> float:
    """part / whole, 1 for an empty whole."""
    return part / whole if whole else 1.0


def _fraction(flags: list[bool]) -> float:
    return float(np.mean(flags)) if flags else 0.0
