"""Tasks of environments that own their data: the same question, another seed."""

from __future__ import annotations

import random

from pact_fast.data.types import Task


class GeneratedTasks:
    """A TaskSource by index: a pure function of seed, split and index.

    Args:
        name: Prefix of the ids.
        prompt: The question, to which `reset` appends the first observation.
        seed: Seed of the run.
    """

    def __init__(self, name: str, prompt: str, seed: int):
        self._name, self._prompt, self._seed = name, prompt, seed

    def train(self, step: int, count: int) -> list[Task]:
        return [self._task("train", step * count + index) for index in range(count)]

    def held_out(self, count: int) -> list[Task]:
        return [self._task("eval", index) for index in range(count)]

    def _task(self, split: str, index: int) -> Task:
        # training draws even seeds, the held-out tasks odd ones, so that no episode is in both
        drawn = random.Random(f"{self._seed}/{split}/{index}").getrandbits(30)
        return Task(
            id=f"{self._name}-{split}-{self._seed}-{index}",
            prompt=[{"role": "user", "content": self._prompt}],
            env_args={"seed": 2 * drawn + (split == "eval")},
        )
