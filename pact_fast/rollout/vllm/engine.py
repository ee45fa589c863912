"""Rollouts by vLLM: token ids in, token ids out, and weights that are verified after every update.

The engine is driven turn by turn. A turn's request carries the whole context, which vLLM finds in its prefix cache; so the
context is known here, and an engine that died is started again, given the current weights and asked for the turns that were
under way, while everything already sampled stays.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from pact_fast.errors import EngineDied, EngineError, EngineTimeout
from pact_fast.model.adapter import engine_adapter
from pact_fast.model.weights import (
    ExpectedWeights,
    WeightMismatch,
    WeightShard,
    WeightSnapshot,
    shape_and_fingerprint,
    tied_head,
    verify,
)
from pact_fast.rollout.engine import Completion, Request

SLICE = 0.02  # seconds of waiting for turns, after which others may enter
MAX_RESTARTS = 3  # in a row, without a finished turn in between


@dataclass(frozen=True)
class Turn:
    """What is asked of vLLM."""

    key: str
    ids: list[int]
    max_tokens: int
    temperature: float
    seed: int
    stop: list[int]
    version: int


@dataclass(frozen=True)
class Sampled:
    key: str
    ids: list[int]
    logprobs: list[float]
    cached: int | None = None  # tokens of the context that vLLM found in its prefix cache, where it tells


@dataclass
class SyncReport:
    """One weight update: what it moved and how long its parts took."""

    version: int
    bytes: int
    load_seconds: float
    verify_seconds: float


class VllmTransport(Protocol):
    """Where vLLM runs: in this process, in one of ours, or behind a URL. Failures are EngineErrors."""

    name: str
    synchronous: bool  # `poll` is one step of the engine, so that counting calls is a clock

    def add(self, turn: Turn) -> None: ...

    def poll(self, timeout: float) -> list[Sampled]:
        """Turns that ended; waits at most `timeout` seconds for one (synchronous: makes one step)."""

    def abort(self, keys: list[str]) -> None: ...

    def load(self, weights: WeightSnapshot, version: int) -> None:
        """Give the engine these weights, whatever it takes; nothing is being generated meanwhile. They are gone through to
        the end even if that fails: it may take other processes.
        """

    def load_adapter(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        """Give the engine this adapter, under a name of its own, and use it for every turn from now on."""

    def reload(self) -> None:
        """Start the engine again if it is ours, else connect again, and give it what was last loaded (WeightsUnavailable)."""

    def report(self) -> tuple[int, list[WeightShard]]:
        """(version, fingerprints) of the weights in use, of all workers."""

    def report_adapter(self) -> tuple[int, list[WeightShard]]:
        """The same of the adapter in use."""

    def reset_prefix_cache(self) -> None: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class _Session:
    rng_key: tuple[int, ...]
    context: list[int] = field(default_factory=list)
    turns: int = 0
    turn: Turn | None = None  # under way


class VllmEngine:
    """See Engine. `deadline`: seconds without a finished turn after which the engine counts as hung."""

    def __init__(
        self, host: VllmTransport, eot_ids: Iterable[int], *, deadline: float, dtype: torch.dtype = torch.float32
    ):
        self.host, self.version, self.restarts = host, -1, 0
        self.synchronous = host.synchronous
        self.last_sync: SyncReport | None = None
        self._eot = sorted(eot_ids)
        self._deadline, self._dtype = deadline, dtype
        self._sessions: dict[int, _Session] = {}
        self._closed = False
        self._asked = 0  # turns, so that each has a key of its own
        self._expected: ExpectedWeights = {}
        self._adapter: ExpectedWeights = {}  # empty without LoRA
        # Sampling may go on in one thread while another one brings new weights. Who wants to enter queues at the turnstile:
        # a lock alone would let the sampling thread in again and again.
        self._turnstile, self._lock = threading.Lock(), threading.Lock()
        self._ended: list[Completion] = []  # while the weights changed
        self._heard = time.monotonic()  # when a turn last ended, or the first one began
        self._failures = 0  # restarts since then

    # -- sampling ------------------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        with self._alone():
            self._submit(request)

    def _submit(self, request: Request) -> None:
        self._check_open()
        if self.version < 0:
            raise EngineError(self.host.name, "it has no weights yet; call update_weights first")
        if not self._waiting():
            self._heard = time.monotonic()
        session = self._sessions.setdefault(request.session, _Session(request.rng_key))
        session.context += request.ids.tolist()
        session.turns += 1
        self._asked += 1
        seed = np.random.SeedSequence((*session.rng_key, session.turns)).generate_state(1, np.uint64)[0]
        session.turn = Turn(
            f"{request.session}/{session.turns}/{self.version}/{self._asked}",
            list(session.context),  # which grows
            request.max_new_tokens,
            request.temperature,
            int(seed) >> 1,
            self._eot,
            self.version,
        )
        self._guarded(lambda: self.host.add(session.turn))

    def step(self, timeout: float | None = None) -> list[Completion]:
        """Turns that ended. Waits for one, at most `timeout` seconds (default: until the deadline)."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._alone():
                done = self._poll(SLICE if end is None else min(SLICE, end - time.monotonic()))
                if done or self.synchronous or not self._waiting() or (end is not None and time.monotonic() >= end):
                    return done

    def _poll(self, timeout: float) -> list[Completion]:
        """Turns that ended; an engine that is dead or has been silent for too long is started again."""
        self._check_open()
        if self._ended:
            done, self._ended = self._ended, []
            return done
        if not self._waiting():
            return []
        left = self._heard + self._deadline - time.monotonic()
        try:
            if left <= 0:
                raise EngineTimeout(
                    self.host.name, f"no turn has ended for {self._deadline:g} s (rollout.engine_timeout)"
                )
            sampled = self.host.poll(max(min(timeout, left), 0.0))
        except (EngineDied, EngineTimeout) as error:
            self._recover(error)
            return []
        if sampled or self.synchronous:  # a step that returns is a sign of life; only servers can be silent
            self._heard = time.monotonic()
        if sampled:
            self._failures = 0
        return [completion for one in sampled if (completion := self._finish(one))]

    def close(self, session: int) -> None:
        with self._alone():
            gone = self._sessions.pop(session, None)
            self._ended = [done for done in self._ended if done.session != session]
            if gone and gone.turn and not self._closed:
                key = gone.turn.key
                self._guarded(lambda: self.host.abort([key]))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._turnstile:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(self.host.name, "it was shut down")

    def _waiting(self) -> bool:
        return any(session.turn for session in self._sessions.values())

    def _finish(self, sampled: Sampled) -> Completion | None:
        number = int(sampled.key.split("/")[0])
        session = self._sessions.get(number)
        if session is None or session.turn is None or session.turn.key != sampled.key:
            return None  # cancelled while its answer was on the way
        turn, session.turn = session.turn, None
        ids, logprobs = np.array(sampled.ids, np.int64), np.array(sampled.logprobs, np.float32)
        self._check(ids, logprobs, turn.max_tokens)
        session.context += sampled.ids
        return Completion(number, ids, logprobs, int(ids[-1]) in self._eot, turn.version, sampled.cached)

    def _check(self, ids: np.ndarray, logprobs: np.ndarray, limit: int) -> None:
        """An engine that answers nonsense is an error here, not a reward of zero later."""
        problem = None
        if not len(ids):
            problem = "a turn came back without a token"
        elif len(ids) != len(logprobs):
            problem = f"{len(ids)} tokens came back with {len(logprobs)} log-probs"
        elif not np.isfinite(logprobs).all() or logprobs.max() > 1e-3:
            problem = f"a log-prob of {logprobs[~np.isfinite(logprobs) | (logprobs > 1e-3)][0]} came back"
        elif len(ids) < limit and int(ids[-1]) not in self._eot:
            problem = f"a turn ended after {len(ids)} of {limit} tokens without an end-of-turn token"
        if problem:
            raise EngineError(self.host.name, problem)

    # -- weights -------------------------------------------------------------------------------------------------------------

    def update_weights(self, model: PreTrainedModel, version: int) -> None:
        """Give the engine the model's weights as `version`, check what it then holds, and forget cached prefixes.

        Turns under way end first. Then the old weights are checked once more: what was sampled since the last update came
        from the weights it is stamped with. WeightMismatch if the engine holds anything else than what was sent.
        With LoRA, the frozen weights go there once; then only the adapter moves. It is checked number by number in the
        buffers that vLLM computes with, as the weights are.
        May be called while another thread samples; that one waits.
        """
        with self._alone():
            ended: list[Completion] = []
            while self._waiting():
                ended += self._poll(SLICE)
            self._ended += ended
            self._update(model, version)

    def _update(self, model: PreTrainedModel, version: int) -> None:
        self.host.wake()
        if self.version >= 0:
            self._check_held()
        started = time.monotonic()
        adapter = engine_adapter(model, self._dtype)
        everything = self.version < 0 or not adapter
        self.version = -1  # until the new ones are verified
        size = self._send_weights(model, version) if everything else 0
        if adapter:
            size += self._send_adapter(adapter, version)
        loaded = time.monotonic()
        self._settle(version, everything)
        self.last_sync = SyncReport(version, size, loaded - started, time.monotonic() - loaded)

    def _send_weights(self, model: PreTrainedModel, version: int) -> int:
        """The number of bytes."""
        weights = WeightSnapshot(model, self._dtype)
        self._insist(lambda: self.host.load(weights, version))
        self._expected = dict(weights.expected)
        tied = tied_head(model)
        if tied and tied[1] in self._expected:
            self._expected[tied[0]] = self._expected[tied[1]]
        return weights.bytes

    def _send_adapter(self, adapter: dict[str, torch.Tensor], version: int) -> int:
        self._adapter = {name: shape_and_fingerprint(tensor) for name, tensor in adapter.items()}
        self._insist(lambda: self.host.load_adapter(adapter, version))
        return sum(tensor.nbytes for tensor in adapter.values())

    def _insist(self, load: Callable[[], None]) -> None:
        """An engine that dies of it is started again, which gives it the same. One that has never served would die again."""
        try:
            load()
        except (EngineDied, EngineTimeout) as error:
            if self.last_sync is None:
                raise
            self._restart(error)

    def sleep(self) -> None:
        """Free the device's memory for the update, where the host can."""
        self.host.sleep()

    def shutdown(self) -> None:
        """Stop it for good; a thread that still samples gets an EngineError."""
        with self._alone():
            self._closed = True
            self.host.close()

    def _check_held(self) -> None:
        version, self.version = self.version, -1
        with suppress(EngineDied, EngineTimeout):  # it will be started again with the new weights
            self._verify(version)
            self.version = version

    def _settle(self, version: int, everything: bool = True) -> None:
        """Sample from what was loaded, once it is verified; an engine that dies meanwhile is started again with the same."""
        while self.version < 0:
            try:
                self._verify(version, everything)
                self.version = version
            except (EngineDied, EngineTimeout) as error:
                self._restart(error)
                everything = True

    def _verify(self, version: int, everything: bool = True) -> None:
        """The adapter, and the weights under it or all weights if `everything`."""
        if self._adapter:
            pieces = self._of_version(version, self.host.report_adapter())
            # what has no adapter has a buffer all the same, of zeros
            verify(self._adapter, [p for p in pieces if p.name in self._adapter or p.fingerprint])
        if everything:
            self._verify_weights(self._of_version(version, self.host.report()))
        self.host.reset_prefix_cache()

    def _of_version(self, version: int, report: tuple[int, list[WeightShard]]) -> list[WeightShard]:
        found, pieces = report
        if found != version:
            raise WeightMismatch(
                f"{self.host.name}: it answers with weights of version {found}, the trainer has sent {version}; "
                "another trainer may be using this server"
            )
        return pieces

    def _verify_weights(self, pieces: list[WeightShard]) -> None:
        expected = dict(self._expected)
        names = {piece.name for piece in pieces}
        for name in [n for n in expected if n not in names and self._is_tied_copy(n)]:
            del expected[name]  # the engine uses the embedding itself
        verify(expected, pieces)

    def _is_tied_copy(self, name: str) -> bool:
        return name == "lm_head.weight" and self._expected[name] in [
            value for other, value in self._expected.items() if other != name
        ]

    # -- failures ------------------------------------------------------------------------------------------------------------

    def _guarded(self, call) -> None:
        try:
            call()
        except (EngineDied, EngineTimeout) as error:
            self._recover(error)

    def _recover(self, error: EngineError) -> None:
        """Start again, and ask again for the turns under way; what ended before is not lost."""
        version, self.version = self.version, -1
        self._restart(error)
        self._settle(version)
        self._heard = time.monotonic()
        for session in self._sessions.values():
            if session.turn:
                self.host.add(session.turn)

    def _restart(self, error: EngineError) -> None:
        while True:
            self._failures += 1
            self.restarts += 1
            if self._failures > MAX_RESTARTS:
                raise error
            try:
                return self.host.reload()
            except (EngineDied, EngineTimeout) as again:
                error = again
