"""The interface of an inference engine. Token ids in, token ids and log-probs out; text never crosses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pact_fast.config.filters import UNFILTERED, SamplingFilters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Request:
    """Generate one assistant turn of a session.

    session         number of the session, chosen by the caller
    ids             int64 [n], tokens to append to the session's context before sampling: the prompt at first, later
                    the bridge tokens after the last turn (its sampled tokens are in the context already)
    max_new_tokens  most tokens to sample
    rng_key         seeds the session, at its first request. What is sampled then depends on the weights, the context
                    and this key alone, not on what else runs in the batch
    temperature     0 is greedy
    filters         which tokens may be sampled; no effect where greedy
    user            the session is of the side that plays the user, which may have a model of its own
    keep            tokens of the session's context that stay before `ids`: the rest of it is forgotten; None: all stay
    """

    session: int
    ids: np.ndarray
    max_new_tokens: int
    rng_key: tuple[int, ...] = ()
    temperature: float = 1.0
    filters: SamplingFilters = UNFILTERED
    user: bool = False
    keep: int | None = None


@dataclass(frozen=True)
class Completion:
    """One sampled turn.

    session   that of the request
    ids       int64 [n], with the end-of-turn token if it was sampled
    logprobs  float32 [n], of the distribution that was sampled from: at the request's temperature, normalised over the
              tokens that its filters keep (greedy: at temperature 1, over all)
    ended     True: an end-of-turn token was sampled; False: max_new_tokens was reached
    version   of the weights that sampled it
    cached    tokens of the context that were found in a prefix cache; None if the engine does not report it
    """

    session: int
    ids: np.ndarray
    logprobs: np.ndarray
    ended: bool
    version: int = 0
    cached: int | None = None


@dataclass
class SyncReport:
    """One weight update: bytes moved, and seconds to load and to verify them (None: they were not verified)."""

    version: int
    bytes: int
    load_seconds: float
    verify_seconds: float | None


class Engine(Protocol):
    """Continuous batching over sessions; a session's key-value cache may live until `close`.

    An engine of your own subclasses this one and implements `submit`, `step`, `close` and `update_weights`.

    name            for messages
    version         of the weights; -1 before the first `update_weights`
    synchronous     True: each call of `step` is one decoding step of all sessions, however long it takes, so that
                    counting calls is a reproducible clock
    applies_filters True: it honours `Request.filters`; otherwise top-p, top-k and min-p are refused
    rewinds         True: it honours `Request.keep`; otherwise dialogues whose template rewrites the past are refused
    sync_report     of the last weight update; None if the engine does not measure it
    """

    name: str = "the engine"
    version: int = -1
    synchronous: bool = False
    applies_filters: bool = False
    rewinds: bool = False
    sync_report: SyncReport | None = None

    def submit(self, request: Request) -> None:
        """Queue a turn. A session may have one turn under way at a time."""

    def step(self, timeout: float | None = None) -> list[Completion]:
        """Generate, and return the turns that finished.

        A synchronous engine returns after at least one more token of every running session. Any other waits until a
        turn finishes, at most `timeout` seconds (None: as long as it takes).
        """
        raise NotImplementedError

    def close(self, session: int) -> None:
        """Forget the session, and cancel its turn if one is under way. Must be called for every session."""

    def update_weights(self, model: PreTrainedModel, version: int) -> None:
        """Sample from these weights from now on. Turns under way end with the old ones. A collective under ZeRO-3."""

    def sleep(self) -> None:
        """Free as much memory as possible until the next `update_weights`."""
        return

    def shutdown(self) -> None:
        """Stop for good, and release processes and memory."""
        return
