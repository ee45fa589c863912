"""Built-in environment: multi-hop look-ups with tools, made from a seed.

A task asks for the end of one or two chains of relations ("from cleo follow boss, city"). Every tool looks up one relation;
names and values are drawn anew for each task, so nothing can be memorised: the policy has to call, read and call again. Some
tools are distractors, some look-ups are busy at the first try and must be repeated, and two chains are best looked up in
parallel. Difficulty is the number of look-ups (hops).

The generator also writes the expert trace of a task, and noisy traces (wrong relation, early stop) that make a base model
which knows the grammar but not the strategy.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pact_fast.data.types import ExpertTrace, ExpertTurn, Task, ToolCall, ToolSchema, Trajectory
from pact_fast.errors import PactError

RELATIONS = ("boss", "city", "bank", "club", "road", "team", "shop", "port", "farm", "king", "lake", "band")
NAMES = tuple(
    """ada ben cleo dora emil fred gina hugo iris jack kira liam mona nils olga paul rita sven tess ugo vera will yara zoe
    bert cora dean elsa finn greta hans lena"""
    .split()
)
BUSY = "error: busy, try again"
SYSTEM = "Use the tools."

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Chain:
    """`relations` are followed from `start`, first to last."""

    start: str
    relations: tuple[str, ...]


@dataclass(frozen=True)
class Noise:
    """How a noisy trace errs: per turn it may answer too early, per hop it may follow a wrong relation."""

    early_stop: float = 0.0
    wrong_relation: float = 0.0


class ToolchainTasks:
    """Tasks by index, the same for the same (seed, split, index). Train and held-out tasks never overlap.

    hops         range of look-ups per task, both ends included
    distractors  tools offered beyond those that the question needs
    flaky        probability that a look-up on the way is busy at its first try
    parallel     probability that a task has two chains
    """

    def __init__(
        self,
        split: Split,
        seed: int,
        *,
        hops: tuple[int, int] = (2, 4),
        distractors: int = 2,
        flaky: float = 0.05,
        parallel: float = 0.2,
    ):
        low, high = hops
        if not 1 <= low <= high <= len(RELATIONS):
            raise PactError(f"env.args.hops: [{low}, {high}] must lie within 1..{len(RELATIONS)}, smaller first")
        if not 0 <= distractors <= len(RELATIONS) - high:
            raise PactError(f"env.args.distractors: {distractors} must lie within 0..{len(RELATIONS) - high}")
        self.split, self.seed, self.hops = split, seed, (low, high)
        self.distractors, self.flaky, self.parallel = distractors, flaky, parallel

    def task(self, index: int) -> Task:
        """Task number `index`; its id is `toolchain-{split}-{seed}-{index}`."""
        rng = random.Random(f"toolchain/{self.seed}/{self.split}/{index}")
        while True:
            task = self._draw(rng, f"toolchain-{self.split}-{self.seed}-{index}")
            if split_of(task) == self.split:
                return task

    def tasks(self, count: int, start: int = 0) -> list[Task]:
        return [self.task(index) for index in range(start, start + count)]

    def _draw(self, rng: random.Random, task_id: str) -> Task:
        hops = rng.randint(*self.hops)
        names = rng.sample(NAMES, 6)
        relations = rng.sample(RELATIONS, hops + self.distractors)
        needed, offered = relations[:hops], sorted(relations)
        facts = {relation: {name: rng.choice([n for n in names if n != name]) for name in names} for relation in offered}
        if hops >= 2 and rng.random() < self.parallel:
            cut = rng.randint(1, hops - 1)
            first, second = rng.sample(names, 2)
            chains = [Chain(first, tuple(needed[:cut])), Chain(second, tuple(needed[cut:]))]
        else:
            chains = [Chain(rng.choice(names), tuple(needed))]
        busy = [relation for relation in needed if rng.random() < self.flaky]
        world = {"facts": facts, "busy": busy, "chains": [[c.start, list(c.relations)] for c in chains]}
        expert = write_trace(chains, facts, busy)
        return Task(
            id=task_id,
            prompt=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question(chains)}],
            tools=[schema(relation) for relation in offered],
            expert=expert,
            reference_calls=expert.calls,
            answer=expert.answer,
            env="toolchain",
            env_args=world,
        )


class ToolchainEnvironment:
    """Runs the look-ups of one task. Cheap and pure, so calls run in line."""

    blocking = False

    def __init__(self) -> None:
        self._facts: dict[str, dict[str, str]] = {}
        self._busy: set[str] = set()

    def reset(self, task: Task) -> str | None:
        self._facts = task.env_args["facts"]
        self._busy = set(task.env_args["busy"])
        return None

    @property
    def tools(self) -> list[ToolSchema]:
        return [schema(relation) for relation in self._facts]

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        table = self._facts.get(name.removeprefix("get_"))
        if table is None:
            return f"error: no tool {name}"
        if name.removeprefix("get_") in self._busy:
            self._busy.remove(name.removeprefix("get_"))
            return BUSY
        return table.get(str(arguments.get("of")), "error: unknown name")

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        return {"success": float(trajectory.answer.strip() == task.answer)}


def factory(args: dict[str, Any]) -> Callable[[], ToolchainEnvironment]:
    """Environment factory; `args` are ToolchainTasks' and are not needed to run a task."""
    return ToolchainEnvironment


def schema(relation: str) -> ToolSchema:
    return {
        "type": "function",
        "function": {
            "name": f"get_{relation}",
            "description": f"the {relation}",
            "parameters": {"type": "object", "properties": {"of": {"type": "string"}}, "required": ["of"]},
        },
    }


def question(chains: list[Chain]) -> str:
    return " ".join(f"From {chain.start} follow {', '.join(chain.relations)}." for chain in chains)


def split_of(task: Task) -> Split:
    """One task in eight is held out, decided by the question and its answer alone, whatever the seed."""
    key = task.prompt[-1]["content"] + str(task.answer)
    return "eval" if zlib.crc32(key.encode()) % 8 == 0 else "train"


def chains_of(task: Task) -> list[Chain]:
    return [Chain(start, tuple(relations)) for start, relations in task.env_args["chains"]]


def noisy_trace(task: Task, noise: Noise, rng: random.Random) -> ExpertTrace:
    """A trace of the task that errs as `noise` says; its answer is where it ended up."""
    return write_trace(chains_of(task), task.env_args["facts"], task.env_args["busy"], noise, rng)


def write_trace(
    chains: list[Chain],
    facts: dict[str, dict[str, str]],
    busy: list[str],
    noise: Noise | None = None,
    rng: random.Random | None = None,
) -> ExpertTrace:
    """Follow the chains turn by turn, unfinished chains in parallel, repeating busy look-ups.

    Each turn reasons in three sentences: where it stands, what is left, what it does next. Without noise this is the expert.
    """
    at = [chain.start for chain in chains]
    left = [list(chain.relations) for chain in chains]
    waiting = set(busy)
    turns: list[ExpertTurn] = []
    while any(left):
        if turns and noise and rng and rng.random() < noise.early_stop:
            break
        active = [i for i, relations in enumerate(left) if relations]
        picks = [_pick(left[i][0], facts, noise, rng) for i in active]
        calls = tuple(ToolCall(f"get_{pick}", {"of": at[i]}) for i, pick in zip(active, picks, strict=True))
        observations = []
        reasoning = _state(at, left) + f" Next: {' and '.join(picks)}."
        for i, pick in zip(active, picks, strict=True):
            if pick in waiting:
                waiting.remove(pick)
                observations.append(BUSY)
                continue
            at[i] = facts[pick][at[i]]
            left[i].pop(0)
            observations.append(at[i])
        turns.append(ExpertTurn(reasoning, calls, tuple(observations)))
    return ExpertTrace(tuple(turns), " and ".join(at), _state(at, left) + " Next: answer.")


def _state(at: list[str], left: list[list[str]]) -> str:
    remaining = " and ".join(" ".join(relations) if relations else "none" for relations in left)
    return f"At {' and '.join(at)}. Left: {remaining}."


def _pick(right: str, facts: dict[str, dict[str, str]], noise: Noise | None, rng: random.Random | None) -> str:
    if noise and rng and rng.random() < noise.wrong_relation:
        return rng.choice([relation for relation in facts if relation != right])
    return right

