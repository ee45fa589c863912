"""Tasksets of the package verifiers from 0.4 on: their tasks, tools and rewards, without its harnesses and runtimes.

There, a rollout is a program in a sandbox that asks a model, and tools are servers beside it. What a task itself says needs
neither: its prompt, its tools, its rewards over the finished trace. That is served; a task that needs the sandbox is refused.
"""

from __future__ import annotations

import functools
import inspect
import json
from typing import Any

from pact_fast.data.types import Message, Task, ToolSchema, Trajectory, TurnRecord
from pact_fast.envs.adapters.arguments import BadCall, copy_arguments
from pact_fast.envs.adapters.background import run
from pact_fast.envs.adapters.mcp import observation
from pact_fast.envs.adapters.options import need
from pact_fast.envs.adapters.results import cut, failure
from pact_fast.envs.adapters.verifiers_tasks import PLACE, message_of
from pact_fast.errors import PactError
from pact_fast.plugins import describe_error, load_object, no_exit

INSTALL = "'verifiers>=0.4'"
_NEEDS_SANDBOX = ("setup", "finalize", "stage_verifier")  # methods of a Task that get the runtime


@functools.lru_cache(maxsize=8)
def load_taskset(id: str, args: str) -> TasksetTasks:
    """The tasks of a taskset.

    Args:
        id: Name of an installed one, or `file.py:Class`.
        args: Settings of its configuration, as JSON.

    Raises:
        PactError: It cannot be loaded, or needs an unsupported feature.
    """
    loaders = need("verifiers.v1.utils.loaders", INSTALL)
    try:
        with no_exit(f"the taskset {id}"):
            if ".py:" in id:
                kind = load_object(id, "verifiers taskset")
                own_env = False
            else:
                kind = loaders.taskset_class(id)
                own_env = loaders.environment_class(id) is not loaders.SingleAgentEnv
            tasks = list(_made(loaders, kind, json.loads(args)))
    except PactError:
        raise
    except Exception as error:
        raise PactError(f"{PLACE}: {id!r} cannot be loaded: {describe_error(error)}") from error
    if own_env:
        raise PactError(
            f"{PLACE}: {id} has an environment of its own, which runs several agents; only tasks are served"
        )
    if not tasks:
        raise PactError(f"{PLACE}: {id} has no tasks")
    for task in tasks:
        _check(task, id)
    return TasksetTasks(tasks, id.rpartition("/")[2].partition(".py:")[0])


def _made(loaders: Any, kind: Any, args: dict[str, Any]) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, loaders.Taskset)):
        raise PactError(f"{PLACE}: {kind!r} is no Taskset")
    settings = loaders.concrete_type(kind, loaders.TasksetConfig, origin=loaders.Taskset) or loaders.TasksetConfig
    taskset = kind(settings.model_validate(args))
    if not taskset.bounded:
        raise PactError(f"{PLACE}: {kind.__name__} yields tasks without end; give it a limit in env.args.args")
    return taskset


def _check(task: Any, id: str) -> None:
    """PactError if a task needs the sandbox, or a part of the package's own loop."""
    package = need("verifiers.v1", INSTALL)
    name = type(task).__name__
    if task.data.prompt is None:
        raise PactError(f"{PLACE}: a task of {id} has no prompt: the user would have to begin")
    if task.NEEDS_CONTAINER or task.data.image or task.data.skills or task.data.artifacts:
        raise PactError(f"{PLACE}: {name} needs a container; only tasks without one are served")
    own = [method for method in _NEEDS_SANDBOX if getattr(type(task), method) is not getattr(package.Task, method)]
    if own:
        raise PactError(f"{PLACE}: {name} overrides {own[0]}, which gets the sandbox of a rollout; there is none here")
    discover = need("verifiers.v1.utils.decorators", INSTALL).discover_decorated
    if discover(task, "intercept") or task.hooks("stop"):
        raise PactError(
            f"{PLACE}: {name} stops or rewrites the requests of a harness (stop, intercept); there are none here"
        )
    judges = [judge.score for judge in task.plugged_judges()]
    for function in (*task.hooks("metric"), *task.hooks("reward"), *judges):
        given = inspect.signature(function).parameters.get("runtime")
        if given is not None and given.default is inspect.Parameter.empty:
            raise PactError(
                f"{PLACE}: the score {function.__name__} of {name} needs the sandbox of a rollout (runtime)"
            )
    for toolset in task.toolsets(task.config):
        if toolset.config.url:
            raise PactError(f"{PLACE}: the tools {type(toolset).__name__} are a server; set env.name=mcp for it")


class TasksetTasks:
    """A TaskSource: the tasks in their order, epoch after epoch; none is held out."""

    def __init__(self, tasks: list[Any], name: str):
        self.tasks, self._name = tasks, name

    def train(self, step: int, count: int) -> list[Task]:
        return [self._task(at % len(self.tasks)) for at in range(step * count, (step + 1) * count)]

    def held_out(self, count: int) -> list[Task]:
        return []

    def _task(self, index: int) -> Task:
        data, id = self.tasks[index].data, f"{self._name}-{index}"
        prompt = data.prompt if isinstance(data.prompt, list) else [{"role": "user", "content": data.prompt}]
        messages: list[Message] = [message_of(message, id) for message in prompt]
        if data.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": data.system_prompt})
        return Task(id=id, prompt=messages, env_args={"index": index})


class VerifiersTaskset:
    """One rollout of a task: its tools in this process, its rewards over the trace.

    Args:
        source: The tasks.
    """

    blocking = True
    ordered = True
    needs_tools = False

    def __init__(self, source: TasksetTasks):
        self._source = source
        self._tools: list[ToolSchema] = []

    def reset(self, task: Task) -> str | None:
        index = task.env_args.get("index")
        if not isinstance(index, int) or not 0 <= index < len(self._source.tasks):
            raise PactError(
                f"task {task.id}: env_args.index must be the position of a task, below {len(self._source.tasks)}"
            )
        self._task = self._source.tasks[index]
        self._prompt = task.prompt
        self._state = need("verifiers.v1.state", INSTALL).state_cls(type(self._task))()
        try:
            self._tools = run(self._start())
        except Exception as error:
            raise PactError(f"task {task.id}: its tools do not start: {describe_error(error)}") from error
        return None

    async def _start(self) -> list[ToolSchema]:
        """The tools, each of a toolset that is this episode's own and shares its state."""
        server = need("mcp.server.mcpserver", INSTALL).MCPServer("tools")
        discover = need("verifiers.v1.utils.decorators", INSTALL).discover_decorated
        for toolset in self._task.toolsets(self._task.config):
            toolset._inert_state = self._state  # its methods see it as self.state without a server
            await toolset.setup()
            await toolset.setup_task(self._task.data)
            prefix = f"{toolset.server_name}_" if toolset.server_name else ""
            for method in discover(toolset, "tool"):
                name = prefix + (method.tool_name or method.__name__)
                server.add_tool(method, name=name, description=(method.__doc__ or "").strip() or None)
        self._server = server
        return [_schema(tool.model_dump(by_alias=True, mode="json")) for tool in await server.list_tools()]

    @property
    def tools(self) -> list[ToolSchema]:
        return self._tools

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        known = [tool["function"]["name"] for tool in self._tools]
        if name not in known:
            return f"error: there is no tool {name[:60]!r}; the tools are: {', '.join(known)}"
        try:
            result = run(self._server.call_tool(name, copy_arguments(arguments)))
        except BadCall as error:
            return f"error: {error}"
        except Exception as error:
            return failure(error.__cause__ or error)
        return cut(observation(result.model_dump(by_alias=True, mode="json", exclude_none=True)))

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """`success`: the task's weighted reward; and each of its rewards and metrics by name."""
        trace = self._trace(trajectory)
        try:
            run(self._task.score(trace))
        except Exception as error:
            raise PactError(
                f"task {task.id}: {type(self._task).__name__} cannot be scored: {describe_error(error)}"
            ) from error
        scores = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
        metrics = {name: value for name, value in trace.metrics.items() if value is not None}
        return {**{name: float(value) for name, value in {**metrics, **scores}.items()}, "success": float(trace.reward)}

    def _trace(self, trajectory: Trajectory) -> Any:
        """The package's record of the rollout, from ours."""
        package, kinds = need("verifiers.v1.trace", INSTALL), need("verifiers.v1.types", INSTALL)
        config = need("verifiers.v1", INSTALL).AgentConfig()
        task = self._task
        trace = package.Trace(
            task=package.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
            state=self._state,
            agent=package.AgentInfo(config=config),
        )
        roles = {"system": kinds.SystemMessage, "user": kinds.UserMessage, "assistant": kinds.AssistantMessage}
        said = [(roles[message["role"]](content=message["content"]), False) for message in self._prompt]
        for number, turn in enumerate(trajectory.turns):
            said += _messages(kinds, turn, number)
        for index, (message, sampled) in enumerate(said):
            trace.nodes.append(
                package.MessageNode(parent=index - 1 if index else None, message=message, sampled=sampled)
            )
        trace.is_completed = trace.ok = True
        trace.stop_condition = "max_turns" if trajectory.stop_reason.is_truncated else "agent_completed"
        return trace


def _messages(kinds: Any, turn: TurnRecord, number: int) -> list[tuple[Any, bool]]:
    """(message, whether it was sampled) of a turn and the messages after it."""
    calls = [
        kinds.ToolCall(id=f"call_{number}_{at}", name=call.name, arguments=json.dumps(call.arguments))
        for at, call in enumerate(turn.calls)
    ]
    found = [
        (
            kinds.AssistantMessage(
                content=turn.content, reasoning_content=turn.reasoning or None, tool_calls=calls or None
            ),
            True,
        )
    ]
    at = 0
    for attempt, text in zip(turn.attempts, turn.observations, strict=False):
        is_call = not isinstance(attempt, str)
        id = f"call_{number}_{at}" if is_call else f"malformed_{number}"
        at += is_call
        found.append((kinds.ToolMessage(tool_call_id=id, content=text), False))
    return found


def _schema(tool: dict[str, Any]) -> ToolSchema:
    function = {"name": tool["name"], "description": tool.get("description") or "", "parameters": tool["inputSchema"]}
    return {"type": "function", "function": function}
