"""Rollouts as JSON records under rollouts/, for the viewer and the report."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pact_fast.algorithms.base import PromptBatch
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.data.types import Task, Trajectory, text_of
from pact_fast.train.run_dir import write_text


class RolloutWriter:
    """Writes rollouts of a run. Call on rank 0.

    Args:
        run: The run directory.
        renderer: Turns tokens into text.
        limit: Rollouts per file.
    """

    def __init__(self, run: Path, renderer: ChatRenderer, limit: int):
        self._run, self._renderer, self._limit = run, renderer, limit

    def write_step(self, step: int, batches: list[PromptBatch]) -> None:
        """The first rollouts of every prompt, then the second ones, …, so that every prompt is seen before any is twice."""
        places = sorted((k, p) for p, batch in enumerate(batches) for k in range(len(batch.group.trajectories)))
        self._write(step, "train", batches, [(p, k) for k, p in places[: self._limit]])

    def write_skipped(self, step: int, batches: list[PromptBatch]) -> None:
        """All rollouts of a step with a skipped update."""
        places = [(p, k) for p, batch in enumerate(batches) for k in range(len(batch.group.trajectories))]
        self._write(step, "skipped", batches, places)

    def write_evaluation(self, step: int, tasks: list[Task], trajectories: list[Trajectory]) -> list[dict[str, Any]]:
        """The first evaluation rollouts; returns the records."""
        records = [
            rollout_record(self._renderer, task, trajectory, step=step, kind="eval")
            for task, trajectory in list(zip(tasks, trajectories, strict=True))[: self._limit]
        ]
        write_rollouts(self._run, step, "eval", records)
        return records

    def _write(self, step: int, kind: str, batches: list[PromptBatch], places: Iterable[tuple[int, int]]) -> None:
        """`places`: (prompt, rollout)."""
        records = [
            rollout_record(
                self._renderer, batches[p].group.task, batches[p].group.trajectories[k], step=step, kind=kind,
                batch=batches[p], k=k,
            )
            for p, k in places
        ]  # fmt: skip
        write_rollouts(self._run, step, kind, records)


def write_rollouts(run: Path, step: int, kind: str, records: list[dict[str, Any]]) -> None:
    """rollouts/step_N.jsonl (training), eval_N.jsonl or skipped_N.jsonl; a resumed step overwrites its file."""
    if records:
        name = f"{'step' if kind == 'train' else kind}_{step:06d}.jsonl"
        write_text(run / "rollouts" / name, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def rollout_record(
    renderer: ChatRenderer,
    task: Task,
    trajectory: Trajectory,
    *,
    step: int,
    kind: str,
    batch: PromptBatch | None = None,
    k: int = 0,
) -> dict[str, Any]:
    """Everything a viewer needs of one rollout, as JSON."""
    weights = _weights(batch, trajectory, k) if batch else None
    return {
        "step": step,
        "kind": kind,
        "task_id": task.id,
        "route": batch.route if batch else None,
        "stop_reason": str(trajectory.stop_reason),
        "reward": trajectory.reward,
        "reward_parts": trajectory.reward_parts,
        "turn_rewards": trajectory.turn_rewards,
        "success": trajectory.reward_parts.get("success"),
        "question": text_of(task.prompt[-1].get("content")),
        "prompt": renderer.token_bytes.join(trajectory.prompt_ids).decode("utf-8", "replace"),
        "tokens": token_texts(renderer, trajectory.ids),
        "components": trajectory.components.tolist(),
        "sampled": trajectory.sampled.astype(int).tolist(),
        "turn_ids": trajectory.turn_ids.tolist(),
        "logprobs": _floats(trajectory.logprobs),
        "advantages": _floats(np.where(trajectory.sampled, batch.group.advantages[k], np.nan)) if batch else None,
        "weights": _floats(weights) if weights is not None else None,
        "expert": _expert(renderer, batch) if batch else None,
    }


def token_texts(renderer: ChatRenderer, ids: np.ndarray) -> list[str]:
    """One string per token whose concatenation is the text; a character split over tokens stands at its last token."""
    texts: list[str] = []
    held = b""
    for token in ids.tolist():
        held += renderer.token_bytes.table[token]
        try:
            texts.append(held.decode("utf-8"))
            held = b""
        except UnicodeDecodeError as error:
            if error.end < len(held) or len(held) > 4:  # not a prefix of a character: show what can be shown
                texts.append(held.decode("utf-8", "replace"))
                held = b""
            else:
                texts.append("")
    return texts


def _weights(batch: PromptBatch, trajectory: Trajectory, k: int) -> np.ndarray:
    """Policy-loss weight of every response token, summed over the contexts it is scored in."""
    weights = np.full(len(trajectory.ids), np.nan)
    weights[trajectory.sampled] = 0.0
    for s in batch.scored:
        if s.rollout == k:
            weights[s.index] += s.rl_weight * s.importance
    return weights


def _expert(renderer: ChatRenderer, batch: PromptBatch) -> dict[str, Any] | None:
    """h* with the SFT weight of every token."""
    if batch.expert is None:
        return None
    node, components = batch.expert
    weights = np.zeros(len(node.ids))
    for s in batch.scored:
        if s.node is node:
            weights[s.index] = s.sft_weight
    return {"tokens": token_texts(renderer, node.ids), "components": components.tolist(), "weights": _floats(weights)}


def _floats(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(v) else float(f"{v:.4g}") for v in values]
