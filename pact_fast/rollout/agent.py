"""The agent loop: samples many multi-turn trajectories at once.

Each advances on its own: render the prompt, ask the engine for a turn, parse it, run its tool calls, append the
observations, and so on until an answer or a limit. Where the environment has a user (`respond`), an answer is followed by
what the user says, and the environment decides when the episode is over. There is no barrier between turns, so a slow tool
holds up its own trajectory only.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pact_fast.chat.formats.json_calls import error_observation
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.chat.template_check import check_user_turns
from pact_fast.components import Component
from pact_fast.config import RolloutConfig
from pact_fast.config.filters import UNFILTERED, SamplingFilters
from pact_fast.data.types import Message, StopReason, Task, ToolCall, ToolSchema, Trajectory, TurnRecord, text_of
from pact_fast.envs.base import Environment, has_user
from pact_fast.envs.registry import is_built_in
from pact_fast.errors import PactError
from pact_fast.plugins import no_exit
from pact_fast.rollout.engine import Completion, Engine, Request
from pact_fast.rollout.pending import Pending, PendingToolCalls


def _for_environment(env: Environment, value: Any) -> Any:
    """A copy for an environment of the user's, which may change what it gets. Built-in ones change nothing, and a copy
    of a task takes longer than its reset."""
    return value if is_built_in(type(env)) else copy.deepcopy(value)


@dataclass(frozen=True)
class Job:
    """One trajectory to sample.

    task         its prompt and environment arguments
    rng_key      seeds its sampling
    temperature  0 is greedy
    group        number of its group: the trajectories of one prompt, whose rewards are compared
    filters      which tokens may be sampled; no effect where greedy
    """

    task: Task
    rng_key: tuple[int, ...]
    temperature: float = 1.0
    group: int = 0
    filters: SamplingFilters = UNFILTERED


@dataclass
class _ActiveTrajectory:
    """A trajectory that is being sampled; `length` in tokens after the prompt, `started` in seconds.

    tools    on offer now
    offered  a copy of what the environment offered when it was last asked; used where it has a user
    """

    job: Job
    env: Environment
    prompt_ids: np.ndarray
    tools: list[ToolSchema]
    offered: list[ToolSchema] | None = None
    ids: list[np.ndarray] = field(default_factory=list)
    components: list[np.ndarray] = field(default_factory=list)
    turn_ids: list[np.ndarray] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    versions: list[np.ndarray] = field(default_factory=list)
    turns: list[TurnRecord] = field(default_factory=list)
    length: int = 0
    started: float = field(default_factory=time.monotonic)

    def append(self, ids: np.ndarray, components: np.ndarray, logprobs: np.ndarray | None, version: int) -> None:
        """Tokens of the current turn; text that was not sampled has no logprobs and version -1."""
        n = len(ids)
        self.ids.append(ids)
        self.components.append(components)
        self.turn_ids.append(np.full(n, len(self.turns) - 1, np.int16))
        self.logprobs.append(np.full(n, np.nan, np.float32) if logprobs is None else logprobs)
        self.versions.append(np.full(n, version, np.int32))
        self.length += n

    def finish(self, stop_reason: StopReason) -> Trajectory:
        versions = _concatenate(self.versions, np.int32)
        return Trajectory(
            task_id=self.job.task.id,
            prompt_ids=self.prompt_ids,
            ids=_concatenate(self.ids, np.int64),
            components=_concatenate(self.components, np.uint8),
            turn_ids=_concatenate(self.turn_ids, np.int16),
            sampled=versions >= 0,
            logprobs=_concatenate(self.logprobs, np.float32),
            versions=versions,
            turns=self.turns,
            stop_reason=stop_reason,
        )


class AgentLoop:
    """Samples trajectories from the prompt only; expert traces are not shown to the policy.

        loop = AgentLoop(engine, renderer, make_env, config)
        trajectories = loop.run([Job(task, rng_key=(seed, step, index)), …])     # in the order of the jobs

    Args:
        engine: Generates the turns.
        renderer: Renders prompts and observations, parses turns.
        make_env: A fresh environment for a task; it serves one trajectory.
        config: Limits of turns, tokens and time.

    Raises:
        PactError: The engine does not apply the filters that `config` sets.
    """

    def __init__(
        self, engine: Engine, renderer: ChatRenderer, make_env: Callable[[Task], Environment], config: RolloutConfig
    ):
        self.engine, self.renderer, self.make_env, self.config = engine, renderer, make_env, config
        self._pool: ThreadPoolExecutor | None = None
        self._checked_user_turns = False
        if config.filters and not getattr(engine, "applies_filters", False):
            raise PactError(
                f"{getattr(engine, 'name', 'the engine')} does not apply rollout.top_p, top_k and min_p ({config.filters}); "
                "remove them, or use rollout.engine=transformers or vllm (an engine of your own: set applies_filters)"
            )

    def prompt_ids(self, task: Task) -> np.ndarray:
        """int64 [n], token ids of the prompt; PactError if it is longer than rollout.max_prompt_length."""
        ids = self.renderer.prompt_ids(task.prompt, task.tools)
        if len(ids) > self.config.max_prompt_length:
            raise PactError(
                f"task {task.id}: the prompt has {len(ids)} tokens, more than rollout.max_prompt_length="
                f"{self.config.max_prompt_length}; raise it or drop the task"
            )
        return ids

    def run(
        self, jobs: list[Job], on_finish: Callable[[int, Trajectory], None] | None = None, keep: int | None = None
    ) -> list[Trajectory]:
        """Sample all jobs.

        Args:
            jobs: What to sample.
            on_finish: Called as `on_finish(index of the job, trajectory)` as each trajectory ends.
            keep: Most trajectories of a group: the first that end are kept, the others cancelled. None: all.

        Returns:
            Finished trajectories in the order of their jobs, without the cancelled ones.
        """
        results: dict[int, Trajectory] = {}
        running = {index: self._start(index, job) for index, job in enumerate(jobs)}
        calls = PendingToolCalls(self.engine.synchronous)

        def end(index: int, stop: StopReason) -> None:
            results[index] = self._end(running, index, stop, on_finish)
            group = jobs[index].group
            if keep is not None and sum(jobs[done].group == group for done in results) >= keep:
                for other in [other for other in running if jobs[other].group == group]:
                    del running[other]
                    calls.drop(other)
                    self.engine.close(other)

        try:
            while running:
                generating = len(running) - len(calls)
                completions = self.engine.step(self._poll_timeout(calls)) if generating else []
                calls.tick(idle=not generating)
                for completion in completions:
                    if completion.session not in running:
                        continue  # cancelled by another completion of the same step
                    state = running[completion.session]
                    stop, pending = self._take_turn(state, completion)
                    if stop is None:
                        calls.add(completion.session, pending, state.env.blocking)
                    else:
                        end(completion.session, stop)
                for index, pending in calls.due():
                    if index not in running:
                        continue
                    stop = self._go_on(index, running[index], pending)
                    if stop is not None:
                        end(index, stop)
                for index in self._overdue(running):
                    if index not in running:
                        continue
                    if calls.drop(index):
                        record = running[index].turns[-1]
                        record.observations = [error_observation("the trajectory ran out of time")] * len(
                            record.attempts
                        )
                    end(index, StopReason.TIMEOUT)
        finally:
            for index in running:  # after an error: cancel what is still being sampled
                self.engine.close(index)
        return [results[index] for index in sorted(results)]

    def _poll_timeout(self, calls: PendingToolCalls) -> float | None:
        """Seconds to wait for the engine: short while tool results may arrive, else until one may be overdue."""
        if len(calls):
            return 0.005
        return None if self.config.trajectory_timeout is None else 0.1

    def _overdue(self, running: dict[int, _ActiveTrajectory]) -> list[int]:
        """Trajectories that have exceeded rollout.trajectory_timeout."""
        limit = self.config.trajectory_timeout
        if limit is None:
            return []
        now = time.monotonic()
        return [index for index, state in running.items() if now - state.started > limit]

    def close(self) -> None:
        """Stop the threads that run tools, without waiting for them, and end the calls under way."""
        close = getattr(self.make_env, "close", None)
        if close is not None:
            close()
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def resolve_task(self, task: Task) -> tuple[Task, Environment]:
        """The task as the policy sees it, and its environment.

        Text that `reset` returns is appended to the question, and the environment's tools are offered if the task names
        none. Resolving a resolved task changes nothing.
        """
        env = self.make_env(task)
        if has_user(env) and not self._checked_user_turns:
            check_user_turns(self.renderer)
            self._checked_user_turns = True
        with _no_exit(env):
            extra = env.reset(_for_environment(env, task))
        question = text_of(task.prompt[-1].get("content"))
        if extra and not question.endswith(extra):
            task = replace(task, prompt=[*task.prompt[:-1], {**task.prompt[-1], "content": f"{question}\n\n{extra}"}])
        return replace(task, tools=task.tools or env.tools), env

    def _start(self, index: int, job: Job) -> _ActiveTrajectory:
        task, env = self.resolve_task(job.task)
        job = replace(job, task=task)
        ids = self.prompt_ids(task)
        limit = min(self.config.max_turn_tokens, self.config.max_completion_length)
        self.engine.submit(Request(index, ids, limit, job.rng_key, job.temperature, job.filters))
        return _ActiveTrajectory(job, env, ids, task.tools, copy.deepcopy(env.tools) if has_user(env) else None)

    def _end(self, running, index: int, stop: StopReason, on_finish) -> Trajectory:
        self.engine.close(index)
        state = running.pop(index)
        trajectory = state.finish(stop)
        # ask the instance that served the calls: an environment may judge its own final state
        with _no_exit(state.env):
            given = _for_environment(state.env, (state.job.task, trajectory))
            trajectory.env_rewards = dict(state.env.reward(*given))
        if on_finish:
            on_finish(index, trajectory)
        return trajectory

    def _take_turn(self, state: _ActiveTrajectory, completion: Completion) -> tuple[StopReason | None, list[Pending]]:
        """Record a sampled turn and start what follows it, tool calls or the user's reply.

        Returns the stop reason, if any, and the pending results.
        """
        parsed = self.renderer.parse(completion.ids, state.tools)
        record = TurnRecord(parsed.text, parsed.reasoning, parsed.content, list(parsed.attempts))
        state.turns.append(record)
        state.append(completion.ids, parsed.components, completion.logprobs, completion.version)
        if not completion.ended:
            record.attempts = []  # calls of a truncated turn are not run, and must not be rewarded
            cut = state.length >= self.config.max_completion_length
            return StopReason.MAX_COMPLETION_LENGTH if cut else StopReason.MAX_TURN_TOKENS, []
        if parsed.attempts:
            return None, [self._call(state, attempt) for attempt in parsed.attempts]
        if has_user(state.env):
            return None, [self._run(state.env, state.env.respond, record.content)]
        return StopReason.ANSWER, []

    def _call(self, state: _ActiveTrajectory, attempt: ToolCall | str) -> Pending:
        if isinstance(attempt, str):
            return error_observation(attempt)
        arguments = _for_environment(state.env, attempt.arguments)
        return self._run(state.env, state.env.call, attempt.name, arguments)

    def _run(self, env: Environment, method: Callable[..., str | None], *arguments: Any) -> Pending:
        """Call a method of an environment, in a thread if it is blocking."""
        if not env.blocking:
            with _no_exit(env):
                return method(*arguments)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=16, thread_name_prefix="tool")
        return self._pool.submit(method, *arguments)

    def _go_on(self, index: int, state: _ActiveTrajectory, pending: list[Pending]) -> StopReason | None:
        """Append what a turn waited for and submit the next turn; returns a stop reason if the trajectory ends."""
        with _no_exit(state.env):
            results = [result.result() if isinstance(result, Future) else result for result in pending]
        # a turn with an attempt at a call, malformed or not, never waits for the user: an error is no reply
        return self._observe(index, state, results) if state.turns[-1].attempts else self._hear(index, state, *results)

    def _observe(self, index: int, state: _ActiveTrajectory, results: list[Any]) -> StopReason | None:
        """Go on with the observations of the last turn's calls."""
        record = state.turns[-1]
        if len(state.turns) >= self.config.max_turns:
            record.observations = results
            return StopReason.MAX_TURNS
        record.observations = [self._truncate(text) for text in results]
        messages = [_tool_message(a, t) for a, t in zip(record.attempts, record.observations, strict=True)]
        return self._append(index, state, messages, self.renderer.call_eot_id)

    def _hear(self, index: int, state: _ActiveTrajectory, reply: str | None) -> StopReason | None:
        """Go on with what the user said after the last turn."""
        if reply is None:
            return StopReason.ENVIRONMENT
        if not isinstance(reply, str):
            raise PactError(
                f"respond of the environment {type(state.env).__name__} returned {type(reply).__name__}; return the "
                "user's next message as text, or None to end the episode"
            )
        state.turns[-1].user = reply
        limit = self.config.max_user_turns
        if limit is not None and sum(turn.user is not None for turn in state.turns) > limit:
            return StopReason.MAX_USER_TURNS
        if len(state.turns) >= self.config.max_turns:
            return StopReason.MAX_TURNS
        self._update_tools(state)
        return self._append(index, state, [{"role": "user", "content": reply}], self.renderer.eot_id)

    def _update_tools(self, state: _ActiveTrajectory) -> None:
        """The tools on offer, if the environment has changed them: until then, a task's own tools hold."""
        with _no_exit(state.env):
            tools = state.env.tools
        if tools != state.offered:
            state.tools = state.offered = copy.deepcopy(tools)

    def _append(
        self, index: int, state: _ActiveTrajectory, messages: list[Message], end_of_turn: int
    ) -> StopReason | None:
        """Append messages and submit the next turn; returns a stop reason if there is no room for it."""
        ids, components = self.renderer.bridge_tokens(messages)
        if int(state.ids[-1][-1]) not in self.renderer.eot_ids:
            # rollout.stop_at_tool_call: the engine stopped after the call, so the end-of-turn token is missing
            ids, components = np.append(end_of_turn, ids), np.append(np.uint8(Component.TEMPLATE), components)
        remaining = self.config.max_completion_length - state.length - len(ids)
        if remaining < 1:
            return StopReason.MAX_COMPLETION_LENGTH
        state.append(ids, components, None, -1)
        limit, job = min(self.config.max_turn_tokens, remaining), state.job
        self.engine.submit(Request(index, ids, limit, temperature=job.temperature, filters=job.filters))
        return None

    def _truncate(self, text: str) -> str:
        """Truncate an observation to rollout.max_observation_tokens, with a note."""
        limit = self.config.max_observation_tokens
        if len(text.encode("utf-8", "replace")) <= limit:  # a token covers at least one byte
            return text
        return self.renderer.truncate(text, limit)


def _no_exit(env: Environment) -> AbstractContextManager[None]:
    return no_exit(f"the environment {type(env).__name__}")


def _tool_message(attempt: ToolCall | str, text: str) -> Message:
    return {"role": "tool", "name": attempt.name if isinstance(attempt, ToolCall) else "error", "content": text}


def _concatenate(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
