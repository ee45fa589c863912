"""An environment in one file: a calculator that generates its own tasks.

    pact-fast train quickstart env.name=examples/own_environment.py:Calculator env.args={} pretrain=null

One instance serves one trajectory: `reset`, then `call` as often as the policy likes, then `reward`. With tasks from your
own data (`data.train=...`), leave `tasks` out.
"""

from __future__ import annotations

import random
from typing import Any

from pact_fast.data.readers import tool_schema
from pact_fast.data.types import ExpertTrace, ExpertTurn, Task, ToolCall, ToolSchema, Trajectory


def add(a: int, b: int) -> int:
    """The sum of two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


class Sums:
    """Generates tasks: a pure function of seed and place, so that a resumed run sees the same ones."""

    def __init__(self, seed: int, largest: int = 99):
        self.seed, self.largest = seed, largest

    def train(self, step: int, count: int) -> list[Task]:
        return [self._task("train", step * count + i) for i in range(count)]

    def held_out(self, count: int) -> list[Task]:
        return [self._task("eval", i) for i in range(count)]

    def _task(self, split: str, index: int) -> Task:
        rng = random.Random(f"{self.seed}/{split}/{index}")
        a, b = rng.randint(0, self.largest), rng.randint(0, self.largest)
        call, answer = ToolCall("add", {"a": a, "b": b}), str(a + b)
        return Task(
            id=f"{split}-{index}",
            prompt=[{"role": "user", "content": f"What is {a} plus {b}?"}],
            tools=[tool_schema(add)],
            expert=ExpertTrace((ExpertTurn("I add them.", (call,), (answer,)),), answer),
            reference_calls=[call],
            answer=answer,
        )


class Calculator:
    """`env.args` are the arguments of the constructor."""

    blocking = False  # calls take no time, so they run in line

    def __init__(self, largest: int = 99):
        self.largest = largest

    @classmethod
    def tasks(cls, args: dict[str, Any], seed: int) -> Sums:
        return Sums(seed, **args)

    def reset(self, task: Task) -> str | None:
        return None  # or text to append to the question

    @property
    def tools(self) -> list[ToolSchema]:
        return [tool_schema(add)]

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        # the agent loop has checked name and arguments against the schema
        return str(add(**arguments)) if name == "add" else f"error: no tool {name}"

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        return {"success": float(trajectory.answer.strip() == task.answer)}
