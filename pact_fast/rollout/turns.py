"""The step after a sampled turn of an episode: tool calls, the user's reply, the other side's turn, or the end."""

from __future__ import annotations

import copy
from concurrent.futures import Future
from typing import Any

import numpy as np

from pact_fast.chat.rendering import ChatRenderer
from pact_fast.components import Component
from pact_fast.config import RolloutConfig
from pact_fast.data.types import Message, StopReason, ToolCall, TurnRecord
from pact_fast.envs.base import has_user, is_finished
from pact_fast.errors import PactError
from pact_fast.rollout.engine import Completion, Engine, Request
from pact_fast.rollout.env_calls import EnvironmentCalls, no_exit_in
from pact_fast.rollout.episode import Episode
from pact_fast.rollout.pending import Pending
from pact_fast.rollout.self_play import user_call, user_stops
from pact_fast.users.stop import read_stop


def drops_reasoning(renderer: object) -> bool:
    """Whether the chat template drops the reasoning of earlier turns once the user speaks again."""
    return isinstance(renderer, ChatRenderer) and renderer.history.drops_reasoning


class TurnLoop:
    """Records the turns of episodes, and asks the engine for the next ones.

    Args:
        engine: Generates the turns.
        renderer: Parses turns, and renders the text between them.
        calls: Runs tools and users.
        config: Limits of turns and tokens.
    """

    def __init__(self, engine: Engine, renderer: ChatRenderer, calls: EnvironmentCalls, config: RolloutConfig):
        self._engine, self._renderer, self._calls, self._config = engine, renderer, calls, config

    def submit(
        self, episode: Episode, ids: np.ndarray, limit: int, rng_key: tuple[int, ...] = (), keep: int | None = None
    ) -> None:
        """Ask the engine for a turn of the speaker.

        Args:
            episode: The episode.
            ids: [n] int64, tokens that follow the speaker's context.
            limit: Most tokens of the turn.
            rng_key: Seeds the speaker's sampling, with its first turn; else empty.
            keep: Tokens of the context that stay; None: all.
        """
        job, is_user = episode.job, episode.speaker is episode.user
        # a side with a frozen model of its own is a part of the environment: it says the likeliest words
        frozen = self._config.user == "model" if is_user else self._config.agent_model is not None
        temperature = 0.0 if frozen else job.temperature
        session = episode.speaker.session
        self._engine.submit(Request(session, ids, limit, rng_key, temperature, job.filters, is_user, keep))

    def take(self, episode: Episode, completion: Completion) -> tuple[StopReason | None, list[Pending]]:
        """Record a sampled turn and start the next action: tool calls, the user's reply, or the other side's turn.

        Returns the stop reason, if any, and the pending results, if any.
        """
        side = episode.speaker
        parsed = self._renderer.parse(completion.ids, side.tools)
        record = TurnRecord(parsed.text, parsed.reasoning, parsed.content, list(parsed.attempts))
        side.turns.append(record)
        side.append(completion.ids, parsed.components, completion.logprobs, completion.version)
        if not completion.ended:
            record.attempts = []  # calls of a truncated turn are not run, and must not be rewarded
            cut = side.length >= self._config.max_completion_length
            return _out_of_tokens(episode, StopReason.MAX_COMPLETION_LENGTH if cut else StopReason.MAX_TURN_TOKENS), []
        env = episode.env
        if parsed.attempts:
            call = user_call(env) if side is episode.user else env.call
            return None, self._calls.tools(env, call, parsed.attempts)
        if episode.user is not None:
            return self._hand_over(episode, record.content), []
        if episode.endpoint is not None:
            return None, [self._calls.in_thread(episode.endpoint.reply, record.content)]
        if has_user(env):
            return None, [self._calls.run(env, env.respond, record.content)]
        return StopReason.ANSWER, []

    def advance(self, episode: Episode, pending: list[Pending]) -> StopReason | None:
        """Append the results of a turn and submit the next one; returns a stop reason if the trajectory ends."""
        with no_exit_in(episode.env):
            results = [result.result() if isinstance(result, Future) else result for result in pending]
        # a turn with an attempt at a call, malformed or not, never waits for the user: an error is no reply
        if episode.speaker.turns[-1].attempts:
            return self._add_observations(episode, results)
        return self._add_reply(episode, *results)

    def _add_observations(self, episode: Episode, results: list[Any]) -> StopReason | None:
        """Continue with the observations of the last turn's calls."""
        side = episode.speaker
        record = side.turns[-1]
        with no_exit_in(episode.env):
            finished = side is episode.agent and is_finished(episode.env)
        if finished:
            record.observations = results
            return StopReason.ENVIRONMENT
        if len(side.turns) >= self._config.max_turns:
            record.observations = results
            return StopReason.MAX_TURNS if side is episode.agent else StopReason.MAX_USER_TURNS
        record.observations = [self._truncate(text) for text in results]
        messages = [_tool_message(a, t) for a, t in zip(record.attempts, record.observations, strict=True)]
        return self._append(episode, messages, self._renderer.call_eot_id)

    def _add_reply(self, episode: Episode, reply: str | None) -> StopReason | None:
        """Continue with the reply of the environment's or endpoint's user to the last turn."""
        if reply is None and episode.endpoint is not None:
            return StopReason.USER_FAILED if episode.endpoint.failed else StopReason.USER
        if reply is None:
            return StopReason.ENVIRONMENT
        if not isinstance(reply, str):
            raise PactError(
                f"respond of the environment {type(episode.env).__name__} returned {type(reply).__name__}; return the "
                "user's next message as text, or None to end the episode"
            )
        return self._add_message(episode, reply)

    def _hand_over(self, episode: Episode, text: str) -> StopReason | None:
        """Let the other side answer the visible text of a turn."""
        if episode.speaker is episode.user:
            text, ended = read_stop(text, self._config.user_stop, *user_stops(episode.env))
            if ended:
                return StopReason.USER
            episode.speaker = episode.agent
        elif episode.user is not None:
            episode.speaker = episode.user
        return self._add_message(episode, text)

    def _add_message(self, episode: Episode, text: str) -> StopReason | None:
        """Continue with a message to the speaker."""
        side = episode.speaker
        side.add_message(text)
        if side is episode.user:
            if len(side.turns) >= self._config.max_turns:
                return StopReason.MAX_USER_TURNS
        else:
            limit = self._config.max_user_turns
            if limit is not None and sum(turn.user is not None for turn in side.turns) > limit:
                return StopReason.MAX_USER_TURNS
            if len(side.turns) >= self._config.max_turns:
                return StopReason.MAX_TURNS
            self._update_tools(episode)
        return self._append(episode, [{"role": "user", "content": text}], self._renderer.eot_id)

    def _update_tools(self, episode: Episode) -> None:
        """The tools on offer, if the environment has changed them: until then, a task's own tools hold."""
        if episode.offered is None:
            return
        with no_exit_in(episode.env):
            tools = episode.env.tools
        if tools != episode.offered:
            episode.agent.tools = episode.offered = copy.deepcopy(tools)

    def _append(self, episode: Episode, messages: list[Message], end_of_turn: int) -> StopReason | None:
        """Append messages to the speaker's side and submit its turn; returns a stop reason if there is no room for it."""
        side, job = episode.speaker, episode.job
        ids, components = self._renderer.bridge_tokens(messages)
        if side.ids and int(side.ids[-1][-1]) not in self._renderer.eot_ids:
            # rollout.stop_at_tool_call: the engine stopped after the call, so the end-of-turn token is missing
            ids, components = np.append(end_of_turn, ids), np.append(np.uint8(Component.TEMPLATE), components)
        keep: int | None = None
        tokens = side.tokens(ids, components)
        if messages[0]["role"] == "user" and drops_reasoning(self._renderer):
            keep, tokens = self._renderer.history.continuation(side.pieces, tokens)
        length = (side.length if keep is None else keep - len(side.prompt_ids)) + len(tokens)
        remaining = self._config.max_completion_length - length
        if remaining < 1:
            return _out_of_tokens(episode, StopReason.MAX_COMPLETION_LENGTH)
        if keep is None:
            side.append(tokens.ids, components, None, -1)
        else:
            side.branch(keep, tokens)
        first, side.unsent = side.unsent, side.unsent[:0]
        ids = np.concatenate([first, tokens.ids]) if len(first) else tokens.ids
        limit = min(self._config.max_turn_tokens, remaining)
        self.submit(episode, ids, limit, (*job.rng_key, 1) if len(first) else (), None if len(first) else keep)
        return None

    def _truncate(self, text: str) -> str:
        """Truncate an observation to rollout.max_observation_tokens, with a note."""
        limit = self._config.max_observation_tokens
        if len(text.encode("utf-8", "replace")) <= limit:  # a token covers at least one byte
            return text
        return self._renderer.truncate(text, limit)


def _tool_message(attempt: ToolCall | str, text: str) -> Message:
    return {"role": "tool", "name": attempt.name if isinstance(attempt, ToolCall) else "error", "content": text}


def _out_of_tokens(episode: Episode, reason: StopReason) -> StopReason:
    """The limit of tokens that the speaker has reached: `reason` for the agent."""
    return StopReason.MAX_USER_TOKENS if episode.speaker is episode.user else reason
