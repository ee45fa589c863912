"""Pretraining of a base model: SFT on noisy lookup_chain traces, from random weights or those of `model.path`.

With noise in the traces (wrong relations, early stops), the base model learns syntax and copying but not the strategy, so
sampled rollouts mostly fail. Reinforcement learning can close that gap in minutes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from math import ceil

import numpy as np
from transformers import PreTrainedModel

from pact_fast.algorithms.base import Group, PromptBatch
from pact_fast.algorithms.sft import SFT
from pact_fast.batch.loss_table import ScoredTokens
from pact_fast.batch.tree import TokenTree
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.components import Component
from pact_fast.config import AlgorithmConfig, Config, TrainerConfig
from pact_fast.data.sources import TaskSource
from pact_fast.data.types import Task
from pact_fast.envs.lookup_chain import TraceNoise, noisy_trace
from pact_fast.model.device import precision
from pact_fast.train.learner import Learner


def pretrain(
    config: Config,
    model: PreTrainedModel,
    renderer: ChatRenderer,
    tasks: TaskSource,
    on_step: Callable[[int, float], None],
) -> None:
    """Train `model` in place. The result depends on the seed alone.

    Args:
        config: The run's configuration; its `pretrain` section must be set.
        model: The model to train.
        renderer: Renders the traces.
        tasks: Source of lookup_chain tasks.
        on_step: Called with (step, loss) after every step.
    """
    assert config.pretrain is not None
    settings = config.pretrain
    learner = Learner(
        model,
        _trainer(config),
        SFT(AlgorithmConfig()),
        total_updates=settings.steps,
        autocast=precision(config, model.device),
    )
    noise = TraceNoise(settings.early_stop, settings.wrong_relation)
    for step in range(settings.steps):
        # negative step numbers: none of these tasks appears again in RL
        tasks_of_step = tasks.train(-1 - step, settings.batch_size)
        rng = random.Random(f"pretrain/{config.seed}/{step}")
        batches = [_noisy_batch(task, place, noise, rng, renderer) for place, task in enumerate(tasks_of_step)]
        total = sum(len(s.index) for batch in batches for s in batch.scored)
        for batch in batches:
            for s in batch.scored:
                s.sft_weight = np.full(len(s.index), 1.0 / total)
        # linear decay from the peak to final_lr_ratio of it
        decay = 1 - (1 - settings.final_lr_ratio) * step / max(settings.steps - 1, 1)
        on_step(step, learner.update(batches, lr_scale=decay).loss)


def _trainer(config: Config) -> TrainerConfig:
    """Optimizer settings of the pretraining stage; its packs are as large as those of the run."""
    assert config.pretrain is not None
    return TrainerConfig(
        learning_rate=config.pretrain.learning_rate,
        warmup_steps=min(20, ceil(config.pretrain.steps / 10)),  # a short stage reaches its peak, too
        weight_decay=0.01,
        adam_beta2=0.98,
        max_tokens_per_pack=config.trainer.max_tokens_per_pack,
    )


def _noisy_batch(task: Task, place: int, noise: TraceNoise, rng: random.Random, renderer: ChatRenderer) -> PromptBatch:
    """A noisy trace of a task, answer included, with weight 1 on every generated token."""
    trace = noisy_trace(task, noise, rng)
    prompt = renderer.prompt_ids(task.prompt, task.tools)
    body = renderer.trace_context(task, trace, "turns")
    answer_ids, answer_components = renderer.assistant_turn(trace.answer_reasoning, trace.answer or "", [])
    components = np.concatenate([body.components, answer_components])
    tree = TokenTree()
    node = tree.add(np.concatenate([body.ids, answer_ids]), tree.add(prompt))
    index = np.flatnonzero(np.isin(components, [Component.REASONING, Component.TOOL_CALL, Component.ANSWER]))
    scored = ScoredTokens.of_expert(
        node, prompt=place, index=index, component=components[index], weight=np.ones(len(index))
    )
    return PromptBatch(Group(task, place, prompt), "expert", [tree], [scored])
