"""The agent loop: samples many multi-turn trajectories at once.

Each advances on its own: render the prompt, ask the engine for a turn, parse it, run its tool calls, append the
observations, and so on until an answer or a limit. Where there is a user (the environment's `respond`, or a second
policy), an answer is followed by what the user says, who decides when the episode is over. There is no barrier between
turns, so a slow tool holds up its own trajectory only.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from pact_fast.chat.formats.json_calls import error_observation
from pact_fast.chat.history import CURES
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.chat.template_check import check_user_turns
from pact_fast.components import Component
from pact_fast.config import RolloutConfig
from pact_fast.data.types import Message, StopReason, Task, ToolCall, ToolSchema, Trajectory, TurnRecord, text_of
from pact_fast.envs.base import Environment, has_user, is_finished
from pact_fast.envs.registry import is_built_in
from pact_fast.errors import PactError
from pact_fast.plugins import no_exit
from pact_fast.rollout.engine import Completion, Engine, Request
from pact_fast.rollout.episode import Episode, Job, Side
from pact_fast.rollout.pending import Pending, PendingToolCalls
from pact_fast.rollout.schedule import Schedule
from pact_fast.rollout.self_play import user_call, user_prompt_ids, user_stops, user_view
from pact_fast.users.endpoint import EndpointUsers
from pact_fast.users.stop import read_stop

MOST_CALLS = 256  # of tools and users at a time; a thread starts when a call finds none that is idle


def _for_environment(env: Environment, value: Any) -> Any:
    """A copy for an environment of the user's, which may change what it gets. Built-in ones change nothing, and a copy
    of a task takes longer than its reset."""
    return value if is_built_in(type(env)) else copy.deepcopy(value)


class AgentLoop:
    """Samples trajectories from the prompt only; expert traces are not shown to the policy.

        loop = AgentLoop(engine, renderer, make_env, config)
        trajectories = loop.run([Job(task, rng_key=(seed, step, index)), …])     # in the order of the jobs

    Args:
        engine: Generates the turns.
        renderer: Renders prompts and observations, parses turns.
        make_env: A fresh environment for a task; it serves one trajectory.
        config: Limits of turns, tokens and time; who plays the user.
        users: Makes the users of `rollout.user=endpoint`; whoever gives them closes them.

    Raises:
        PactError: The engine does not apply the filters that `config` sets, or there are no users where it wants them.
    """

    def __init__(
        self,
        engine: Engine,
        renderer: ChatRenderer,
        make_env: Callable[[Task], Environment],
        config: RolloutConfig,
        users: EndpointUsers | None = None,
    ):
        self.engine, self.renderer, self.make_env, self.config = engine, renderer, make_env, config
        self._users = users
        if config.user == "endpoint" and users is None:
            raise PactError("rollout.user=endpoint: give AgentLoop its users (EndpointUsers.of)")
        self._pool: ThreadPoolExecutor | None = None
        self._prompts: dict[bytes, np.ndarray] | None = None  # of the call of `run` under way
        self._checked_user_turns = not isinstance(renderer, ChatRenderer)  # what stands in its place has no template
        if config.filters and not getattr(engine, "applies_filters", False):
            raise PactError(
                f"{getattr(engine, 'name', 'the engine')} does not apply rollout.top_p, top_k and min_p ({config.filters}); "
                "remove them, or use rollout.engine=transformers or vllm (an engine of your own: set applies_filters)"
            )

    def prompt_ids(self, task: Task) -> np.ndarray:
        """int64 [n], token ids of the prompt; PactError if it is longer than rollout.max_prompt_length."""
        return self._check_length(task, self._render(task.prompt, task.tools))

    def _render(self, messages: list[Message], tools: list[ToolSchema]) -> np.ndarray:
        """Token ids [n] int64 of a prompt. During `run`, the rollouts of a prompt share them: to render and tokenize a
        prompt takes longer than anything else at the start of a rollout."""
        prompts = self._prompts
        if prompts is None:
            return self.renderer.prompt_ids(messages, tools)
        # repr, not ==: 1 and True are equal, and rendered differently
        key = hashlib.sha256(repr((messages, tools)).encode("utf-8", "surrogatepass")).digest()
        if key not in prompts:
            prompts[key] = self.renderer.prompt_ids(messages, tools)
        return prompts[key]

    def _check_length(self, task: Task, ids: np.ndarray) -> np.ndarray:
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
        calls = PendingToolCalls(self.engine.synchronous)
        # a side keeps its place in the engine while the other speaks: all sides of what runs must have one
        most = self.config.max_batch_size // 2 if self.config.user == "policy" else len(jobs)
        schedule = Schedule(jobs, most, keep, self.config.trajectory_timeout)
        running = schedule.running

        def start() -> None:
            while (index := schedule.startable()) is not None:
                schedule.start(index, self._start(index, jobs))

        def end(index: int, stop: StopReason) -> None:
            results[index] = self._end(running, index, stop, on_finish)
            for other in schedule.end(index):
                calls.drop(other)
                self._close(running.pop(other))
            start()

        self._prompts = {}
        try:
            start()
            while running:
                generating = len(running) - len(calls)
                completions = self.engine.step(self._poll_timeout(calls)) if generating else []
                calls.tick(idle=not generating)
                for completion in completions:
                    index = completion.session % len(jobs)
                    if index not in running:
                        continue  # cancelled by another completion of the same step
                    episode = running[index]
                    stop, pending = self._take_turn(episode, completion)
                    if stop is not None:
                        end(index, stop)
                    elif pending:
                        in_thread = any(isinstance(result, Future) for result in pending)
                        calls.add(index, pending, episode.env.blocking or in_thread)
                for index, pending in calls.due():
                    if index not in running:
                        continue
                    stop = self._go_on(running[index], pending)
                    if stop is not None:
                        end(index, stop)
                for index in schedule.overdue():
                    if index not in running:
                        continue
                    if calls.drop(index):
                        record = running[index].speaker.turns[-1]
                        record.observations = [error_observation("the trajectory ran out of time")] * len(
                            record.attempts
                        )
                    end(index, StopReason.TIMEOUT)
        finally:
            self._prompts = None
            for episode in running.values():  # after an error: cancel what is still being sampled
                self._close(episode)
        return [results[index] for index in sorted(results)]

    def _poll_timeout(self, calls: PendingToolCalls) -> float | None:
        """Seconds to wait for the engine: short while tool results may arrive, else until one may be overdue."""
        if len(calls):
            return 0.005
        return None if self.config.trajectory_timeout is None else 0.1

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
        if (has_user(env) or self.config.user != "environment") and not self._checked_user_turns:
            self._check_user_turns()
        with _no_exit(env):
            extra = env.reset(_for_environment(env, task))
        question = text_of(task.prompt[-1].get("content"))
        if extra and not question.endswith(extra):
            task = replace(task, prompt=[*task.prompt[:-1], {**task.prompt[-1], "content": f"{question}\n\n{extra}"}])
        return replace(task, tools=task.tools or env.tools), env

    def _check_user_turns(self) -> None:
        check_user_turns(self.renderer)
        if self._drops_reasoning() and not getattr(self.engine, "rewinds", False):
            raise PactError(
                "the chat template drops the reasoning of earlier turns once the user speaks again, and "
                f"{getattr(self.engine, 'name', 'the engine')} cannot go back in a context; use rollout.engine=transformers "
                f"or vllm (an engine of your own: honour Request.keep and set rewinds), or {CURES}"
            )
        self._checked_user_turns = True

    def _drops_reasoning(self) -> bool:
        """Whether the template drops the reasoning of earlier turns once the user speaks again."""
        return isinstance(self.renderer, ChatRenderer) and self.renderer.history.drops_reasoning

    def trained_view(self, task: Task) -> tuple[Task, np.ndarray]:
        """(task, prompt [n] int64) of a resolved task, as the side that is trained sees it (rollout.train_as)."""
        if self.config.train_as == "agent":
            return task, self.prompt_ids(task)
        view = self._user_view(*self.resolve_task(task))
        return view, self._user_prompt_ids(view)

    def _user_view(self, task: Task, env: Environment) -> Task:
        with _no_exit(env):
            return user_view(task, env)

    def _user_prompt_ids(self, view: Task) -> np.ndarray:
        return self._check_length(view, user_prompt_ids(self.renderer, view, self._render))

    def _start(self, index: int, jobs: list[Job]) -> Episode:
        task, env = self.resolve_task(jobs[index].task)
        job = replace(jobs[index], task=task)
        agent = Side(index, self.prompt_ids(task), task.tools)
        episode = Episode(job, env, agent, offered=copy.deepcopy(env.tools) if has_user(env) else None)
        if self.config.user != "environment":
            view = self._user_view(task, env)
            if self._users is not None:
                call = user_call(env) if view.tools else None
                episode.endpoint = self._users.make(view, view.tools, call, user_stops(env))
            else:
                ids = self._user_prompt_ids(view)
                episode.user = Side(index + len(jobs), ids, view.tools, unsent=ids)
        limit = min(self.config.max_turn_tokens, self.config.max_completion_length)
        self._submit(episode, agent.prompt_ids, limit, job.rng_key)
        return episode

    def _submit(
        self, episode: Episode, ids: np.ndarray, limit: int, rng_key: tuple[int, ...] = (), keep: int | None = None
    ) -> None:
        """Ask the engine for a turn of the speaker."""
        job, is_user = episode.job, episode.speaker is episode.user
        # a side with a frozen model of its own is a part of the environment: it says the likeliest words
        frozen = self.config.user == "model" if is_user else self.config.agent_model is not None
        temperature = 0.0 if frozen else job.temperature
        session = episode.speaker.session
        self.engine.submit(Request(session, ids, limit, rng_key, temperature, job.filters, is_user, keep))

    def _close(self, episode: Episode) -> None:
        for side in episode.sides:
            self.engine.close(side.session)

    def _end(self, running, index: int, stop: StopReason, on_finish) -> Trajectory:
        episode = running.pop(index)
        self._close(episode)
        task = episode.job.task
        trajectory = episode.agent.finish(task.id, stop)
        # ask the instance that served the calls: an environment may judge its own final state
        with _no_exit(episode.env):
            given = _for_environment(episode.env, (task, trajectory))
            rewards = dict(episode.env.reward(*given))
        if episode.user is not None:
            of_user = episode.user.finish(task.id, stop)
            rewards |= self._judge_user(episode, of_user)
            trajectory = of_user if self.config.train_as == "user" else trajectory
        trajectory.env_rewards = rewards
        if on_finish:
            on_finish(index, trajectory)
        return trajectory

    def _judge_user(self, episode: Episode, trajectory: Trajectory) -> dict[str, float]:
        """What the environment finds wrong with the side of the user, if it looks at it."""
        judge = getattr(episode.env, "judge_user", None)
        if not callable(judge):
            return {}
        with _no_exit(episode.env):
            return dict(judge(*_for_environment(episode.env, (episode.job.task, trajectory))))

    def _take_turn(self, episode: Episode, completion: Completion) -> tuple[StopReason | None, list[Pending]]:
        """Record a sampled turn and start what follows it: tool calls, the user's reply, or the other side's turn.

        Returns the stop reason, if any, and what has to be waited for, if anything.
        """
        side = episode.speaker
        parsed = self.renderer.parse(completion.ids, side.tools)
        record = TurnRecord(parsed.text, parsed.reasoning, parsed.content, list(parsed.attempts))
        side.turns.append(record)
        side.append(completion.ids, parsed.components, completion.logprobs, completion.version)
        if not completion.ended:
            record.attempts = []  # calls of a truncated turn are not run, and must not be rewarded
            cut = side.length >= self.config.max_completion_length
            return _out_of_tokens(episode, StopReason.MAX_COMPLETION_LENGTH if cut else StopReason.MAX_TURN_TOKENS), []
        if parsed.attempts:
            return None, self._calls(episode, parsed.attempts)
        if episode.user is not None:
            return self._hand_over(episode, record.content), []
        if episode.endpoint is not None:
            return None, [self._in_thread(episode.endpoint.reply, record.content)]
        if has_user(episode.env):
            return None, [self._run(episode.env, episode.env.respond, record.content)]
        return StopReason.ANSWER, []

    def _calls(self, episode: Episode, attempts: Sequence[ToolCall | str]) -> list[Pending]:
        """Start the calls of a turn. In threads, those of an `ordered` environment wait for the one before."""
        env = episode.env
        call = user_call(env) if episode.speaker is episode.user else env.call
        started: list[Pending] = []
        before: Future | None = None
        for attempt in attempts:
            if isinstance(attempt, str):
                started.append(error_observation(attempt))
                continue
            arguments = _for_environment(env, attempt.arguments)
            # a call that is waited for was submitted earlier, so that it has a thread already
            method = functools.partial(_after, before, call) if before else call
            started.append(self._run(env, method, attempt.name, arguments))
            if getattr(env, "ordered", False) and isinstance(started[-1], Future):
                before = started[-1]
        return started

    def _run(self, env: Environment, method: Callable[..., str | None], *arguments: Any) -> Pending:
        """Call a method of an environment, in a thread if it is blocking."""
        if not env.blocking:
            with _no_exit(env):
                return method(*arguments)
        return self._in_thread(method, *arguments)

    def _in_thread(self, method: Callable[..., str | None], *arguments: Any) -> Future:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(MOST_CALLS, thread_name_prefix="tool")
        return self._pool.submit(method, *arguments)

    def _go_on(self, episode: Episode, pending: list[Pending]) -> StopReason | None:
        """Append what a turn waited for and submit the next turn; returns a stop reason if the trajectory ends."""
        with _no_exit(episode.env):
            results = [result.result() if isinstance(result, Future) else result for result in pending]
        # a turn with an attempt at a call, malformed or not, never waits for the user: an error is no reply
        if episode.speaker.turns[-1].attempts:
            return self._observe(episode, results)
        return self._hear(episode, *results)

    def _observe(self, episode: Episode, results: list[Any]) -> StopReason | None:
        """Go on with the observations of the last turn's calls."""
        side = episode.speaker
        record = side.turns[-1]
        with _no_exit(episode.env):
            finished = side is episode.agent and is_finished(episode.env)
        if finished:
            record.observations = results
            return StopReason.ENVIRONMENT
        if len(side.turns) >= self.config.max_turns:
            record.observations = results
            return StopReason.MAX_TURNS if side is episode.agent else StopReason.MAX_USER_TURNS
        record.observations = [self._truncate(text) for text in results]
        messages = [_tool_message(a, t) for a, t in zip(record.attempts, record.observations, strict=True)]
        return self._append(episode, messages, self.renderer.call_eot_id)

    def _hear(self, episode: Episode, reply: str | None) -> StopReason | None:
        """Go on with what the user of the environment, or behind an endpoint, said after the last turn."""
        if reply is None and episode.endpoint is not None:
            return StopReason.USER_FAILED if episode.endpoint.failed else StopReason.USER
        if reply is None:
            return StopReason.ENVIRONMENT
        if not isinstance(reply, str):
            raise PactError(
                f"respond of the environment {type(episode.env).__name__} returned {type(reply).__name__}; return the "
                "user's next message as text, or None to end the episode"
            )
        return self._tell(episode, reply)

    def _hand_over(self, episode: Episode, text: str) -> StopReason | None:
        """Let the other side answer the visible text of a turn."""
        if episode.speaker is episode.user:
            text, ended = read_stop(text, self.config.user_stop, *user_stops(episode.env))
            if ended:
                return StopReason.USER
            episode.speaker = episode.agent
        elif episode.user is not None:
            episode.speaker = episode.user
        return self._tell(episode, text)

    def _tell(self, episode: Episode, text: str) -> StopReason | None:
        """Go on with what was said to the speaker."""
        side = episode.speaker
        side.hear(text)
        if side is episode.user:
            if len(side.turns) >= self.config.max_turns:
                return StopReason.MAX_USER_TURNS
        else:
            limit = self.config.max_user_turns
            if limit is not None and sum(turn.user is not None for turn in side.turns) > limit:
                return StopReason.MAX_USER_TURNS
            if len(side.turns) >= self.config.max_turns:
                return StopReason.MAX_TURNS
            self._update_tools(episode)
        return self._append(episode, [{"role": "user", "content": text}], self.renderer.eot_id)

    def _update_tools(self, episode: Episode) -> None:
        """The tools on offer, if the environment has changed them: until then, a task's own tools hold."""
        if episode.offered is None:
            return
        with _no_exit(episode.env):
            tools = episode.env.tools
        if tools != episode.offered:
            episode.agent.tools = episode.offered = copy.deepcopy(tools)

    def _append(self, episode: Episode, messages: list[Message], end_of_turn: int) -> StopReason | None:
        """Append messages to the speaker's side and submit its turn; returns a stop reason if there is no room for it."""
        side, job = episode.speaker, episode.job
        ids, components = self.renderer.bridge_tokens(messages)
        if side.ids and int(side.ids[-1][-1]) not in self.renderer.eot_ids:
            # rollout.stop_at_tool_call: the engine stopped after the call, so the end-of-turn token is missing
            ids, components = np.append(end_of_turn, ids), np.append(np.uint8(Component.TEMPLATE), components)
        keep: int | None = None
        tokens = side.tokens(ids, components)
        if messages[0]["role"] == "user" and self._drops_reasoning():
            keep, tokens = self.renderer.history.go_on(side.pieces, tokens)
        length = (side.length if keep is None else keep - len(side.prompt_ids)) + len(tokens)
        remaining = self.config.max_completion_length - length
        if remaining < 1:
            return _out_of_tokens(episode, StopReason.MAX_COMPLETION_LENGTH)
        if keep is None:
            side.append(tokens.ids, components, None, -1)
        else:
            side.branch(keep, tokens)
        first, side.unsent = side.unsent, side.unsent[:0]
        ids = np.concatenate([first, tokens.ids]) if len(first) else tokens.ids
        limit = min(self.config.max_turn_tokens, remaining)
        self._submit(episode, ids, limit, (*job.rng_key, 1) if len(first) else (), None if len(first) else keep)
        return None

    def _truncate(self, text: str) -> str:
        """Truncate an observation to rollout.max_observation_tokens, with a note."""
        limit = self.config.max_observation_tokens
        if len(text.encode("utf-8", "replace")) <= limit:  # a token covers at least one byte
            return text
        return self.renderer.truncate(text, limit)


def _after(before: Future, call: Callable[..., str], *arguments: Any) -> str:
    wait([before])
    return call(*arguments)


def _no_exit(env: Environment) -> AbstractContextManager[None]:
    return no_exit(f"the environment {type(env).__name__}")


def _tool_message(attempt: ToolCall | str, text: str) -> Message:
    return {"role": "tool", "name": attempt.name if isinstance(attempt, ToolCall) else "error", "content": text}


def _out_of_tokens(episode: Episode, reason: StopReason) -> StopReason:
    """The limit of tokens that the speaker has reached: `reason` for the agent."""
    return StopReason.MAX_USER_TOKENS if episode.speaker is episode.user else reason
