"""Environment of tools given as Python sources in the task: FTRL, ToolHop, or your own (docs/environments.md)."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from pact_fast.data.absent import is_absent
from pact_fast.data.types import Task, ToolSchema, Trajectory
from pact_fast.envs.python_tools.pool import SandboxPool
from pact_fast.envs.python_tools.protections import describe
from pact_fast.envs.python_tools.task_check import check_task
from pact_fast.envs.registry import environment
from pact_fast.errors import PactError
from pact_fast.rewards.feedback import trajectory_feedback
from pact_fast.rewards.ftrl import official_solve_score, solve_score
from pact_fast.rewards.toolhop import is_correct, official_is_correct


@environment("python_tools")
class PythonTools:
    """Runs each call in a limited process of the pool. Calls share no state.

    Keys of `task.env_args`:

    codes         {tool name: source}; the source defines a function of that name
    scoring       "ftrl" or "toolhop", which needs an answer; without it there is no outcome reward
    unsolved_set  for ftrl: {tool name: [texts that its observations must contain]}
    """

    blocking = True

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Callable[[], PythonTools]:
        """Makes environments that share one pool of processes, stopped at exit.

        Args:
            args: Arguments of SandboxPool.
            tool_timeout: Seconds per call, unless `args` has a timeout.

        Raises:
            PactError: `args` has a key that SandboxPool does not take.
        """
        known = list(inspect.signature(SandboxPool).parameters)
        for key in args:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"python_tools takes {', '.join(known)}"
                raise PactError(f"env.args: unknown key '{key}'; {hint}")
        pool = SandboxPool(**{"timeout": tool_timeout, **args})
        return lambda: cls(pool)

    def __init__(self, pool: SandboxPool, timeout: float | None = None):
        """`timeout`: seconds per call; None: the pool's."""
        self._pool, self._timeout = pool, timeout
        self._codes: dict[str, str] = {}
        self._tools: list[ToolSchema] = []

    def reset(self, task: Task) -> str | None:
        """DataError if `check_task` finds something missing."""
        self.check_task(task)
        self._codes, self._tools = task.env_args["codes"], task.tools
        return None

    @staticmethod
    def check_task(task: Task) -> None:
        """DataError if the task lacks sources of its tools, or a reference for the scoring that it names."""
        check_task(task)

    @staticmethod
    def gives_success(task: Task) -> bool:
        """Whether `reward` returns `success` for the task: only with a scoring."""
        return task.env_args.get("scoring") is not None

    @property
    def tools(self) -> list[ToolSchema]:
        return self._tools

    def machine_report(self) -> list[str]:
        """Describe the sandbox's protections, in lines for `pact-fast doctor`."""
        return describe(self._pool.protections)

    def close(self) -> None:
        """Stop the pool, which all environments of one factory share: their calls end with an error within 3 seconds.

        May be called from any thread, and more than once.
        """
        self._pool.close()

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        source = self._codes.get(name)
        if source is None:
            return f"error: there is no tool '{name}'; the tools are: {', '.join(self._codes)}"
        return self._pool.call(source, name, arguments, self._timeout)

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """FTRL: solve_p, solve_r, solve_f1, success when all sub-questions are solved, and the first three by the
        authors' scoring; answer_correct if the task has an answer. ToolHop: success, and the same by its own script.
        """
        scoring = task.env_args.get("scoring")
        if scoring == "ftrl":
            feedback, expected = trajectory_feedback(trajectory), task.env_args["unsolved_set"]
            score, official = solve_score(feedback, expected), official_solve_score(feedback, expected)
            answer = (
                {} if is_absent(task.answer) else {"answer_correct": float(is_correct(str(task.answer), trajectory))}
            )
            return {
                "solve_p": score.precision,
                "solve_r": score.recall,
                "solve_f1": score.f1,
                "success": float(score.solved == score.questions),
                "official_solve_p": official.precision,
                "official_solve_r": official.recall,
                "official_solve_f1": official.f1,
                **answer,
            }
        if scoring == "toolhop":
            gold = str(task.answer)
            official_success = float(official_is_correct(gold, trajectory))
            return {"success": float(is_correct(gold, trajectory)), "official_success": official_success}
        return {}
