"""The agent loop: samples many multi-turn trajectories at once.

Each advances on its own: render the prompt, ask the engine for a turn, parse it, run its tool calls, append the
observations, and so on until an answer or a limit. Where there is a user (the environment's `respond`, or a second
policy), an answer is followed by what the user says, who decides when the episode is over. There is no barrier between
turns, so a slow tool holds up its own trajectory only.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from pact_fast.chat.formats.json_calls import error_observation
from pact_fast.chat.history import CURES
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.chat.template_check import check_user_turns
from pact_fast.config import RolloutConfig
from pact_fast.data.types import Message, StopReason, Task, ToolSchema, Trajectory, text_of
from pact_fast.envs.base import Environment, has_user
from pact_fast.errors import PactError
from pact_fast.rollout.engine import Engine
from pact_fast.rollout.env_calls import EnvironmentCalls, copy_for, no_exit_in
from pact_fast.rollout.episode import Episode, Job, Side
from pact_fast.rollout.pending import PendingToolCalls
from pact_fast.rollout.schedule import Schedule
from pact_fast.rollout.self_play import user_call, user_prompt_ids, user_stops, user_view
from pact_fast.rollout.turns import TurnLoop, drops_reasoning
from pact_fast.users.endpoint import EndpointUsers


class AgentLoop:
    """Samples trajectories from the prompt only; expert traces are not shown to the policy.

        loop = AgentLoop(engine, renderer, make_env, config)
        trajectories = loop.run([Job(task, rng_key=(seed, step, index)), …])     # in the order of the jobs

    Args:
        engine: Generates the turns.
        renderer: Renders prompts and observations, parses turns.
        make_env: A fresh environment for a task; it serves one trajectory.
        config: Limits of turns, tokens and time; who plays the user.
        users: Makes the users of `rollout.user=endpoint`; the caller closes it.

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
        self._calls = EnvironmentCalls()
        self._turns = TurnLoop(engine, renderer, self._calls, config)
        self._prompts: dict[bytes, np.ndarray] | None = None  # of the call of `run` under way
        self._checked_user_turns = not isinstance(renderer, ChatRenderer)  # a stand-in has no template
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
        # a side keeps its place in the engine while the other speaks: all sides of running episodes must have one
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
                    stop, pending = self._turns.take(episode, completion)
                    if stop is not None:
                        end(index, stop)
                    elif pending:
                        in_thread = any(isinstance(result, Future) for result in pending)
                        calls.add(index, pending, episode.env.blocking or in_thread)
                for index, pending in calls.due():
                    if index not in running:
                        continue
                    stop = self._turns.advance(running[index], pending)
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
        self._calls.close()

    def resolve_task(self, task: Task) -> tuple[Task, Environment]:
        """The task as the policy sees it, and its environment.

        Text that `reset` returns is appended to the question, and the environment's tools are offered if the task names
        none. Resolving a resolved task changes nothing.
        """
        env = self.make_env(task)
        if (has_user(env) or self.config.user != "environment") and not self._checked_user_turns:
            self._check_user_turns()
        with no_exit_in(env):
            extra = env.reset(copy_for(env, task))
        question = text_of(task.prompt[-1].get("content"))
        if extra and not question.endswith(extra):
            task = replace(task, prompt=[*task.prompt[:-1], {**task.prompt[-1], "content": f"{question}\n\n{extra}"}])
        return replace(task, tools=task.tools or env.tools), env

    def _check_user_turns(self) -> None:
        check_user_turns(self.renderer)
        if drops_reasoning(self.renderer) and not getattr(self.engine, "rewinds", False):
            raise PactError(
                "the chat template drops the reasoning of earlier turns once the user speaks again, and "
                f"{getattr(self.engine, 'name', 'the engine')} cannot go back in a context; use rollout.engine=transformers "
                f"or vllm (an engine of your own: honour Request.keep and set rewinds), or {CURES}"
            )
        self._checked_user_turns = True

    def trained_view(self, task: Task) -> tuple[Task, np.ndarray]:
        """(task, prompt [n] int64) of a resolved task, as the side that is trained sees it (rollout.train_as)."""
        if self.config.train_as == "agent":
            return task, self.prompt_ids(task)
        view = self._user_view(*self.resolve_task(task))
        return view, self._user_prompt_ids(view)

    def _user_view(self, task: Task, env: Environment) -> Task:
        with no_exit_in(env):
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
        self._turns.submit(episode, agent.prompt_ids, limit, job.rng_key)
        return episode

    def _close(self, episode: Episode) -> None:
        for side in episode.sides:
            self.engine.close(side.session)

    def _end(self, running, index: int, stop: StopReason, on_finish) -> Trajectory:
        episode = running.pop(index)
        self._close(episode)
        task = episode.job.task
        trajectory = episode.agent.finish(task.id, stop)
        # ask the instance that served the calls: an environment may judge its own final state
        with no_exit_in(episode.env):
            given = copy_for(episode.env, (task, trajectory))
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
        """Return the flaws that the environment finds in the user's side; {} if it does not judge users."""
        judge = getattr(episode.env, "judge_user", None)
        if not callable(judge):
            return {}
        with no_exit_in(episode.env):
            return dict(judge(*copy_for(episode.env, (episode.job.task, trajectory))))
