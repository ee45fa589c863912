"""Rollouts as compressed JSON lines under rollouts/, for the viewer and the report. Fields: `rollout_record`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pact_fast.algorithms.base import PromptBatch
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.data.types import Task, Trajectory, text_of
from pact_fast.distributed.world import World
from pact_fast.report.rollout_files import thin_out, write_rollout_file


class RolloutWriter:
    """Writes rollouts of a run. Each rank makes the records of its own prompts, and rank 0 writes them.

    Args:
        run: The run directory.
        renderer: Decodes tokens.
        limit: Most rollouts per file, except for skipped updates.
        keep: Newest steps whose rollouts are all kept, see `thin_out`; None: of all steps.
        world: All ranks; default: one process.
    """

    def __init__(
        self, run: Path, renderer: ChatRenderer, limit: int, *, keep: int | None = None, world: World | None = None
    ):
        self._run, self._renderer, self._limit = run, renderer, limit
        self._keep, self._world = keep, world or World()

    def write_step(self, step: int, batches: list[PromptBatch], prompts: int) -> None:
        """Up to `limit` rollouts of a step: the first of every prompt, then the second of every prompt, and so on.

        All ranks must call it.

        Args:
            step: Training step, from 1.
            batches: This rank's prompts, all with the same number of rollouts.
            prompts: Number of prompts of all ranks.
        """
        self._write(step, "train", batches, lambda prompt, k: k * prompts + prompt, self._limit)
        if self._world.is_main:
            thin_out(self._run / "rollouts", step, self._keep)

    def write_skipped(self, step: int, batches: list[PromptBatch]) -> None:
        """All rollouts of a step with a skipped update. All ranks must call it."""
        self._write(step, "skipped", batches, lambda prompt, k: (prompt << 32) + k, None)

    def write_evaluation(self, step: int, tasks: list[Task], trajectories: list[Trajectory]) -> list[dict[str, Any]]:
        """Up to `limit` evaluation rollouts. Returns their records. Rank 0 alone calls it, with the rollouts of all."""
        records = [
            rollout_record(self._renderer, task, trajectory, step=step, kind="eval")
            for task, trajectory in list(zip(tasks, trajectories, strict=True))[: self._limit]
        ]
        write_rollouts(self._run, step, "eval", records)
        return records

    def _write(
        self, step: int, kind: str, batches: list[PromptBatch], place: Callable[[int, int], int], limit: int | None
    ) -> None:
        """Write the rollouts whose place is below `limit`. `place`: (index of the prompt, of its rollout) → order."""
        lines = [
            [place(group.prompt_index, k), _line(rollout_record(
                self._renderer, group.task, trajectory, step=step, kind=kind, batch=batch, k=k,
            ))]
            for batch in batches for group in [batch.group] for k, trajectory in enumerate(group.trajectories)
            if limit is None or place(group.prompt_index, k) < limit
        ]  # fmt: skip
        gathered = sorted(line for part in self._world.gather_on_main(lines, "the rollouts to write") for line in part)
        if gathered:
            _write_lines(self._run, step, kind, [line for _, line in gathered])


def write_rollouts(run: Path, step: int, kind: str, records: list[dict[str, Any]]) -> None:
    """Write records to rollouts/step_N.jsonl.gz (kind "train"), eval_N.jsonl.gz or skipped_N.jsonl.gz.

    A step that is repeated after a resume overwrites its file.
    """
    if records:
        _write_lines(run, step, kind, list(map(_line, records)))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _write_lines(run: Path, step: int, kind: str, lines: list[str]) -> None:
    write_rollout_file(run / "rollouts", f"{'step' if kind == 'train' else kind}_{step:06d}", lines)


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
    """One rollout as a JSON object. Columns of tokens have one entry per response token; None where it does not apply.

    Args:
        renderer: Decodes tokens.
        task: The task of the rollout.
        trajectory: The rollout.
        step: Training step, from 1.
        kind: "train", "eval" or "skipped".
        batch: The prompt batch that the rollout belongs to, for advantages, weights and the expert trace.
        k: Index of the rollout in its group.
    """
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
        "extra": trajectory.extra,
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
        **({"branches": trajectory.branches.tolist()} if len(trajectory.branches) else {}),
    }


def token_texts(renderer: ChatRenderer, ids: np.ndarray) -> list[str]:
    """The text of each token. A character that is split over several tokens is given to the last of them.

    The concatenation is the decoded text.
    """
    texts: list[str] = []
    pending = b""
    for token in ids.tolist():
        pending += renderer.token_bytes.join([token])  # none for an id beyond the table, which a policy can sample
        try:
            texts.append(pending.decode("utf-8"))
            pending = b""
        except UnicodeDecodeError as error:
            if error.end < len(pending) or len(pending) > 4:  # invalid, not an unfinished character
                texts.append(pending.decode("utf-8", "replace"))
                pending = b""
            else:
                texts.append("")
    return texts


def _weights(batch: PromptBatch, trajectory: Trajectory, k: int) -> np.ndarray:
    """Policy-loss weight of every response token [n], summed over loss contexts; NaN for tokens that were not sampled."""
    weights = np.full(len(trajectory.ids), np.nan)
    weights[trajectory.sampled] = 0.0
    for s in batch.scored:
        if s.rollout == k:
            weights[s.offset + s.index] += s.rl_weight * s.importance
    return weights


def _expert(renderer: ChatRenderer, batch: PromptBatch) -> dict[str, Any] | None:
    """The expert trace with the SFT weight of every token."""
    if batch.expert is None:
        return None
    trace, pieces = batch.expert.trace, {id(piece.node): piece for piece in batch.expert.pieces}
    weights, later = (
        np.zeros(len(trace.ids)),
        trace.branches[trace.branches[:, 0] > 0],
    )  # of the last branch alone: none
    for s in batch.scored:
        if (piece := pieces.get(id(s.node))) and s.rollout is None:
            weights[piece.offset + s.index] = s.sft_weight
    return {
        "tokens": token_texts(renderer, trace.ids),
        "components": trace.components.tolist(),
        "weights": _floats(weights),
        **({"branches": later.tolist()} if len(later) else {}),
    }


def _floats(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(v) else float(f"{v:.4g}") for v in values]
