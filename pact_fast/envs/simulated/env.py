"""The environment `simulated`: calls go to the ToolActor; rewards are exact match and the trace reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from pact_fast.data.types import StopReason, Task, ToolCall, ToolSchema, Trajectory, text_of
from pact_fast.envs.registry import environment
from pact_fast.envs.simulated.actor import MAX_OUTPUT, Episode, ToolActor
from pact_fast.envs.simulated.backend import ToolBackend
from pact_fast.envs.simulated.facts import FactsBackend
from pact_fast.envs.simulated.faults import Faults
from pact_fast.envs.simulated.model import ModelBackend
from pact_fast.envs.simulated.recorded import ObservationStore, ReplayBackend
from pact_fast.envs.simulated.schemas import schema_error
from pact_fast.envs.simulated.world import ToolWorld
from pact_fast.errors import PactError
from pact_fast.rewards.answers import extract_answer
from pact_fast.rewards.qa import QaSet, qa_scores
from pact_fast.rewards.trace import is_right, trace_reward
from pact_fast.text import short

ARGUMENTS = ("backend", "cache", "faults", "max_output", "consistency_weight", "answer_metric", "backend_args")


@environment("simulated")
class Simulated:
    """Serves one trajectory at a time; the ToolActor and its store are shared by all of a process.

    Args:
        actor: Answers the calls.
        weight: w of the trace reward.
        metric: `em` or `f1`, its measure of the answer. `success` is always exact match.
    """

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Callable[[], Simulated]:
        """`env.args`: see docs/mtr.md. PactError for an unknown key, or a value that does not fit."""
        unknown = [key for key in args if key not in ARGUMENTS]
        if unknown:
            raise PactError(f"env.args: unknown key {short(unknown[0])}; simulated takes {', '.join(ARGUMENTS)}")
        weight, metric = args.get("consistency_weight", 0.2), args.get("answer_metric", "em")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
            raise PactError(f"env.args.consistency_weight: {short(weight)} must be a number in [0, 1]")
        if metric not in ("em", "f1"):
            raise PactError(f"env.args.answer_metric: {short(metric)} must be em or f1")
        actor = make_actor(args)
        return lambda: cls(actor, float(weight), metric)

    def __init__(self, actor: ToolActor | None = None, weight: float = 0.2, metric: str = "em"):
        self._actor = actor or make_actor({})
        self._weight, self._metric = weight, metric
        self.blocking = self._actor.backend.blocking
        self._world = ToolWorld({})
        self._episode: Episode = self._actor.episode("", self._world)

    @classmethod
    def check_task(cls, task: Task) -> None:
        """PactError if `tools` and `env_args` do not describe simulated tools, or there is no answer to reward."""
        ToolWorld.from_task(task.tools, task.env_args)
        if not gold_answers(task):
            raise PactError(f"task {task.id}: the environment simulated needs an 'answer' or 'answers'")

    def reset(self, task: Task) -> str | None:
        self._world = ToolWorld.from_task(task.tools, task.env_args)
        self._episode = self._actor.episode(task.id, self._world, gold_answers(task))
        return None

    @property
    def tools(self) -> list[ToolSchema]:
        return [tool.schema for tool in self._world.tools.values()]

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        return self._episode.call(name, arguments)

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """`success` (exact match), the trace reward with its parts, and `f1` if the row names its data set."""
        question = text_of(task.prompt[-1].get("content"))
        answered = trajectory.stop_reason is StopReason.ANSWER
        answers = gold_answers(task)
        score = trace_reward(
            trajectory.turns,
            question,
            answers,
            answered=answered,
            fits=self._fits,
            evidence=task.env_args.get("evidence", ()),
            tools=len(task.tools),
            weight=self._weight,
            metric=self._metric,
        )
        said = extract_answer(trajectory.answer).strip()
        f1 = {"f1": qa_scores(said, answers, qa_set(task))["f1"]} if "qa_set" in task.env_args else {}
        return {"success": float(is_right(said, answers)), **score.to_rewards(), **f1}

    def _fits(self, call: ToolCall) -> bool:
        tool = self._world.tools.get(call.name)
        return tool is not None and schema_error(call.arguments, tool.parameters) is None


def gold_answers(task: Task) -> list[str]:
    """Every accepted answer: `answer`, and those of the column `answers`."""
    listed = task.columns.get("answers")
    found = [task.answer, *(listed if isinstance(listed, list) else [])]
    return list(dict.fromkeys(str(answer) for answer in found if answer is not None and str(answer).strip()))


def qa_set(task: Task) -> QaSet:
    """Return the dataset whose metric scores the row: `env_args.qa_set`, by default HotpotQA."""
    name = task.env_args.get("qa_set", "hotpotqa")
    if name not in get_args(QaSet):
        raise PactError(
            f"task {task.id}: env_args.qa_set is {short(name)}; it must be one of {', '.join(get_args(QaSet))}"
        )
    return name


BACKENDS: dict[str, Callable[[dict[str, Any]], ToolBackend]] = {
    "facts": lambda args: FactsBackend(),
    "model": ModelBackend.from_args,
}


def make_actor(args: Mapping[str, Any]) -> ToolActor:
    """The actor that `env.args` describe. PactError if they do not fit together."""
    name = args.get("backend", "facts")
    cache = args.get("cache")
    if cache is not None and not isinstance(cache, str):
        raise PactError(f"env.args.cache: {short(cache)} must be the path of a file")
    backend: ToolBackend
    if name == "replay":
        if cache is None:
            raise PactError("env.args.backend=replay needs env.args.cache, the file to replay")
        if not Path(cache).is_file():
            raise PactError(f"env.args.cache: no file {cache} to replay; record one with another backend first")
        backend = ReplayBackend()
    elif name in BACKENDS:
        backend = BACKENDS[name](dict(args.get("backend_args") or {}))
    else:
        raise PactError(
            f"env.args.backend: unknown backend {short(name)}; there are: {', '.join([*BACKENDS, 'replay'])}"
        )
    if not backend.deterministic and cache is None:
        raise PactError(
            f"env.args.backend={name} may answer equal calls differently; set env.args.cache to a file that keeps its "
            "first answers"
        )
    limit = args.get("max_output", MAX_OUTPUT)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 64:
        raise PactError(f"env.args.max_output: {short(limit)} must be a number of characters, at least 64")
    faults = args.get("faults") or {}
    if not isinstance(faults, dict):
        raise PactError(f"env.args.faults: {short(faults)} must be an object")
    return ToolActor(backend, ObservationStore(Path(cache) if cache else None), Faults.from_settings(faults), limit)
