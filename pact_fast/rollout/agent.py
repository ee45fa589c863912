"""The agent loop: samples many multi-turn trajectories at once.

Each advances on its own: render the prompt, ask the engine for a turn, parse it, run its tool calls, append the
observations, and so on until an answer or a limit. There is no barrier between turns, so a slow tool holds up its own
trajectory only.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pact_fast.chat.formats.json_calls import error_observation
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import RolloutConfig
from pact_fast.config.filters import UNFILTERED, SamplingFilters
from pact_fast.data.types import Message, StopReason, Task, ToolCall, Trajectory, TurnRecord, text_of
from pact_fast.envs.base import Environment
from pact_fast.envs.registry import is_built_in
from pact_fast.errors import PactError
from pact_fast.plugins import no_exit
from pact_fast.rollout.engine import Completion, Engine, Request

# Synchronous engines: a tool's result is picked up exactly this many engine steps after the call, and waited for if it
# is late. Batches then never depend on how fast a tool happened to be, so a run repeats bit for bit.
TOOL_STEPS = 4


def _for_environment(env: Environment, value: Any) -> Any:
    """A copy for an environment of the user's, which may change what it gets. Built-in ones change nothing, and a copy
    of a task takes longer than its reset."""
    return value if is_built_in(type(env)) else copy.deepcopy(value)


class PendingToolCalls:
    """Tool calls under way, by trajectory.

    With a synchronous engine, results are due a fixed number of steps after their call, and are waited for; otherwise
    they are picked up as soon as they arrive.
    """

    def __init__(self, synchronous: bool):
        self._synchronous, self._clock = synchronous, 0
        self._calls: list[tuple[int, int, list[Future | str]]] = []  # (due at step, trajectory, observations)

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, index: int, observations: list[Future | str], blocking: bool) -> None:
        """The calls of one turn of trajectory `index`; `blocking`: they run in threads and may take long."""
        self._calls.append((self._clock + (TOOL_STEPS if blocking else 0), index, observations))

    def drop(self, index: int) -> bool:
        """Stop waiting for the calls of trajectory `index`, which end by their own timeout; True if there were any."""
        before = len(self._calls)
        self._calls = [call for call in self._calls if call[1] != index]
        return len(self._calls) < before

    def tick(self, *, idle: bool) -> None:
        """Advance the clock after an engine step. `idle`: the engine has nothing to do, so wait for a tool instead."""
        if not idle or not self._calls:
            self._clock += 1
        elif self._synchronous:
            self._clock = max(self._clock, self._calls[0][0])
        else:
            wait([o for call in self._calls for o in call[2] if not isinstance(o, str)], 0.1, FIRST_COMPLETED)

    def due(self) -> list[tuple[int, list[Future | str]]]:
        """Remove and return (trajectory, observations) of the calls to be picked up now."""
        ready = [self._ready(call) for call in self._calls]
        due = [call[1:] for call, now in zip(self._calls, ready, strict=True) if now]
        self._calls = [call for call, now in zip(self._calls, ready, strict=True) if not now]
        return due

    def _ready(self, call: tuple[int, int, list[Future | str]]) -> bool:
        if self._synchronous:
            return call[0] <= self._clock
        return all(isinstance(o, str) or o.done() for o in call[2])


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
    """A trajectory that is being sampled; `length` in tokens after the prompt, `started` in seconds."""

    job: Job
    env: Environment
    prompt_ids: np.ndarray
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
                    stop, observations = self._take_turn(state, completion)
                    if stop is None:
                        calls.add(completion.session, observations, state.env.blocking)
                    else:
                        end(completion.session, stop)
                for index, observations in calls.due():
                    if index not in running:
                        continue
                    stop = self._observe(index, running[index], observations)
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
        return _ActiveTrajectory(job, env, ids)

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

    def _take_turn(
        self, state: _ActiveTrajectory, completion: Completion
    ) -> tuple[StopReason | None, list[Future | str]]:
        """Record a sampled turn and start its tool calls; returns the stop reason, if any, and the pending results."""
        parsed = self.renderer.parse(completion.ids, state.job.task.tools)
        record = TurnRecord(parsed.text, parsed.reasoning, parsed.content, list(parsed.attempts))
        state.turns.append(record)
        state.append(completion.ids, parsed.components, completion.logprobs, completion.version)
        if not completion.ended:
            record.attempts = []  # calls of a truncated turn are not run, and must not be rewarded
            cut = state.length >= self.config.max_completion_length
            return StopReason.MAX_COMPLETION_LENGTH if cut else StopReason.MAX_TURN_TOKENS, []
        if not parsed.attempts:
            return StopReason.ANSWER, []
        return None, [self._call(state, attempt) for attempt in parsed.attempts]

    def _call(self, state: _ActiveTrajectory, attempt: ToolCall | str) -> Future | str:
        if isinstance(attempt, str):
            return error_observation(attempt)
        arguments = _for_environment(state.env, attempt.arguments)
        if not state.env.blocking:
            with _no_exit(state.env):
                return state.env.call(attempt.name, arguments)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=16, thread_name_prefix="tool")
        return self._pool.submit(state.env.call, attempt.name, arguments)

    def _observe(self, index: int, state: _ActiveTrajectory, pending: list[Future | str]) -> StopReason | None:
        """Append the observations and submit the next turn; returns a stop reason if a limit is reached first."""
        record = state.turns[-1]
        with _no_exit(state.env):
            results = [_result(o) for o in pending]
        if len(state.turns) >= self.config.max_turns:
            record.observations = results
            return StopReason.MAX_TURNS
        texts = [self._truncate(text) for text in results]
        record.observations = texts
        ids, components = self.renderer.bridge_tokens(
            [_tool_message(a, t) for a, t in zip(record.attempts, texts, strict=True)]
        )
        if int(state.ids[-1][-1]) not in self.renderer.eot_ids:
            # rollout.stop_at_tool_call: the engine stopped after the call, so the end-of-turn token is missing
            ids, components = np.append(self.renderer.call_eot_id, ids), np.append(components[:1], components)
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


def _result(observation: Future | str) -> str:
    return observation if isinstance(observation, str) else observation.result()


def _concatenate(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
