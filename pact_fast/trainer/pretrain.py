"""The base model of the quickstart: SFT on noisy toolchain traces, from random weights.

The noise (wrong relations, early stops) makes a base that is sharp on grammar and copying but unsure of strategy, so that it is
mostly wrong when sampled. That is the gap which reinforcement learning can close in minutes.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from transformers import PreTrainedModel

from pact_fast.algorithms.base import Group, Plan, Scored
from pact_fast.config import AlgorithmConfig, Config, PretrainConfig, TrainerConfig
from pact_fast.data.rendering import ChatRenderer
from pact_fast.data.types import Component, Task
from pact_fast.envs.toolchain import Noise, noisy_trace
from pact_fast.kernels.tokens import Stream
from pact_fast.trainer.learner import Learner
from pact_fast.trainer.setup import TaskSource
from pact_fast.tree import TokenTree


def pretrain(
    config: Config,
    model: PreTrainedModel,
    renderer: ChatRenderer,
    tasks: TaskSource,
    on_step: Callable[[int, float], None],
) -> None:
    """Train `model` in place; `on_step(step, loss)` after every step. A pure function of the seed."""
    assert config.pretrain is not None
    settings = config.pretrain
    learner = Learner(model, _trainer(settings), AlgorithmConfig(name="sft"), total_updates=settings.steps)
    noise = Noise(settings.early_stop, settings.wrong_relation)
    for step in range(settings.steps):
        # negative steps: none of these tasks comes back in RL
        batch = tasks.train(-1 - step, settings.batch_size)
        rng = random.Random(f"pretrain/{config.seed}/{step}")
        plans = [_plan(task, noise, rng, renderer) for task in batch]
        total = sum(len(s.index) for plan in plans for s in plan.scored)
        for plan in plans:
            for s in plan.scored:
                s.sft_weight = np.full(len(s.index), 1.0 / total)
        # linear decay from the peak to final_lr_ratio of it
        learner.trainer.learning_rate = settings.learning_rate * (
            1 - (1 - settings.final_lr_ratio) * step / max(settings.steps - 1, 1)
        )
        on_step(step, learner.update(plans).loss)


def _trainer(settings: PretrainConfig) -> TrainerConfig:
    return TrainerConfig(
        learning_rate=settings.learning_rate, warmup_steps=min(20, settings.steps), weight_decay=0.01, adam_beta2=0.98
    )


def _plan(task: Task, noise: Noise, rng: random.Random, renderer: ChatRenderer) -> Plan:
    trace = noisy_trace(task, noise, rng)
    prompt = renderer.prompt_ids(task.prompt, task.tools)
    body = renderer.trace_context(task, trace, "turns")
    answer_ids, answer_components = renderer.assistant_turn(trace.answer_reasoning, trace.answer or "", [])
    ids = np.concatenate([body.ids, answer_ids])
    components = np.concatenate([body.components, answer_components])
    tree = TokenTree()
    node = tree.add(ids, tree.add(prompt))
    index = np.flatnonzero(np.isin(components, [Component.REASONING, Component.TOOL_CALL, Component.ANSWER]))
    m = len(index)
    nan = np.full(m, np.nan, np.float32)
    scored = Scored(
        node=node, stream=Stream.EXPERT, sequence=0, index=index, component=components[index],
        advantage=np.zeros(m, np.float32), rl_weight=np.zeros(m), sft_weight=np.ones(m),
        sampler_logprob=nan, old_logprob=nan, ref_logprob=nan,
    )  # fmt: skip
    return Plan(Group(task, 0, prompt), "expert", [tree], [scored])
