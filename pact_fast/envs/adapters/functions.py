"""The environment `functions`: typed Python functions as tools, and classes whose methods are tools."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from pact_fast.data.types import Task, ToolSchema, Trajectory
from pact_fast.envs.adapters.arguments import BadCall
from pact_fast.envs.adapters.callables import STATE, FunctionTools, public_methods
from pact_fast.envs.adapters.options import Args, read_args
from pact_fast.envs.adapters.results import cut, failure, result_text
from pact_fast.envs.python_tools.pool import SandboxPool
from pact_fast.envs.python_tools.protections import describe
from pact_fast.envs.registry import environment
from pact_fast.errors import PactError
from pact_fast.plugins import load_object, no_exit


class FunctionsArgs(Args):
    """`env.args` of the environment.

    tools     `file.py:name` or `module:name` each: a function, or a class of which every episode makes an instance
    sandbox   run every call in the sandbox of python_tools; functions of files without state only
    blocking  calls may take long and run in threads; None: if one of the functions is async
    """

    tools: list[str] = Field(min_length=1)
    sandbox: bool = False
    blocking: bool | None = None


@environment("functions")
class Functions:
    """Serves the tools of one episode. Its state is new in each: `task.env_args["state"]`, copied, and the classes' own.

    Args:
        made: The functions and classes.
        timeout: Seconds that a coroutine may take.
        blocking: See FunctionsArgs; None: if a function is async.
        sandbox: (pool that runs the calls, {tool: source}); None: they run in this process.
    """

    ordered = True

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Callable[[], Functions]:
        """PactError if a function cannot be loaded, or has no schema."""
        read = read_args(FunctionsArgs, args)
        found = [load_object(spec, "tool") for spec in read.tools]
        if read.sandbox:
            sources = {function.__name__: sandbox_source(function) for function in found}
            cls(found).start({})
            pool = SandboxPool(timeout=tool_timeout)
            return lambda: cls(found, tool_timeout, True, (pool, sources))
        cls(found).start({})  # finds errors before the model is loaded
        return lambda: cls(found, tool_timeout, read.blocking)

    @staticmethod
    def gives_success(task: Task) -> bool:
        """The outcome is decided by the user's reward functions."""
        return False

    def __init__(
        self,
        made: list[Callable[..., Any]],
        timeout: float | None = None,
        blocking: bool | None = None,
        sandbox: tuple[SandboxPool, dict[str, str]] | None = None,
    ):
        self._made, self._timeout, self._blocking, self._sandbox = made, timeout, blocking, sandbox
        self._tools = FunctionTools([])

    @property
    def blocking(self) -> bool:
        """Valid after `reset`: a class may have async methods."""
        return self._tools.is_async if self._blocking is None else self._blocking

    def start(self, state: dict[str, Any]) -> None:
        """Begin an episode with a state. PactError if there are no tools."""
        functions: list[Callable[..., Any]] = []
        for one in self._made:
            if not inspect.isclass(one):
                functions.append(one)
                continue
            with no_exit(f"the class {one.__name__}"):
                functions += public_methods(one())
        self._tools = FunctionTools(functions, copy.deepcopy(state))
        if not self._tools.schemas:
            raise PactError("env.args.tools: the classes have no public methods, so there are no tools")

    def reset(self, task: Task) -> str | None:
        state = task.env_args.get(STATE, {})
        if not isinstance(state, dict):
            raise PactError(f"task {task.id}: env_args.state must be an object, not {type(state).__name__}")
        self.start(state)
        return None

    @property
    def tools(self) -> list[ToolSchema]:
        return self._tools.schemas

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        try:
            if self._sandbox:
                given, (pool, sources) = self._tools.check(name, arguments), self._sandbox
                return pool.call(sources[name], name, given)
            return cut(result_text(self._tools.invoke(name, arguments, self._timeout)))
        except PactError:
            raise
        except BadCall as error:
            return f"error: {error}"
        except TimeoutError:
            return f"error: the tool did not finish within {self._timeout or 0:g} s"
        except Exception as error:
            return failure(error)

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        return {}

    def machine_report(self) -> list[str]:
        """Describe where the tools run, in lines for `pact-fast doctor`."""
        if self._sandbox:
            return describe(self._sandbox[0].protections)
        return ["tools: run in this process, with all its rights"]

    def close(self) -> None:
        """Stop the sandbox, if there is one."""
        if self._sandbox:
            self._sandbox[0].close()


def sandbox_source(function: Callable[..., Any]) -> str:
    """The file of a function, which a call executes. PactError if the function keeps state or is no plain function."""
    name = getattr(function, "__name__", repr(function))
    if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
        raise PactError(f"env.args.sandbox: {name} is a class or async; the sandbox runs plain functions only")
    if STATE in inspect.signature(function).parameters:
        raise PactError(f"env.args.sandbox: {name} keeps state, and every call in the sandbox is a new process")
    try:
        return Path(inspect.getsourcefile(function) or "").read_text(encoding="utf-8")
    except OSError:
        raise PactError(f"env.args.sandbox: the file of {name} cannot be read") from None
