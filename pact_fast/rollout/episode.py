"""Episodes under way, with one side for each policy that takes part."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from pact_fast.chat.history import LabelledTokens, concatenate, labelled_prompt
from pact_fast.config.filters import UNFILTERED, SamplingFilters
from pact_fast.data.types import StopReason, Task, ToolSchema, Trajectory, TurnRecord
from pact_fast.envs.base import Environment
from pact_fast.users.endpoint import EndpointUser


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
class Side:
    """One policy's view of an episode: its context and its own turns.

    session     of the engine
    prompt_ids  [n] int64
    tools       on offer now
    unsent      tokens that the engine has not been given yet; its next request begins with them
    opening     the other side's message before the first turn; None: the prompt holds it
    length      tokens after the prompt, in the sequence that the engine has now
    pieces      that sequence, where the user may change it: what there was when the user spoke last, then turns and the
                text between them
    branches    (start, keep) of every branch but the first, as in Trajectory
    """

    session: int
    prompt_ids: np.ndarray
    tools: list[ToolSchema]
    unsent: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    opening: str | None = None
    ids: list[np.ndarray] = field(default_factory=list)
    components: list[np.ndarray] = field(default_factory=list)
    turn_ids: list[np.ndarray] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    versions: list[np.ndarray] = field(default_factory=list)
    turns: list[TurnRecord] = field(default_factory=list)
    length: int = 0
    pieces: list[LabelledTokens] = field(default_factory=list)
    branches: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pieces.append(labelled_prompt(self.prompt_ids))

    def append(self, ids: np.ndarray, components: np.ndarray, logprobs: np.ndarray | None, version: int) -> None:
        """Tokens of the current turn; text that was not sampled has no logprobs and version -1."""
        tokens = self.tokens(ids, components)
        self._store(tokens, logprobs, version)
        self.pieces.append(tokens)
        self.length += len(ids)

    def branch(self, keep: int, tokens: LabelledTokens) -> None:
        """Go on with the first `keep` tokens of the sequence, the prompt included, and with these behind them."""
        if keep < len(self.prompt_ids) + self.length:
            self.branches.append((sum(map(len, self.ids)), keep - len(self.prompt_ids)))
        self._store(tokens, None, -1)
        self.pieces = [concatenate([concatenate(self.pieces)[:keep], tokens])]
        self.length = keep + len(tokens) - len(self.prompt_ids)

    def tokens(self, ids: np.ndarray, components: np.ndarray) -> LabelledTokens:
        """Tokens of the current turn."""
        return LabelledTokens(ids, components, np.full(len(ids), len(self.turns) - 1, np.int16))

    def _store(self, tokens: LabelledTokens, logprobs: np.ndarray | None, version: int) -> None:
        n = len(tokens)
        self.ids.append(tokens.ids)
        self.components.append(tokens.components)
        self.turn_ids.append(tokens.turn_ids)
        self.logprobs.append(np.full(n, np.nan, np.float32) if logprobs is None else logprobs)
        self.versions.append(np.full(n, version, np.int32))

    def add_message(self, text: str) -> None:
        """Record the other side's message after the last turn."""
        if self.turns:
            self.turns[-1].user = text
        else:
            self.opening = text

    def finish(self, task_id: str, stop_reason: StopReason) -> Trajectory:
        """The trajectory of this side."""
        versions = _concatenate(self.versions, np.int32)
        return Trajectory(
            task_id=task_id,
            prompt_ids=self.prompt_ids,
            ids=_concatenate(self.ids, np.int64),
            components=_concatenate(self.components, np.uint8),
            turn_ids=_concatenate(self.turn_ids, np.int16),
            sampled=versions >= 0,
            logprobs=_concatenate(self.logprobs, np.float32),
            versions=versions,
            turns=self.turns,
            stop_reason=stop_reason,
            opening=self.opening,
            branches=np.array(self.branches, np.int64).reshape(-1, 2),
        )


@dataclass
class Episode:
    """A job under way.

    agent    side of the policy that has the task
    user     side of the policy that plays the user; None: the environment does, or a model behind an endpoint, or nobody
    endpoint the user that a model behind an endpoint plays
    speaker  whose turn it is, or was last
    offered  a copy of the tools that the environment offered last; used if it has a user
    started  seconds
    """

    job: Job
    env: Environment
    agent: Side
    user: Side | None = None
    endpoint: EndpointUser | None = None
    offered: list[ToolSchema] | None = None
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.speaker = self.agent

    @property
    def sides(self) -> list[Side]:
        return [self.agent] if self.user is None else [self.agent, self.user]


def _concatenate(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
