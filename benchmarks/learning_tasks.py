"""Tasks of the learning study: look-up chains as data files, the same for all methods of a regime and seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pact_fast.chat.chat_template import call_message
from pact_fast.chat.rendering import question_of
from pact_fast.data.readers import read_tasks, write_tasks
from pact_fast.data.sources import TaskSource
from pact_fast.data.types import ExpertTrace, ExpertTurn, Task, ToolCall
from pact_fast.envs.lookup_chain import RELATIONS, LookupChainTasks, TraceNoise, noisy_trace

RARE = frozenset(RELATIONS[-3:])  # relations that training tasks leave out where `tools` says so
Part = Literal["train", "validation", "test"]
SHIFT = {"validation": 1 << 20, "test": 0}  # first index of held-out tasks: the learning rate never sees a test task


@dataclass(frozen=True)
class TaskSet:
    """Distribution of tasks.

    hops            fewest and most relations of a question
    distractors     offered tools that the question does not need
    wrong_relation  probability per turn that the expert trace looks up a wrong relation
    tools           any; common: no question or offer with a RARE relation; rare: every question needs one
    """

    hops: tuple[int, int]
    distractors: int = 1
    wrong_relation: float = 0.0
    tools: Literal["any", "common", "rare"] = "any"

    def draw(self, part: Part, seed: int, count: int) -> list[Task]:
        """`count` tasks, a pure function of the arguments. Training and held-out questions never coincide."""
        source = LookupChainTasks(
            "train" if part == "train" else "eval",
            seed,
            hops=self.hops,
            distractors=self.distractors,
            flaky=0,
            parallel=0,
        )
        found = (task for task in _from(source, SHIFT.get(part, 0)) if self._fits(task))
        return [self._with_noise(next(found), seed) for _ in range(count)]

    def _fits(self, task: Task) -> bool:
        if self.tools == "common":
            return RARE.isdisjoint(task.env_args["facts"])
        return self.tools == "any" or not RARE.isdisjoint(task.env_args["relations"])

    def _with_noise(self, task: Task, seed: int) -> Task:
        """With errors in its trace, and in the reference calls, which are the trace's. The task's answer stays right."""
        if not self.wrong_relation:
            return task
        noise = TraceNoise(wrong_relation=self.wrong_relation)
        trace = noisy_trace(task, noise, random.Random(f"noise/{seed}/{task.id}"))
        return replace(task, expert=trace, reference_calls=trace.calls)


def _from(source: LookupChainTasks, first: int) -> Iterator[Task]:
    while True:
        yield source.task(first)
        first += 1


def write_files(folder: Path, train: TaskSet, held_out: TaskSet, seed: int, rows: int, evaluated: int) -> None:
    """train.jsonl, validation.jsonl and test.jsonl of a regime and seed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tasks(folder / "train.jsonl", train.draw("train", seed, rows))
    for part in ("validation", "test"):
        write_tasks(folder / f"{part}.jsonl", held_out.draw(part, seed, evaluated))


class ColdTasks:
    """Tasks for a base model that rarely writes a valid call: most of its traces call with a wrong argument name.

    The wrong call gets an error, after which the trace answers with the start of the chain.

    Args:
        tasks: The tasks.
        wrong: Fraction of traces with the wrong call.
    """

    def __init__(self, tasks: TaskSource, wrong: float):
        self._tasks, self._wrong = tasks, wrong

    def train(self, step: int, count: int) -> list[Task]:
        rng = random.Random(f"cold/{step}")
        return [_cold(task) if rng.random() < self._wrong else task for task in self._tasks.train(step, count)]

    def held_out(self, count: int) -> list[Task]:
        return self._tasks.held_out(count)


class DemonstratedTasks:
    """Tasks for a base model that can follow a trace in its context, as a large pre-trained model can.

    Some prompts hold the expert trace and the question again, as in PACT's rendering `demonstration`; what follows is the
    same trace once more. Their expert turns are not trained where they stand in the prompt.

    Args:
        tasks: The tasks.
        demonstrated: Fraction of prompts with the trace.
    """

    def __init__(self, tasks: TaskSource, demonstrated: float):
        self._tasks, self._demonstrated = tasks, demonstrated

    def train(self, step: int, count: int) -> list[Task]:
        rng = random.Random(f"demonstrated/{step}")
        tasks = self._tasks.train(step, count)
        return [demonstrated(task) if rng.random() < self._demonstrated else task for task in tasks]

    def held_out(self, count: int) -> list[Task]:
        return self._tasks.held_out(count)


def write_demonstrated(source: Path, target: Path) -> None:
    """Write the tasks of a file with their expert traces in their prompts."""
    write_tasks(target, (replace(demonstrated(task), env_args=task.env_args) for task in read_tasks(str(source))))


def demonstrated(task: Task) -> Task:
    """With its expert trace in the prompt; without the fields from which pretraining would draw another trace."""
    assert task.expert
    shown: list[dict[str, Any]] = []
    for turn in task.expert.turns:
        message = call_message(*turn.calls)
        shown += [message | {"content": turn.content, "reasoning_content": turn.reasoning}, *turn.following()]
    question = {"role": "user", "content": question_of(task)}
    return replace(task, prompt=[*task.prompt, *shown, question], env_args={})


def _cold(task: Task) -> Task:
    """With a trace of one invalid call; without the fields from which pretraining would draw another trace."""
    assert task.expert
    first, start = task.expert.turns[0], task.env_args["starts"][0]
    call = ToolCall(first.calls[0].name, {"name": start})
    turn = ExpertTurn(first.reasoning, (call,), ("error: missing argument 'of'",))
    return replace(task, expert=ExpertTrace((turn,), start, task.expert.answer_reasoning), env_args={})
