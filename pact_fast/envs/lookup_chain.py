"""Built-in environment: multi-hop look-ups with tools, made from a seed.

A task asks where a chain of relations leads ("From @cleo follow: boss city."), from one start or from two at once. Every tool
looks up one relation; what it answers is drawn anew for each task, so nothing can be memorised: the policy has to call, read
and call again. Some tools are distractors, some are busy at the first try and must be called again, and two starts are looked
up in parallel calls. Difficulty is the number of relations (hops).

The generator also writes the expert trace of a task, and noisy traces (wrong relation, early stop) that make a base model
which knows the grammar but not the strategy.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pact_fast.data.types import ExpertTrace, ExpertTurn, Task, ToolCall, ToolSchema, Trajectory
from pact_fast.envs.registry import environment
from pact_fast.errors import PactError

RELATIONS = ("boss", "city", "bank", "club", "road", "team", "shop", "port", "farm", "king", "lake", "band")
_NAMES = """ada ben bert cleo cora dean dora elsa emil finn fred gina greta hans hugo iris
    jack kira lena liam mona nils olga paul rita sven tess ugo vera will yara zoe"""
HANDLES = tuple(f"@{name}" for name in _NAMES.split())
BUSY = "error: busy, try again"
SYSTEM = "Use the tools."

Split = Literal["train", "eval"]


Facts = dict[str, dict[str, str]]  # relation -> name -> value


@dataclass(frozen=True)
class Question:
    """`relations` are followed from every start, first to last. `busy` relations fail at the first try."""

    starts: tuple[str, ...]
    relations: tuple[str, ...]
    busy: tuple[str, ...]


@dataclass(frozen=True)
class TraceNoise:
    """How a noisy trace errs: per turn it may answer too early, per hop it may follow a wrong relation."""

    early_stop: float = 0.0
    wrong_relation: float = 0.0


class LookupChainTasks:
    """Tasks by index, the same for the same (seed, split, index). Train and held-out tasks never overlap.

    hops         range of look-ups per task, both ends included
    distractors  tools offered beyond those that the question needs
    flaky        probability that a look-up on the way is busy at its first try
    parallel     probability that a task has two starts
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
        names = rng.sample(HANDLES, 6)
        relations = rng.sample(RELATIONS, hops + self.distractors)
        needed, offered = relations[:hops], sorted(relations)
        facts = {
            relation: {name: rng.choice([n for n in names if n != name]) for name in names} for relation in offered
        }
        starts = tuple(rng.sample(names, 2 if rng.random() < self.parallel else 1))
        chain = Question(starts, tuple(needed), tuple(relation for relation in needed if rng.random() < self.flaky))
        expert = write_trace(chain, facts)
        return Task(
            id=task_id,
            prompt=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question(chain)}],
            tools=[schema(relation) for relation in offered],
            expert=expert,
            reference_calls=expert.calls,
            answer=expert.answer,
            env="lookup_chain",
            env_args={"facts": facts, **{key: list(value) for key, value in asdict(chain).items()}},
        )


class GeneratedTasks:
    """A TaskSource of generated tasks; training never sees the same index twice."""

    def __init__(self, args: dict[str, Any], seed: int):
        try:
            self._train, self._eval = LookupChainTasks("train", seed, **args), LookupChainTasks("eval", seed, **args)
        except TypeError as error:
            raise PactError(f"env.args: {error}; lookup_chain takes hops, distractors, flaky and parallel") from None

    def train(self, step: int, count: int) -> list[Task]:
        return self._train.tasks(count, start=step * count)

    def held_out(self, count: int) -> list[Task]:
        return self._eval.tasks(count)


@environment("lookup_chain")
class LookupChain:
    """Runs the look-ups of one task. Cheap and pure, so calls run in line."""

    blocking = False

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Callable[[], LookupChain]:
        """`args` are those of the tasks; the environment itself needs none."""
        return cls

    @classmethod
    def tasks(cls, args: dict[str, Any], seed: int) -> GeneratedTasks:
        return GeneratedTasks(args, seed)

    def __init__(self) -> None:
        self._facts: Facts = {}
        self._busy: dict[str, int] = {}  # relation -> calls that still fail

    def reset(self, task: Task) -> str | None:
        if "facts" not in task.env_args:
            raise PactError(
                f"task {task.id} is not a lookup_chain task (env_args has no 'facts'); set env.name for your data"
            )
        self._facts = task.env_args["facts"]
        self._busy = {relation: len(task.env_args["starts"]) for relation in task.env_args["busy"]}
        return None

    @property
    def tools(self) -> list[ToolSchema]:
        return [schema(relation) for relation in self._facts]

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        relation = name.removeprefix("get_")
        table = self._facts.get(relation)
        if table is None:
            return f"error: no tool {name}"
        if self._busy.get(relation):
            self._busy[relation] -= 1
            return BUSY
        return table.get(str(arguments.get("of")), "error: unknown name")

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        return {"success": float(trajectory.answer.strip() == task.answer)}


def schema(relation: str) -> ToolSchema:
    return {
        "type": "function",
        "function": {
            "name": f"get_{relation}",
            "description": relation,
            "parameters": {"type": "object", "properties": {"of": {"type": "string"}}, "required": ["of"]},
        },
    }


def question(chain: Question) -> str:
    return f"From {' and '.join(chain.starts)} follow: {' '.join(chain.relations)}."


def split_of(task: Task) -> Split:
    """One task in eight is held out, decided by the question and its answer alone, whatever the seed."""
    key = task.prompt[-1]["content"] + str(task.answer)
    return "eval" if zlib.crc32(key.encode()) % 8 == 0 else "train"


def noisy_trace(task: Task, noise: TraceNoise, rng: random.Random) -> ExpertTrace:
    """A trace of the task that errs as `noise` says; its answer is where it ended up."""
    world = task.env_args
    chain = Question(tuple(world["starts"]), tuple(world["relations"]), tuple(world["busy"]))
    return write_trace(chain, world["facts"], noise, rng)


def write_trace(
    chain: Question, facts: Facts, noise: TraceNoise | None = None, rng: random.Random | None = None
) -> ExpertTrace:
    """Follow the relations turn by turn, all starts in parallel, repeating busy look-ups. Without noise this is the expert.

    Each turn reasons in three sentences: where it stands, what is left, what it does next.
    """
    noise, rng = noise or TraceNoise(), rng or random.Random(0)
    at, left, busy = list(chain.starts), list(chain.relations), set(chain.busy)
    turns: list[ExpertTurn] = []
    while left and not (turns and rng.random() < noise.early_stop):
        pick = left[0]
        if rng.random() < noise.wrong_relation:
            pick = rng.choice([relation for relation in facts if relation != pick])
        reasoning = f"{_state(at, left)} Next: {pick}."
        calls = tuple(ToolCall(f"get_{pick}", {"of": name}) for name in at)
        if pick in busy:
            busy.remove(pick)
            turns.append(ExpertTurn(reasoning, calls, (BUSY,) * len(at)))
            continue
        at = [facts[pick][name] for name in at]
        left.pop(0)
        turns.append(ExpertTurn(reasoning, calls, tuple(at)))
    return ExpertTrace(tuple(turns), " and ".join(at), f"{_state(at, left)} Next: answer.")


def _state(at: list[str], left: list[str]) -> str:
    return f"At {' and '.join(at)}. Left: {' '.join(left) or 'none'}."
