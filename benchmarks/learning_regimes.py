"""Regimes of the learning study: which tasks, which traces, which reward, and which base model training starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from benchmarks.learning_tasks import ColdTasks, DemonstratedTasks, TaskSet
from pact_fast.data.sources import TaskSource

TINY = (  # a Qwen3 of 0.13 M parameters that learns to read tools in half a minute of one core
    "model.random_init.hidden_size=64",
    "model.random_init.intermediate_size=192",
    "model.random_init.num_hidden_layers=2",
    "model.random_init.num_attention_heads=2",
    "env.args={hops: [1, 5], distractors: 1, flaky: 0.0, parallel: 0.0}",
    "pretrain.steps=600",
    "pretrain.learning_rate=4.0e-3",
)


@dataclass(frozen=True)
class Base:
    """A base model, trained once for each seed and shared by all methods and regimes that name it.

    settings  of the recipe `quickstart`, whose pretraining makes it
    after     the base whose pretraining goes on; None: random weights
    tasks     what becomes of the recipe's tasks, whose traces are noisy
    """

    settings: tuple[str, ...]
    after: str | None = None
    tasks: Callable[[TaskSource], TaskSource] = lambda tasks: tasks


BASES = {
    "warm": Base(TINY),
    "cold": Base(
        (*TINY, "pretrain.steps=60", "pretrain.learning_rate=1.0e-3"), "warm", lambda tasks: ColdTasks(tasks, wrong=0.9)
    ),
    "in-context": Base(
        (*TINY, "pretrain.steps=300", "pretrain.learning_rate=2.0e-3"),
        "warm",
        lambda tasks: DemonstratedTasks(tasks, demonstrated=0.5),
    ),
}


@dataclass(frozen=True)
class Regime:
    """One kind of training problem.

    about     for tables
    train     training tasks and their expert traces
    held_out  validation and test tasks
    reward    dense: matching and answers, turn by turn; outcome: success alone, for every method
    base      key of BASES; None: `settings` name a model of their own
    tasks     distinct training tasks; None: every task is new
    source    the recipe that `settings` override
    settings  of every run
    """

    about: str
    train: TaskSet
    held_out: TaskSet
    reward: Literal["dense", "outcome"] = "dense"
    base: str | None = "warm"
    tasks: int | None = None
    source: str = "quickstart"
    settings: tuple[str, ...] = ()


def few(tasks: int) -> Regime:
    """A regime with few tasks, which are seen many times."""
    return Regime(f"{tasks} tasks with traces, many epochs", MEDIUM, MEDIUM, tasks=tasks)


MEDIUM, LONG = TaskSet((2, 3)), TaskSet((4, 5))
SMOLLM2_LONG = ("rollout.max_turns=6", "rollout.max_completion_length=480")
SMOLLM2 = (
    "model.path=models/smollm2",
    "pretrain=null",
)  # the untrained model; docs/quickstart.md says where it is from
REGIMES = {
    "long-outcome": Regime("4 or 5 hops, reward for success alone", LONG, LONG, "outcome"),
    "cold": Regime("2 or 3 hops, base that rarely writes a valid call", MEDIUM, MEDIUM, base="cold"),
    "in-context": Regime(
        "4 or 5 hops, reward for success alone, base that can follow a trace in its context",
        LONG,
        LONG,
        "outcome",
        base="in-context",
    ),
    "dense": Regime("2 or 3 hops, turn rewards", MEDIUM, MEDIUM),
    "few-16": few(16),
    "noisy": Regime("2 or 3 hops, one call in five of a trace is wrong", TaskSet((2, 3), wrong_relation=0.2), MEDIUM),
    "shift": Regime(
        "trained on 1 to 2 hops, tested on 3 to 4 with tools that no training task has",
        TaskSet((1, 2), tools="common"),
        TaskSet((3, 4), tools="rare"),
    ),
    "outcome": Regime("2 or 3 hops, reward for success alone", MEDIUM, MEDIUM, "outcome"),
    "long": Regime("4 or 5 hops, turn rewards", LONG, LONG),
    "few-64": few(64),
    "few-256": few(256),
    "smollm2-cold": Regime(
        "SmolLM2-135M-Instruct without a warm-up, 1 to 3 hops",
        TaskSet((1, 3)),
        TaskSet((1, 3)),
        base=None,
        source="smollm2-cpu",
        settings=SMOLLM2,
    ),
    "smollm2-long-outcome": Regime(
        "SmolLM2-135M-Instruct without a warm-up, 4 or 5 hops, reward for success alone",
        LONG,
        LONG,
        "outcome",
        base=None,
        source="smollm2-cpu",
        settings=SMOLLM2 + SMOLLM2_LONG,
    ),
}
