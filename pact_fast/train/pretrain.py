"""SFT before RL, from random weights or those of `model.path`: noisy traces of lookup_chain, or complete expert traces.

Tasks of lookup_chain get noise in their traces (wrong relations, early stops), so that the base model learns syntax and
copying but not the strategy, and sampled rollouts mostly fail. Reinforcement learning can close that gap in minutes. Other
tasks have expert traces of their own, which are trained as they are, with their final answers: stage 1 of MTR (docs/mtr.md).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from math import ceil

import numpy as np
from transformers import PreTrainedModel

from pact_fast.algorithms.base import Group, PromptBatch, expert_scored
from pact_fast.algorithms.branches import ExpertNodes, add_branches, add_context, rewound
from pact_fast.algorithms.sft import SFT
from pact_fast.batch.tree import TokenTree
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import AlgorithmConfig, Config, TrainerConfig
from pact_fast.data.sources import FileTasks, TaskSource
from pact_fast.data.types import ExpertTrace, Task
from pact_fast.envs.lookup_chain import TraceNoise, noisy_trace
from pact_fast.errors import PactError
from pact_fast.model.device import precision
from pact_fast.train.learner import Learner


def pretrain(
    config: Config,
    model: PreTrainedModel,
    renderer: ChatRenderer,
    tasks: TaskSource,
    on_step: Callable[[int, float], None],
    *,
    steps: int | None = None,
) -> None:
    """Train `model` in place. The result depends on the seed alone.

    Args:
        config: The run's configuration; its `pretrain` section must be set.
        model: The model to train.
        renderer: Renders the traces.
        tasks: Source of tasks, of lookup_chain or with expert traces.
        on_step: Called with (step, loss) after every step.
        steps: Optimizer steps; None: `pretrain.steps`.
    """
    assert config.pretrain is not None
    settings = config.pretrain
    steps = settings.steps if steps is None else steps
    learner = Learner(
        model,
        _trainer(config, steps),
        SFT(AlgorithmConfig()),
        total_updates=steps,
        autocast=precision(config, model.device),
    )
    noise = TraceNoise(settings.early_stop, settings.wrong_relation)
    for step in range(steps):
        # negative step numbers: of generated tasks, none appears again in RL
        place = step if getattr(tasks, "from_files", isinstance(tasks, FileTasks)) else -1 - step
        tasks_of_step = tasks.train(place, settings.batch_size)
        rng = random.Random(f"pretrain/{config.seed}/{step}")
        traces = [_trace(task, noise, rng) for task in tasks_of_step]
        batch = sft_batch(tasks_of_step, traces, renderer)
        total = sum(len(s.index) for s in batch.scored)
        for s in batch.scored:
            s.sft_weight = np.full(len(s.index), 1.0 / total)
        # linear decay from the peak to final_lr_ratio of it
        decay = 1 - (1 - settings.final_lr_ratio) * step / max(steps - 1, 1)
        on_step(step, learner.update([batch], lr_scale=decay).loss)


def _trainer(config: Config, steps: int) -> TrainerConfig:
    """Optimizer settings of the pretraining stage; its packs are as large as those of the run."""
    assert config.pretrain is not None
    return TrainerConfig(
        learning_rate=config.pretrain.learning_rate,
        warmup_steps=min(20, ceil(steps / 10)),  # a short stage reaches its peak, too
        weight_decay=0.01,
        adam_beta2=0.98,
        max_tokens_per_pack=config.trainer.max_tokens_per_pack,
    )


def _trace(task: Task, noise: TraceNoise, rng: random.Random) -> ExpertTrace:
    """A noisy trace of a lookup_chain task, or the expert trace of another one. PactError if it has none."""
    if {"starts", "relations", "facts"} <= task.env_args.keys():
        return noisy_trace(task, noise, rng)
    if task.expert is None or not task.expert.turns:
        raise PactError(
            f"task {task.id}: the section pretrain needs an expert trace in every row; drop the row or add one"
        )
    return task.expert


def sft_batch(tasks: Sequence[Task], traces: Sequence[ExpertTrace], renderer: ChatRenderer) -> PromptBatch:
    """Traces of tasks, answers included, with weight 1 on every generated token.

    They are one tree: the common beginning of their prompts (usually system message and tools) is computed once.
    """
    shown = [
        renderer.trace_context(task, trace, "turns", answer=True) for task, trace in zip(tasks, traces, strict=True)
    ]
    prompts, tail = [renderer.prompt_ids(task.prompt, task.tools) for task in tasks], rewound(shown)
    common = min(common_start(prompts), min(map(len, prompts)) - tail)
    tree = TokenTree()
    root = tree.add(prompts[0][:common])
    scored = []
    for place, (task, trace, prompt) in enumerate(zip(tasks, shown, prompts, strict=True)):
        x = add_context(tree, prompt[common:], root, tail)
        expert = ExpertNodes(add_branches(tree, x, trace), trace)
        scored += expert_scored(Group(task, place, prompt), expert, trace.generated.astype(np.float64))
    return PromptBatch(Group(tasks[0], 0, prompts[0]), "expert", [tree], scored)


def common_start(sequences: Sequence[np.ndarray]) -> int:
    """Number of tokens with which all sequences begin."""
    shortest = min(len(ids) for ids in sequences)
    differs = np.zeros(shortest, bool)
    for ids in sequences[1:]:
        differs |= ids[:shortest] != sequences[0][:shortest]
    return int(differs.argmax()) if differs.any() else shortest
