"""Whether both sides of the whole-loop benchmark do the same work: prompts, observations, rewards and gradients."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.whole_loop_pact import Base, Budget, pact_config, replace, silence
from benchmarks.whole_loop_task import Lookups, success
from benchmarks.whole_loop_trl import make_trainer, trl_settings
from pact_fast.algorithms.base import Group
from pact_fast.data.types import Trajectory
from pact_fast.train.collect import RolloutCollector
from pact_fast.train.learner import Learner
from pact_fast.train.run import Trainer

LIMIT = 1e-4  # of a gradient's relative difference, fp32


def disagreements(budget: Budget, base: Base, rows: Path) -> list[str]:
    """Differences between both sides on one step's rollouts of ours, a line each.

    Args:
        budget: Of the step.
        base: The model.
        rows: Training rows.
    """
    from trl.chat_template_utils import parse_response

    with tempfile.TemporaryDirectory() as folder:
        groups, gradients = sampled_step(budget, base, rows, Path(folder) / "pact_fast")
        trainer = make_trainer(budget, base, rows, trl_settings(budget, Path(folder) / "trl", 0, budget.rollouts))
    trainer._batch_environments = [None] * len(groups)
    prompts, _, _ = trainer._tokenize_prompts([group.task.prompt for group in groups])
    found = [
        f"{g.task.id}: prompts differ" for g, ids in zip(groups, prompts, strict=True) if g.prompt_ids.tolist() != ids
    ]
    for group in groups:
        for number, rollout in enumerate(group.trajectories):
            if any(turn.errors for turn in rollout.turns):
                continue  # a malformed call ends TRL's rollout; ours goes on with an error
            parts = runs(rollout)
            messages = [parse_response(trainer._tokenizer, ids, prefix=group.prompt_ids.tolist()) for ids in parts[::2]]
            problem = _differs(trainer, group, rollout, messages, parts)
            found += [f"{group.task.id}, rollout {number}: {problem}"] if problem else []
    worst = gradient_difference(trainer, groups, gradients)
    return found + ([f"gradients differ by {worst:.1e}"] if not worst <= LIMIT else [])


def _differs(
    trainer: Any, group: Group, rollout: Trajectory, messages: list[Any], parts: list[list[int]]
) -> str | None:
    """Differences between a rollout as TRL and as we see it."""
    env = Lookups()
    env.reset(**group.task.columns)
    for turn, message, bridge in zip(rollout.turns, messages, parts[1::2], strict=False):
        calls = [call["function"] for call in message.get("tool_calls") or []]
        if calls != [call.to_json() for call in turn.calls]:
            return "calls differ"
        seen = [str(getattr(env, call["name"])(**call["arguments"])) for call in calls]
        if seen != turn.observations:
            return "observations differ"
        tools = [{"role": "tool", "name": c["name"], "content": text} for c, text in zip(calls, seen, strict=True)]
        if trainer._get_tool_suffix_ids(tools) != bridge:
            return "tokens of observations differ"
    [reward] = success([messages], [str(group.task.answer)])
    ours = rollout.env_rewards["success"]
    return None if reward == ours else f"success {ours}, {reward} in TRL"


def runs(rollout: Trajectory) -> list[list[int]]:
    """The tokens in parts: a turn, what was written after it, a turn, and so on."""
    edges = np.flatnonzero(np.diff(rollout.sampled)) + 1
    return [part.tolist() for part in np.split(rollout.ids, edges)]


def sampled_step(budget: Budget, base: Base, rows: Path, out: Path) -> tuple[list[Group], dict[str, torch.Tensor]]:
    """One step of ours: its rollouts, and the gradient before clipping.

    A third of the rollouts count as solved, whatever they are: a model that solves none would have no gradient.
    """
    groups: list[Group] = []
    gradients: dict[str, torch.Tensor] = {}
    collect, score, step = RolloutCollector.collect, RolloutCollector._score, Learner.step

    def scored(self: RolloutCollector, tasks: Any, trajectories: list[Trajectory], number: int) -> None:
        score(self, tasks, trajectories, number)
        for index, trajectory in enumerate(trajectories):
            trajectory.reward = float(index % 3 == 0)

    def collected(self: RolloutCollector, *args: Any, **kwargs: Any) -> Any:
        found, stale = collect(self, *args, **kwargs)
        groups.extend(found)
        return found, stale

    def stepped(self: Learner, *args: Any, **kwargs: Any) -> float:
        gradients.update({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
        return step(self, *args, **kwargs)

    config = pact_config(budget, base, rows, out, 0)
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"max_steps": 1, "save_steps": 1})})
    with contextlib.ExitStack() as stack, silence():
        replace(stack, RolloutCollector, "_score", scored)
        replace(stack, RolloutCollector, "collect", collected)
        replace(stack, Learner, "step", stepped)
        Trainer(config).train()
    return groups, gradients


def gradient_difference(trainer: Any, groups: list[Group], gradients: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of a parameter's gradient from TRL's; small gradients are measured by the largest."""
    inputs = inputs_of(trainer, groups)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
    trainer._compute_loss(trainer.model, inputs).backward()
    theirs = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    if theirs.keys() != gradients.keys():
        return float("inf")
    scale = max(float(gradient.norm()) for gradient in theirs.values())
    return max(
        float((gradients[name] - gradient).norm()) / max(float(gradient.norm()), 1e-3 * scale)
        for name, gradient in theirs.items()
    )


def inputs_of(trainer: Any, groups: list[Group]) -> dict[str, torch.Tensor]:
    """Our rollouts as a batch of TRL's, with its advantages."""
    from trl.trainer.utils import pad

    fill = trainer._tokenizer.pad_token_id
    rollouts = [rollout for group in groups for rollout in group.trajectories]
    prompts = [torch.from_numpy(rollout.prompt_ids) for rollout in rollouts]
    completions = [torch.from_numpy(rollout.ids) for rollout in rollouts]
    tools = pad([torch.from_numpy(rollout.sampled).long() for rollout in rollouts], 1, "right")
    mask = pad([torch.ones_like(ids) for ids in completions], 0, "right")
    rewards = torch.tensor([[rollout.reward for rollout in group.trajectories] for group in groups])
    return {
        "prompt_ids": pad(prompts, fill, "left"),
        "prompt_mask": pad([torch.ones_like(ids) for ids in prompts], 0, "left"),
        "completion_ids": pad(completions, fill, "right"),
        "completion_mask": mask,
        "tool_mask": tools,
        "advantages": (rewards - rewards.mean(1, keepdim=True)).flatten(),  # scale_rewards="none"
        "num_items_in_batch": (mask * tools).sum(),
    }
