"""What the agent loop needs of an inference engine. Token ids in, token ids out; text never crosses this line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Request:
    """Generate one assistant turn of a session.

    `ids` are the tokens to append to the session's context before sampling: the prompt at first, later the glue that follows
    the last turn (the sampled tokens themselves are already in the context). `rng_key` seeds a session at its first request:
    what is sampled then depends on the weights, the context and this key alone, not on what else runs in the batch.
    """

    session: int
    ids: np.ndarray
    max_new_tokens: int
    rng_key: tuple[int, ...] = ()
    temperature: float = 1.0  # 0 = greedy


@dataclass(frozen=True)
class Completion:
    """ids int64 [n], end-of-turn included when sampled; logprobs float32 [n] at the request's temperature (greedy: at 1)."""

    session: int
    ids: np.ndarray
    logprobs: np.ndarray
    ended: bool  # by an end-of-turn token; otherwise max_new_tokens was reached
    version: int = 0  # of the weights that sampled it
    cached: int | None = None  # tokens of the context that were found in a prefix cache, where the engine tells


class Engine(Protocol):
    """Continuous batching over sessions; the key-value cache of a session lives until `close`."""

    version: int  # of the weights
    synchronous: bool  # each call of `step` is one step of all sessions, however long it takes

    def submit(self, request: Request) -> None: ...

    def step(self, timeout: float | None = None) -> list[Completion]:
        """The turns that finished. Clocked: after at least one more token of every running session; otherwise waits for a
        turn, at most `timeout` seconds.
        """

    def close(self, session: int) -> None:
        """Forget the session, and cancel its turn if one is under way. Must be called for every session."""

    def update_weights(self, model: PreTrainedModel, version: int) -> None:
        """Sample from these weights from now on; turns under way end with the old ones."""

    def sleep(self) -> None:
        """Free what memory it can until the next `update_weights`."""

    def shutdown(self) -> None: ...
