"""The agent loop: many trajectories at once, each advancing on its own, turn by turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace

import numpy as np

from pact_fast.chat.formats.base import ParsedTurn
from pact_fast.chat.formats.json_calls import error_observation
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import RolloutConfig
from pact_fast.data.types import Message, StopReason, Task, ToolCall, Trajectory, TurnRecord, text_of
from pact_fast.envs.base import Environment
from pact_fast.errors import PactError
from pact_fast.rollout.engine import Completion, Engine, Request

# A tool's answer is picked up exactly this many engine steps after the call, waited for if need be. Batches then never depend
# on how fast a tool happened to be, and a run repeats bit for bit.
TOOL_STEPS = 4


class ToolCalls:
    """Pending tool calls, by trajectory.

    With a synchronous engine an answer is due a fixed number of steps after its call, and waited for; otherwise it is
    picked up as soon as it arrives.
    """

    def __init__(self, synchronous: bool):
        self._clocked, self._clock = synchronous, 0
        self._calls: list[tuple[int, int, list[Future | str]]] = []  # (due at step, trajectory, observations)

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, index: int, observations: list[Future | str], blocking: bool) -> None:
        self._calls.append((self._clock + (TOOL_STEPS if blocking else 0), index, observations))

    def drop(self, index: int) -> bool:
        """Do not wait for them any more (a tool that runs ends by its own time limit). Whether there were any."""
        before = len(self._calls)
        self._calls = [call for call in self._calls if call[1] != index]
        return len(self._calls) < before

    def tick(self, *, idle: bool) -> None:
        """The engine has made a step, or (idle) has nothing to do, so that time passes by waiting."""
        if not idle or not self._calls:
            self._clock += 1
        elif self._clocked:
            self._clock = max(self._clock, self._calls[0][0])
        else:
            wait([o for call in self._calls for o in call[2] if not isinstance(o, str)], 0.1, FIRST_COMPLETED)

    def due(self) -> list[tuple[int, list[Future | str]]]:
        """What is to be picked up now; no longer under way."""
        ready = [self._ready(call) for call in self._calls]
        due = [call[1:] for call, now in zip(self._calls, ready, strict=True) if now]
        self._calls = [call for call, now in zip(self._calls, ready, strict=True) if not now]
        return due

    def _ready(self, call: tuple[int, int, list[Future | str]]) -> bool:
        if self._clocked:
            return call[0] <= self._clock
        return all(isinstance(o, str) or o.done() for o in call[2])


@dataclass(frozen=True)
class Job:
    """One trajectory to sample. `rng_key` fixes its randomness; `group`: of those that are compared with each other."""

    task: Task
    rng_key: tuple[int, ...]
    temperature: float = 1.0
    group: int = 0


@dataclass
class _Running:
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
        n = len(ids)
        self.ids.append(ids)
        self.components.append(components)
        self.turn_ids.append(np.full(n, len(self.turns) - 1, np.int16))
        self.logprobs.append(np.full(n, np.nan, np.float32) if logprobs is None else logprobs)
        self.versions.append(np.full(n, version, np.int32))
        self.length += n

    def finish(self, stop_reason: StopReason) -> Trajectory:
        versions = _joined(self.versions, np.int32)
        return Trajectory(
            task_id=self.job.task.id,
            prompt_ids=self.prompt_ids,
            ids=_joined(self.ids, np.int64),
            components=_joined(self.components, np.uint8),
            turn_ids=_joined(self.turn_ids, np.int16),
            sampled=versions >= 0,
            logprobs=_joined(self.logprobs, np.float32),
            versions=versions,
            turns=self.turns,
            stop_reason=stop_reason,
        )


class AgentLoop:
    """Samples trajectories from the prompt only.

    loop = AgentLoop(engine, renderer, make_env, config)
    trajectories = loop.run([Job(task, rng_key=(seed, step, index)), …])     # in the order of the jobs
    """

    def __init__(
        self, engine: Engine, renderer: ChatRenderer, make_env: Callable[[Task], Environment], config: RolloutConfig
    ):
        self.engine, self.renderer, self.make_env, self.config = engine, renderer, make_env, config
        self._pool: ThreadPoolExecutor | None = None

    def prompt_ids(self, task: Task) -> np.ndarray:
        """Ids of x; PactError if the prompt is longer than allowed."""
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
        """Sample all jobs; `on_finish(index, trajectory)` is called as each one ends. `keep`: of every group, those that end
        first, so many; the others are cancelled and left out.
        """
        results: dict[int, Trajectory] = {}
        running = {index: self._start(index, job) for index, job in enumerate(jobs)}
        calls = ToolCalls(self.engine.synchronous)

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
                completions = self.engine.step(self._patience(calls)) if generating else []
                calls.tick(idle=not generating)
                for completion in completions:
                    if completion.session not in running:
                        continue  # cancelled by one of the same step
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
                        record.observations = [error_observation("the trajectory's time is over")] * len(
                            record.attempts
                        )
                    end(index, StopReason.TIMEOUT)
        finally:
            for index in running:  # after an error: nothing goes on sampling behind the caller's back
                self.engine.close(index)
        return [results[index] for index in sorted(results)]

    def _patience(self, calls: ToolCalls) -> float | None:
        """Seconds to wait for the engine: shortly while tools may answer, else as long as the engine may take."""
        if len(calls):
            return 0.005
        return None if self.config.trajectory_timeout is None else 0.1

    def _overdue(self, running: dict[int, _Running]) -> list[int]:
        limit = self.config.trajectory_timeout
        if limit is None:
            return []
        now = time.monotonic()
        return [index for index, state in running.items() if now - state.started > limit]

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def resolve_task(self, task: Task) -> tuple[Task, Environment]:
        """The task as the policy sees it, and its environment: what `reset` tells is added to the question, and the
        environment's tools are offered where the task names none. Preparing a prepared task changes nothing.
        """
        env = self.make_env(task)
        extra = env.reset(task)
        question = text_of(task.prompt[-1].get("content"))
        if extra and not question.endswith(extra):
            task = replace(task, prompt=[*task.prompt[:-1], {**task.prompt[-1], "content": f"{question}\n\n{extra}"}])
        return replace(task, tools=task.tools or env.tools), env

    def _start(self, index: int, job: Job) -> _Running:
        task, env = self.resolve_task(job.task)
        job = replace(job, task=task)
        ids = self.prompt_ids(task)
        limit = min(self.config.max_turn_tokens, self.config.max_completion_length)
        self.engine.submit(Request(index, ids, limit, job.rng_key, job.temperature))
        return _Running(job, env, ids)

    def _end(self, running, index: int, stop: StopReason, on_finish) -> Trajectory:
        self.engine.close(index)
        state = running.pop(index)
        trajectory = state.finish(stop)
        # on the instance that served the calls: an environment may judge its own final state
        trajectory.env_rewards = dict(state.env.reward(state.job.task, trajectory))
        if on_finish:
            on_finish(index, trajectory)
        return trajectory

    def _take_turn(self, state: _Running, completion: Completion) -> tuple[StopReason | None, list[Future | str]]:
        """Record a sampled turn and start its tool calls. Returns the stop reason, if any, and the pending observations."""
        parsed = self.renderer.parse(completion.ids, state.job.task.tools)
        record = _record(parsed)
        state.turns.append(record)
        state.append(completion.ids, parsed.components, completion.logprobs, completion.version)
        if not completion.ended:
            record.attempts = []  # what was cut off is never run, and must not be rewarded
            cut = state.length >= self.config.max_completion_length
            return StopReason.MAX_COMPLETION_LENGTH if cut else StopReason.MAX_TURN_TOKENS, []
        if not parsed.attempts:
            return StopReason.ANSWER, []
        return None, [self._call(state, attempt) for attempt in parsed.attempts]

    def _call(self, state: _Running, attempt: ToolCall | str) -> Future | str:
        if isinstance(attempt, str):
            return error_observation(attempt)
        if not state.env.blocking:
            return state.env.call(attempt.name, attempt.arguments)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=16, thread_name_prefix="tool")
        return self._pool.submit(state.env.call, attempt.name, attempt.arguments)

    def _observe(self, index: int, state: _Running, pending: list[Future | str]) -> StopReason | None:
        """Append the observations and ask for the next turn; or the stop reason if there is none, or they do not fit."""
        record = state.turns[-1]
        if len(state.turns) >= self.config.max_turns:
            record.observations = [_text(o) for o in pending]
            return StopReason.MAX_TURNS
        texts = [self._fit(_text(o)) for o in pending]
        record.observations = texts
        ids, components = self.renderer.bridge_tokens(
            [_tool_message(a, t) for a, t in zip(record.attempts, texts, strict=True)]
        )
        if (
            int(state.ids[-1][-1]) not in self.renderer.eot_ids
        ):  # the engine stopped at the call; the turn still has to end
            ids, components = np.append(self.renderer.eot_id, ids), np.append(components[:1], components)
        room = self.config.max_completion_length - state.length - len(ids)
        if room < 1:
            return StopReason.MAX_COMPLETION_LENGTH
        state.append(ids, components, None, -1)
        self.engine.submit(
            Request(index, ids, min(self.config.max_turn_tokens, room), temperature=state.job.temperature)
        )
        return None

    def _fit(self, text: str) -> str:
        """Cut an observation to the token limit, with a note. A token covers at least one byte, so short texts pass."""
        limit = self.config.max_observation_tokens
        if len(text.encode("utf-8", "replace")) <= limit:
            return text
        return self.renderer.truncate(text, limit)


def _record(parsed: ParsedTurn) -> TurnRecord:
    return TurnRecord(parsed.text, parsed.reasoning, parsed.content, list(parsed.attempts))


def _tool_message(attempt: ToolCall | str, text: str) -> Message:
    return {"role": "tool", "name": attempt.name if isinstance(attempt, ToolCall) else "error", "content": text}


def _text(observation: Future | str) -> str:
    return observation if isinstance(observation, str) else observation.result()


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
