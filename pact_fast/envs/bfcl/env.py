"""The environment `bfcl`: episodes of BFCL v4, with the official checkers' verdicts as `success` (docs/bfcl.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pact_fast.data.types import Task, ToolCall, ToolSchema, Trajectory, TurnRecord
from pact_fast.envs.bfcl.ast_match import mismatch
from pact_fast.envs.bfcl.calls import PythonCall, read_turn
from pact_fast.envs.bfcl.entries import CATEGORIES, UNANSWERED, Entry, entry
from pact_fast.envs.bfcl.prompts import RECORDED, results_message, user_message
from pact_fast.envs.bfcl.schemas import tool_schema
from pact_fast.envs.bfcl.session import ApiSession
from pact_fast.envs.bfcl.tasks import BfclTasks
from pact_fast.envs.bfcl.verdict import MultiTurnVerdict
from pact_fast.envs.registry import environment
from pact_fast.errors import PactError
from pact_fast.registry import did_you_mean

MAX_STEPS = 20  # per user turn: a turn of more steps with calls fails the task, as in the official runner
FORMATS = ("json", "python")
ARGUMENTS = ("categories", "format")


@environment("bfcl")
class Bfcl:
    """Runs one task of BFCL; `task.env_args` holds its id.

    session  the API objects of the episode; None before reset, and for a single-turn task
    verdict  the check of its turns; None likewise

    Args:
        format: How the policy writes calls: `json`, tool calls of the chat template; `python`, a list of calls as the text
            of a turn, as in the official runner for prompted models.
    """

    blocking = False

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Callable[[], Bfcl]:
        """`categories` are for the tasks. PactError for an unknown argument or format."""
        for key in args:
            if key not in ARGUMENTS:
                raise PactError(
                    f"env.args: unknown key '{key}'{did_you_mean(key, list(ARGUMENTS))}; bfcl takes categories and format"
                )
        format = check_format(args.get("format", "json"))
        return lambda: cls(format)

    @classmethod
    def tasks(cls, args: dict[str, Any], seed: int) -> BfclTasks:
        """Tasks with expert traces of `args["categories"]`, by default the multi-turn ones."""
        cls.factory(args, 0)
        return BfclTasks(args.get("categories"), seed, args.get("format", "json"))

    def __init__(self, format: str = "json"):
        self.format = check_format(format)
        self._entry: Entry | None = None
        self.session: ApiSession | None = None
        self.verdict: MultiTurnVerdict | None = None
        self._steps = 0
        self._forced = False

    @staticmethod
    def check_task(task: Task) -> None:
        """PactError if the task names no task of the installed package."""
        entry_of(task)

    def reset(self, task: Task) -> str | None:
        found = self._entry = entry_of(task)
        self.session = ApiSession(found) if found.multi_turn else None
        self.verdict = MultiTurnVerdict(found) if found.multi_turn else None
        self._steps, self._forced = 0, False
        return None

    @property
    def tools(self) -> list[ToolSchema]:
        """The functions on offer in the turn under way; none in the format `python`, which shows them as text."""
        if self._entry is None or self.format == "python":
            return []
        turn = self.verdict.turn if self.verdict else 0
        late = [function for at, added in sorted(self._entry.late.items()) if at <= turn for function in added]
        return [tool_schema(function) for function in [*self._entry.functions, *late]]

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Run a call of a multi-turn task. A single-turn call is judged by its text, and not executed."""
        return self._execute(PythonCall(name, (), arguments))

    def respond(self, text: str) -> str | None:
        """The next user message; None after the last turn. In the format `python`, first the results of calls in `text`."""
        if self.verdict is None or self.session is None or self.verdict.finished or self._forced:
            return None
        calls = self._calls_in(text)
        if calls:
            self._steps += 1
            results = [self._execute(call) for call in calls]
            if self._steps > MAX_STEPS:
                self._forced = True
                return None
            return results_message(calls, results)
        self.verdict.end_turn(self.session)
        self._steps = 0
        if self.verdict.finished:
            return None
        assert self._entry is not None
        return user_message(self._entry, self.verdict.turn, self.format)

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """`success`: the official verdict. Multi-turn tasks also give `turns_passed`, a fraction."""
        if self._entry is None:
            raise PactError("bfcl: reward was called before reset; call reset first")
        if self.verdict is None:
            return {"success": float(self._accepted(trajectory))}
        forced = self._forced or longest_turn(trajectory.turns) > MAX_STEPS
        # of a turn that failed, and of those after it, none passed: each begins with the state that the last one left
        failed = self.verdict.failed_turn
        passed = self.verdict.turn if failed is None else failed
        return {
            "success": float(self.verdict.valid and not forced),
            "turns_passed": passed / len(self._entry.truth),
        }

    @property
    def failure(self) -> str | None:
        """Why a multi-turn task has failed so far."""
        return self.verdict.failure if self.verdict else None

    def _execute(self, call: PythonCall) -> str:
        if self.session is None or self.verdict is None:
            return RECORDED
        result = self.session.run(call.name, call.args, call.kwargs)
        self.verdict.add(result)
        return result

    def _calls_in(self, text: str) -> list[PythonCall]:
        if self.format == "json":
            return []
        try:
            return read_turn(text)
        except ValueError:
            return []

    def _accepted(self, trajectory: Trajectory) -> bool:
        """The verdict of a single-turn task, from the first turn."""
        assert self._entry is not None
        calls = self._single_turn_calls(trajectory.turns[0]) if trajectory.turns else None
        if self._entry.category in UNANSWERED:
            return bool(calls) == ("irrelevance" not in self._entry.category)
        if calls is None:
            return False
        return mismatch(self._entry.category, self._entry.functions, calls, self._entry.truth) is None

    def _single_turn_calls(self, turn: TurnRecord) -> list[dict[str, dict[str, Any]]] | None:
        """The calls of a turn as {name: arguments}; None if one of them cannot be read."""
        if self.format == "python":
            try:
                return [{call.name: call.kwargs} for call in read_turn(turn.content)]
            except ValueError:
                return None
        found = [{call.name: call.arguments} for call in turn.attempts if isinstance(call, ToolCall)]
        return found if len(found) == len(turn.attempts) else None


def entry_of(task: Task) -> Entry:
    """The benchmark's task behind a Task. PactError that names the task if there is none."""
    found = task.env_args.get("id")
    if not isinstance(found, str):
        raise PactError(f"task {task.id} is no BFCL task: its env_args have no 'id', such as multi_turn_base_0")
    return entry(found)


def check_format(format: Any) -> str:
    """The format of calls. PactError if it is unknown."""
    if format not in FORMATS:
        raise PactError(f"env.args.format is {format!r}; bfcl takes {' or '.join(FORMATS)}")
    return str(format)


def longest_turn(turns: list[TurnRecord]) -> int:
    """Most steps with calls between two messages of the user."""
    longest = steps = 0
    for turn in turns:
        steps = steps + 1 if turn.attempts else 0
        longest = max(longest, steps)
    return longest


__all__ = ["CATEGORIES", "Bfcl", "entry_of", "longest_turn"]
