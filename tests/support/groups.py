"""Real tasks, trajectories and groups for tests, without a trained model: noisy traces stand in for sampled rollouts."""

from __future__ import annotations

import copy
import functools
import random

import numpy as np

from pact_fast.algorithms.base import Group, StepContext
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.components import Component
from pact_fast.config import AlgorithmConfig
from pact_fast.config.schema import RewardConfig
from pact_fast.data.types import Task, Trajectory, TurnRecord
from pact_fast.distributed.world import World
from pact_fast.envs.lookup_chain import LookupChainTasks, TraceNoise, noisy_trace
from pact_fast.model.tokenizer import train_tokenizer
from pact_fast.rewards.advantages import token_advantages
from pact_fast.rewards.score import score

GENERATED = (Component.REASONING, Component.TOOL_CALL, Component.ANSWER)


@functools.cache  # a second to train; renderers hold no state of their users
def lookup_chain_renderer(vocab_size: int = 512) -> ChatRenderer:
    return ChatRenderer(train_tokenizer(LookupChainTasks("train", 0).tasks(100), vocab_size))


def trajectory_of(renderer: ChatRenderer, task: Task, rng: random.Random) -> Trajectory:
    """A trajectory whose tokens are those of a noisy trace."""
    trace = noisy_trace(task, TraceNoise(0.3, 0.3), rng)
    parts = []
    for index, turn in enumerate(trace.turns):
        parts.append((index, *renderer.assistant_turn(turn.reasoning, turn.content, turn.calls)))
        parts.append(
            (index, *renderer.bridge_tokens([{"role": "tool", "content": text} for text in turn.observations]))
        )
    parts.append((len(trace.turns), *renderer.assistant_turn(trace.answer_reasoning, trace.answer, [])))
    ids = np.concatenate([ids for _, ids, _ in parts])
    components = np.concatenate([components for _, _, components in parts]).astype(np.uint8)
    sampled = np.isin(components, GENERATED)
    logprobs = np.where(sampled, np.array([-rng.random() for _ in ids]), np.nan).astype(np.float32)
    turns = [TurnRecord("", t.reasoning, t.content, list(t.calls), list(t.observations)) for t in trace.turns]
    return Trajectory(
        task_id=task.id,
        prompt_ids=renderer.prompt_ids(task.prompt, task.tools),
        ids=ids,
        components=components,
        turn_ids=np.concatenate([np.full(len(i), t, np.int16) for t, i, _ in parts]),
        sampled=sampled,
        logprobs=logprobs,
        versions=np.where(sampled, 0, -1).astype(np.int32),
        turns=[*turns, TurnRecord("", "", trace.answer)],
        stop_reason="answer",
        env_rewards={"success": float(trace.answer == task.answer)},
    )


def make_groups(
    renderer: ChatRenderer, config: AlgorithmConfig, prompts: int, rollouts: int, seed: int = 0, use_turns: bool = True
):
    """Rewarded groups with advantages, as the training loop makes them; the caller may change them."""
    made = _made_groups(renderer, config.reward.model_dump_json(), prompts, rollouts, seed, use_turns)
    return [
        Group(
            copy.copy(g.task), g.prompt_index, g.prompt_ids, copy.deepcopy(g.trajectories), copy.deepcopy(g.advantages)
        )
        for g in made
    ]


@functools.cache  # rendering takes longer than most uses of the groups
def _made_groups(
    renderer: ChatRenderer, reward: str, prompts: int, rollouts: int, seed: int, use_turns: bool
) -> list[Group]:
    config = RewardConfig.model_validate_json(reward)
    rng = random.Random(seed)
    groups = []
    for index, task in enumerate(LookupChainTasks("train", seed).tasks(prompts)):
        trajectories = [trajectory_of(renderer, task, rng) for _ in range(rollouts)]
        for t in trajectories:
            score(config, task, t)
        advantages = token_advantages(trajectories, gamma=config.gamma, combine="sum", scale=True, use_turns=use_turns)
        groups.append(Group(task, index, renderer.prompt_ids(task.prompt, task.tools), trajectories, advantages))
    return groups


def step_context_of(
    renderer: ChatRenderer,
    config: AlgorithmConfig,
    groups: list[Group],
    step: int = 3,
    horizon: int = 10,
    world: World | None = None,
) -> StepContext:
    """The context of an optimizer step on `groups`, those of all ranks of `world`."""
    return StepContext(
        config=config,
        renderer=renderer,
        seed=0,
        step=step,
        horizon=horizon,
        prompts=len(groups),
        sampled_tokens=sum(int(t.sampled.sum()) for g in groups for t in g.trajectories),
        max_completion_length=512,
        over_ranks=(world or World()).sum_counts,
    )
