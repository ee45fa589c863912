"""Built-in environment: multi-hop look-ups with tools, generated from a seed.

A task asks where a chain of relations leads ("From @cleo follow: boss city."), from one start or from two at once. Each
tool looks up one relation. Its answers are drawn at random for each task and cannot be memorised: the policy has to
call, read and call again. Some tools are distractors; some are flaky, which means that they fail at the first try and
must be called again; two starts are looked up in parallel calls. Difficulty is the number of relations (hops).

The generator also writes the expert trace of a task, and noisy traces (wrong relation, early stop). Pretraining on noisy
traces gives a base model that knows the grammar but not the strategy.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    """The chain of a task.

    starts     names from which the chain is followed
    relations  relations to follow, in order
    flaky      relations that answer BUSY at the first try
    """

    starts: tuple[str, ...]
    relations: tuple[str, ...]
    flaky: tuple[str, ...]


@dataclass(frozen=True)
class TraceNoise:
    """Errors of a noisy trace, as probabilities."""

    early_stop: float = 0.0  # per turn after the first: answer now
    wrong_relation: float = 0.0  # per turn: look up another relation


class LookupChainTasks:
    """Tasks by index: a pure function of (seed, split, index). Train and held-out tasks never overlap.

    Args:
        split: Which of the two sets of tasks.
        seed: Seed of the generator.
        hops: Least and most relations per task.
        distractors: Tools offered beyond those that the question needs.
        flaky: Probability that a relation of the question fails at its first try.
        parallel: Probability that a task has two starts.

    Raises:
        PactError: `hops` or `distractors` need more relations than there are.
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
        """Task number `index`; its id is `lookup_chain-{split}-{seed}-{index}`."""
        # the environment's former name stays in the label: another label would draw other tasks
        rng = random.Random(f"toolchain/{self.seed}/{self.split}/{index}")
        while True:
            task = self._draw(rng, f"lookup_chain-{self.split}-{self.seed}-{index}")
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
        flaky = tuple(relation for relation in needed if rng.random() < self.flaky)
        question = Question(starts, tuple(needed), flaky)
        expert = write_trace(question, facts)
        return Task(
            id=task_id,
            prompt=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question_text(question)}],
            tools=[relation_schema(relation) for relation in offered],
            expert=expert,
            reference_calls=expert.calls,
            answer=expert.answer,
            env="lookup_chain",
            env_args={"facts": facts, "starts": list(starts), "relations": needed, "flaky": list(flaky)},
        )


class LookupChainSource:
    """A TaskSource of generated tasks; training never sees the same index twice.

    The tasks name no environment, so that they run in the one that generated them: `LookupChain` or a subclass of it.
    """

    def __init__(self, args: dict[str, Any], seed: int):
        try:
            self._train, self._eval = LookupChainTasks("train", seed, **args), LookupChainTasks("eval", seed, **args)
        except TypeError as error:
            raise PactError(f"env.args: {error}; lookup_chain takes hops, distractors, flaky and parallel") from None

    def train(self, step: int, count: int) -> list[Task]:
        return [replace(task, env=None) for task in self._train.tasks(count, start=step * count)]

    def held_out(self, count: int) -> list[Task]:
        return [replace(task, env=None) for task in self._eval.tasks(count)]


@environment("lookup_chain")
class LookupChain:
    """Runs the look-ups of one task. Calls are cheap and pure, so they run in line."""

    blocking = False

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Callable[[], LookupChain]:
        """`args` are for the tasks; the environment itself needs none."""
        return cls

    @classmethod
    def tasks(cls, args: dict[str, Any], seed: int) -> LookupChainSource:
        return LookupChainSource(args, seed)

    def __init__(self) -> None:
        self._facts: Facts = {}
        self._failures_left: dict[str, int] = {}  # relation -> calls that will still fail

    def reset(self, task: Task) -> str | None:
        if "facts" not in task.env_args:
            raise PactError(
                f"task {task.id} is not a lookup_chain task (env_args has no 'facts'); set env.name for your data"
            )
        self._facts = task.env_args["facts"]
        self._failures_left = {relation: len(task.env_args["starts"]) for relation in _flaky(task)}
        return None

    @property
    def tools(self) -> list[ToolSchema]:
        return [relation_schema(relation) for relation in self._facts]

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        relation = name.removeprefix("get_")
        table = self._facts.get(relation)
        if table is None:
            return f"error: no tool {name}"
        if self._failures_left.get(relation):
            self._failures_left[relation] -= 1
            return BUSY
        return table.get(str(arguments.get("of")), "error: unknown name")

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        return {"success": float(trajectory.answer.strip() == task.answer)}


def relation_schema(relation: str) -> ToolSchema:
    """The schema of the tool that looks up a relation."""
    return {
        "type": "function",
        "function": {
            "name": f"get_{relation}",
            "description": relation,
            "parameters": {"type": "object", "properties": {"of": {"type": "string"}}, "required": ["of"]},
        },
    }


def question_text(question: Question) -> str:
    """The question as the policy reads it."""
    return f"From {' and '.join(question.starts)} follow: {' '.join(question.relations)}."


def split_of(task: Task) -> Split:
    """One task in eight is held out. Depends on the question and its answer alone, not on the seed."""
    key = task.prompt[-1]["content"] + str(task.answer)
    return "eval" if zlib.crc32(key.encode()) % 8 == 0 else "train"


def noisy_trace(task: Task, noise: TraceNoise, rng: random.Random) -> ExpertTrace:
    """A trace of the task with errors drawn from `noise`; its answer is the name that it reaches."""
    args = task.env_args
    question = Question(tuple(args["starts"]), tuple(args["relations"]), _flaky(task))
    return write_trace(question, args["facts"], noise, rng)


def _flaky(task: Task) -> tuple[str, ...]:
    """The relations that fail at the first try. PactError for rows that name them by the key of earlier versions."""
    if "busy" in task.env_args:
        raise PactError(f"task {task.id}: the key 'busy' of env_args is now called 'flaky'; rename it in your data")
    return tuple(task.env_args["flaky"])


def write_trace(
    question: Question, facts: Facts, noise: TraceNoise | None = None, rng: random.Random | None = None
) -> ExpertTrace:
    """The trace that follows the relations turn by turn, all starts in parallel, and repeats look-ups that failed.

    Each turn reasons in three sentences: the current names, the relations left, the next look-up.

    Args:
        question: The chain to follow.
        facts: Answers of the tools.
        noise: Errors of the trace; None: the expert trace.
        rng: Draws the errors.
    """
    noise, rng = noise or TraceNoise(), rng or random.Random(0)
    at, left, flaky = list(question.starts), list(question.relations), set(question.flaky)
    turns: list[ExpertTurn] = []
    while left and not (turns and rng.random() < noise.early_stop):
        pick = left[0]
        if rng.random() < noise.wrong_relation:
            pick = rng.choice([relation for relation in facts if relation != pick])
        reasoning = f"{_state(at, left)} Next: {pick}."
        calls = tuple(ToolCall(f"get_{pick}", {"of": name}) for name in at)
        if pick in flaky:
            flaky.remove(pick)
            turns.append(ExpertTurn(reasoning, calls, (BUSY,) * len(at)))
            continue
        at = [facts[pick][name] for name in at]
        left.pop(0)
        turns.append(ExpertTurn(reasoning, calls, tuple(at)))
    return ExpertTrace(tuple(turns), " and ".join(at), f"{_state(at, left)} Next: answer.")


def _state(at: list[str], left: list[str]) -> str:
    return f"At {' and '.join(at)}. Left: {' '.join(left) or 'none'}."
