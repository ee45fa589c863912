"""metrics.jsonl and the trackers, one flat record per step."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pact_fast.algorithms.base import Group
from pact_fast.components import Component
from pact_fast.data.types import Trajectory
from pact_fast.distributed.world import World
from pact_fast.files import io_errors
from pact_fast.kernels import summarise
from pact_fast.train.learner import UpdateResult
from pact_fast.train.quantiles import distributions
from pact_fast.train.trackers.group import Trackers

COUNTED = (Component.REASONING, Component.TOOL_CALL, Component.ANSWER)  # kinds of sampled tokens


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


def rollout_metrics(groups: list[Group], world: World | None = None) -> dict[str, float]:
    """Rewards, lengths, turns, tool calls and stop reasons of a step's rollouts. All ranks must call it.

    Lengths are those of all branches, what they share counted once.

    Args:
        groups: This rank's prompts; those of all ranks, by rank, are the step's.
        world: All ranks; default: one process.

    Returns:
        Of all ranks on rank 0, nothing on the others.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    columns, parts, stops = _gather((_columns(groups, trajectories), _parts(trajectories), _stops(trajectories)), world)
    if not columns or not len(columns["reward"]):
        return {}
    learnt_tokens = np.dot(columns["group_sampled"], columns["learnt"])
    values = {
        "reward/mean": float(columns["reward"].mean()),
        "reward/std": float(columns["reward"].std()),
        "reward/zero_advantage_groups": 1.0 - float(columns["learnt"].mean()),
        "reward/zero_advantage_tokens": 1.0 - float(learnt_tokens) / max(int(columns["sampled"].sum()), 1),
        "lengths/completion_mean": float(columns["length"].mean()),
        "lengths/completion_max": float(columns["length"].max()),
        "lengths/sampled_mean": float(columns["sampled"].mean()),
        "turns/mean": float(columns["turns"].mean()),
        "tools/calls_mean": float(columns["calls"].mean()),
        "tools/malformed_fraction": _mean_or_zero(columns["malformed"]),
    }
    # over the rollouts that the part applies to: a function that returns None leaves no entry
    values |= {f"reward/{part}": float(found.mean()) for part, found in sorted(parts.items())}
    if columns["branches"].max() > 1:
        values["branches/mean"] = float(columns["branches"].mean())
    if "reward/success" in values:
        values["success"] = values["reward/success"]
    for reason, found in sorted(stops.items()):
        values[f"stop/{reason}"] = float(found.sum() / len(columns["reward"]))
    for component in COUNTED:
        values[f"lengths/{component.name.lower()}_mean"] = float(columns[component.name].mean())
    return values


def _columns(groups: list[Group], trajectories: list[Trajectory]) -> dict[str, np.ndarray]:
    """One value per rollout; per group: `learnt` and `group_sampled`; per attempt at a call: malformed."""
    malformed = [isinstance(a, str) for t in trajectories for turn in t.turns for a in turn.attempts]
    return {
        "reward": np.array([t.reward for t in trajectories], np.float64),
        "learnt": np.array([any(np.any(a) for a in group.advantages) for group in groups], bool),
        "group_sampled": np.array([sum(int(t.sampled.sum()) for t in g.trajectories) for g in groups], np.int64),
        "length": np.array([len(t.ids) for t in trajectories], np.int64),
        "sampled": np.array([t.sampled.sum() for t in trajectories], np.int64),
        "branches": np.array([1 + len(t.branches) for t in trajectories], np.int64),
        "turns": np.array([len(t.turns) for t in trajectories], np.int64),
        "calls": np.array([len(t.calls) for t in trajectories], np.int64),
        "malformed": np.array(malformed, bool),
        **{
            c.name: np.array([((t.components == c) & t.sampled).sum() for t in trajectories], np.int64) for c in COUNTED
        },
    }


def _parts(trajectories: list[Trajectory]) -> dict[str, np.ndarray]:
    names = sorted({key for t in trajectories for key in t.reward_parts})
    return {
        name: np.array([t.reward_parts[name] for t in trajectories if name in t.reward_parts], np.float64)
        for name in names
    }


def _stops(trajectories: list[Trajectory]) -> dict[str, np.ndarray]:
    return {str(reason): np.array([count]) for reason, count in Counter(t.stop_reason for t in trajectories).items()}


def _gather(columns: tuple[dict[str, np.ndarray], ...], world: World | None) -> tuple[dict[str, np.ndarray], ...]:
    """Each dict of columns, joined over ranks by rank; empty on ranks other than 0."""
    tables = (world or World()).gather_on_main(list(columns), "the metrics of rollouts")
    found: list[dict[str, list[np.ndarray]]] = [{} for _ in columns]
    for table in tables:
        for joined, part in zip(found, table, strict=True):
            for name, column in part.items():
                joined.setdefault(name, []).append(column)
    return tuple({name: np.concatenate(parts) for name, parts in joined.items()} for joined in found)


def logged_metrics(groups: list[Group], world: World | None = None) -> dict[str, float]:
    """Means of the values that reward functions logged with `log_metric`; as for `rollout_metrics`."""
    logged: dict[str, list[float]] = {}
    for trajectory in (t for group in groups for t in group.trajectories):
        for name, value in trajectory.metrics.items():
            logged.setdefault(name, []).append(value)
    (columns,) = _gather(({name: np.array(values, np.float64) for name, values in logged.items()},), world)
    return {name: float(values.mean()) for name, values in sorted(columns.items())}


def update_metrics(results: list[UpdateResult], world: World | None = None) -> dict[str, float]:
    """Losses and statistics of a step's optimizer steps. Statistics are sums, so they are added before division.

    All ranks must call it, and get the same.
    """
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
    return {**values, **mismatch_metrics(results, world or World()), **(summarise(stats) if stats else {})}


def mismatch_metrics(results: list[UpdateResult], world: World) -> dict[str, float]:
    """Trainer's − sampler's log-prob of sampled tokens, under the same (prompt-only) context, of all ranks.

    abs_mean, p50, p99 and max are of the absolute difference and show whether the engine computes what the trainer
    computes; `mean` is signed.
    """
    empty = np.zeros((0, 2), np.float32)
    component, diff = np.concatenate([empty, *(d for result in results for d in result.logprob_diff)]).T
    (total,) = world.all_reduce_sum(torch.tensor([diff.sum(dtype=np.float64)])).tolist()
    size = np.abs(diff)
    columns = {"mismatch": size} | {f"mismatch/{c.name.lower()}": size[component == c] for c in Component}
    values: dict[str, float] = {}
    found = distributions(list(columns.values()), (0.5, 0.99), world)
    for name, distribution in zip(columns, found, strict=True):
        if distribution is None:
            continue
        if name == "mismatch":
            values["mismatch/mean"] = total / distribution.count
        values[f"{name}/abs_mean"] = distribution.mean
        values[f"{name}/p50"], values[f"{name}/p99"] = distribution.quantiles
        values[f"{name}/max"] = distribution.largest
    return values


def control_token_prob(groups: list[Group], control: frozenset[int], world: World | None = None) -> dict[str, float]:
    """Mean sampler probability of sampled control tokens (end of turn, markers); as for `rollout_metrics`.

    An early sign of a collapsing policy.
    """
    ids = np.array(sorted(control))
    parts = [np.exp(t.logprobs[t.sampled & np.isin(t.ids, ids)]) for group in groups for t in group.trajectories]
    (columns,) = _gather(({"probability": np.concatenate([np.zeros(0, np.float32), *parts])},), world)
    probabilities = columns.get("probability", np.zeros(0))
    return {"control_token_prob": float(probabilities.mean())} if len(probabilities) else {}


def _ratio(part: float, whole: float) -> float:
    """part / whole, 1 for an empty whole."""
    return part / whole if whole else 1.0


def _mean_or_zero(flags: np.ndarray) -> float:
    return float(flags.mean()) if len(flags) else 0.0
