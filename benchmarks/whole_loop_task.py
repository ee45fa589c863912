"""Tasks of the whole-loop benchmark: a class for TRL's `environment_factory`, its reward, its rows, and traces for a base.

Both trainers run `Lookups` and `success` unchanged. A row tells where a chain of relations leads ("From @cleo follow: boss
city."); the tools are the same for all rows, and what they answer is in the row.
"""

from __future__ import annotations

import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pact_fast.data.readers import write_tasks
from pact_fast.data.types import Task, ToolSchema
from pact_fast.envs.adapters.callables import FunctionTools, public_methods
from pact_fast.envs.adapters.trl import NOT_TOOLS
from pact_fast.envs.lookup_chain import (
    HANDLES,
    SYSTEM,
    Facts,
    Question,
    TraceNoise,
    question_text,
    split_of,
    write_trace,
)

RELATIONS = ("bank", "boss", "city", "club", "road", "team")
NAMES = 6  # of a task


class Lookups:
    """An environment as TRL has them: `reset` gets the row, public methods are tools."""

    def reset(self, facts: str, **row: Any) -> None:
        self._facts: Facts = json.loads(facts)

    def get_bank(self, of: str) -> str:
        """bank

        Args:
            of: A name.
        """
        return self._look_up("bank", of)

    def get_boss(self, of: str) -> str:
        """boss

        Args:
            of: A name.
        """
        return self._look_up("boss", of)

    def get_city(self, of: str) -> str:
        """city

        Args:
            of: A name.
        """
        return self._look_up("city", of)

    def get_club(self, of: str) -> str:
        """club

        Args:
            of: A name.
        """
        return self._look_up("club", of)

    def get_road(self, of: str) -> str:
        """road

        Args:
            of: A name.
        """
        return self._look_up("road", of)

    def get_team(self, of: str) -> str:
        """team

        Args:
            of: A name.
        """
        return self._look_up("team", of)

    def _look_up(self, relation: str, of: str) -> str:
        return self._facts[relation].get(of, "error: unknown name")


@functools.cache
def schemas() -> list[ToolSchema]:
    """Of the tools; a trainer finds them by itself, traces need them."""
    return FunctionTools(public_methods(Lookups(), NOT_TOOLS)).schemas


def success(completions: list[list[dict[str, Any]]], answer: list[str], **columns: Any) -> list[float]:
    """TRL's signature: 1 where the last message of a completion is the answer, and nothing else."""
    return [float(_said(messages) == right) for messages, right in zip(completions, answer, strict=True)]


def _said(messages: list[dict[str, Any]]) -> str | None:
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or last.get("tool_calls"):
        return None
    return last["content"].strip()


@dataclass(frozen=True)
class LookupTasks:
    """A TaskSource of such tasks with noisy traces, a pure function of the fields; questions of the splits never coincide.

    seed   of the tasks
    hops   fewest and most relations of a question
    noise  errors of the traces
    """

    seed: int
    hops: tuple[int, int]
    noise: TraceNoise = TraceNoise()  # noqa: RUF009  it is frozen

    def train(self, step: int, count: int) -> list[Task]:
        return [self.task("train", step * count + index) for index in range(count)]

    def held_out(self, count: int) -> list[Task]:
        return [self.task("eval", index) for index in range(count)]

    def task(self, split: Literal["train", "eval"], index: int) -> Task:
        rng = random.Random(f"whole_loop/{self.seed}/{split}/{index}")
        while True:
            task = self._draw(rng, f"{split}-{self.seed}-{index}")
            if split_of(task) == split:
                return task

    def _draw(self, rng: random.Random, task_id: str) -> Task:
        names = rng.sample(HANDLES, NAMES)
        facts = {
            relation: {name: rng.choice([n for n in names if n != name]) for name in names} for relation in RELATIONS
        }
        relations = rng.sample(RELATIONS, rng.randint(*self.hops))
        question = Question((rng.choice(names),), tuple(relations), ())
        return Task(
            id=task_id,
            prompt=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question_text(question)}],
            tools=schemas(),
            expert=write_trace(question, facts, self.noise, rng),
            answer=write_trace(question, facts).answer,
            columns={"facts": json.dumps(facts)},
        )


def write_rows(path: Path, tasks: list[Task]) -> None:
    """A data file of both trainers: prompt, answer and facts, without the trace; the tools are those of the class."""
    rows = [Task(id=task.id, prompt=task.prompt, answer=task.answer, columns=task.columns) for task in tasks]
    write_tasks(path, rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows as TRL's dataset has them."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: row[name] for name in ("prompt", "answer", "facts")} for row in rows]
