"""Benchmarks: tasks by category, the settings of an evaluation, and the reported scores.

    @benchmark("mine")
    class Mine(Benchmark):
        \"""One line that `pact-fast eval --help` could show.\"""

        categories = ("easy", "hard")
        settings = ("env.name=mine", "rollout.max_turns=20")

        def tasks(self, category: str) -> list[Task]: ...

A trajectory's score is the `success` that its environment returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from pact_fast.config import Config
from pact_fast.data.types import Task
from pact_fast.errors import PactError
from pact_fast.registry import Registry, did_you_mean

Split = Literal["train", "test", "all"]


@dataclass(frozen=True)
class CategoryGroup:
    """A row of the table that averages categories.

    name        of the row
    categories  all must have been evaluated, or the row is left out
    by          "category": the mean of the categories' scores; "task": every task counts the same
    """

    name: str
    categories: tuple[str, ...]
    by: Literal["category", "task"] = "category"


class Benchmark(ABC):
    """One benchmark. Made once per evaluation, with the settings of the command line.

    categories  names, in the order of the table
    refused     further categories of the benchmark that cannot be run, with the reason
    settings    `key=value` settings that come before the user's
    metrics     rewards of the environment that are reported beside `success`, by the name of their column
    groups      rows of averages
    """

    categories: ClassVar[tuple[str, ...]]
    refused: ClassVar[dict[str, str]] = {}
    settings: ClassVar[tuple[str, ...]] = ()
    metrics: ClassVar[dict[str, str]] = {}
    groups: ClassVar[tuple[CategoryGroup, ...]] = ()

    def __init__(self, config: Config):
        self.config = config

    @abstractmethod
    def tasks(self, category: str) -> list[Task]:
        """All tasks of a category, in a fixed order; ids are unique within the benchmark.

        Raises:
            PactError: Data or a package is missing; the message says how to get it.
        """

    def rows(self, category: str, split: Split) -> list[Task]:
        """The tasks that `pact-fast data convert` writes, with expert traces where the benchmark has them.

        A benchmark without a training split has `all` and `test` alone.
        """
        if split == "train":
            raise PactError(f"the category {category} has no training split; use --split all or --split test")
        return self.tasks(category)

    @classmethod
    def choose(cls, names: list[str] | None) -> tuple[str, ...]:
        """The categories with these names, in the benchmark's order; None: all. A group's name stands for its members.

        Raises:
            PactError: A name is unknown, or its category is refused.
        """
        if not names:
            return cls.categories
        groups = {group.name: group.categories for group in cls.groups}
        chosen: set[str] = set()
        for name in names:
            if name in cls.refused:
                raise PactError(f"the category {name} cannot be run: {cls.refused[name]}")
            if name not in cls.categories and name not in groups:
                known = [*cls.categories, *groups]
                raise PactError(f"unknown category '{name}'{did_you_mean(name, known)}; there are: {', '.join(known)}")
            chosen.update(groups.get(name, (name,)))
        return tuple(category for category in cls.categories if category in chosen)


benchmark: Registry[type[Benchmark]] = Registry("benchmark", "BENCH", "pact_fast.evaluation.benchmarks", Benchmark)
