"""The run directory: config.yaml, metrics.jsonl, rollouts/, checkpoints/, base/, summary.json, report.html."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError

from pact_fast.algorithms.base import Plan
from pact_fast.config import Config
from pact_fast.data.rendering import ChatRenderer
from pact_fast.data.types import Task, Trajectory, text_of
from pact_fast.errors import PactError


def open_run(config: Config) -> Path:
    """Create or reopen the run directory; refuses to mix two runs."""
    run = Path(config.output_dir)
    if (run / "metrics.jsonl").exists() and config.resume == "never":
        raise PactError(f"{run} already holds a run; continue it with resume=auto, or choose another output_dir=")
    with writing(run):
        (run / "rollouts").mkdir(parents=True, exist_ok=True)
    write_text(run / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))
    return run


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A refused write (the disk is full, the folder is not ours) is the user's to mend: PactError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise PactError(
            f"cannot write {path}: {reason}; free some space or make the folder writable, and go on with resume=auto"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all. PactError if the disk refuses."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def save_whole(what: Any, folder: Path) -> None:
    """`save_pretrained` (of one thing or several) into a folder that appears only when it is complete."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    with writing(folder):
        for one in what if isinstance(what, list) else [what]:
            one.save_pretrained(temporary)
        temporary.rename(folder)


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
    plan: Plan | None = None,
    k: int = 0,
) -> dict[str, Any]:
    """Everything a viewer needs of one rollout, as JSON."""
    weights = _weights(plan, trajectory, k) if plan else None
    return {
        "step": step,
        "kind": kind,
        "task_id": task.id,
        "route": plan.route if plan else None,
        "stop_reason": trajectory.stop_reason,
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
        "advantages": _floats(np.where(trajectory.sampled, plan.group.advantages[k], np.nan)) if plan else None,
        "weights": _floats(weights) if weights is not None else None,
        "expert": _expert(renderer, plan) if plan else None,
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


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("pact-fast", "torch", "transformers", "tokenizers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _weights(plan: Plan, trajectory: Trajectory, k: int) -> np.ndarray:
    """Policy-loss weight of every response token, summed over the contexts it is scored in."""
    weights = np.full(len(trajectory.ids), np.nan)
    weights[trajectory.sampled] = 0.0
    rollouts = max(len(plan.group.trajectories), 1)
    for s in plan.scored:
        if s.sequence >= 0 and s.sequence // 2 == plan.group.index * rollouts + k:
            weights[s.index] += s.rl_weight
    return weights


def _expert(renderer: ChatRenderer, plan: Plan) -> dict[str, Any] | None:
    """h* with the SFT weight of every token."""
    if plan.expert is None:
        return None
    node, components = plan.expert
    weights = np.zeros(len(node.ids))
    for s in plan.scored:
        if s.node is node:
            weights[s.index] = s.sft_weight
    return {"tokens": token_texts(renderer, node.ids), "components": components.tolist(), "weights": _floats(weights)}


def _floats(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(v) else float(f"{v:.4g}") for v in values]
