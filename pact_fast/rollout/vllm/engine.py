"""Rollouts by vLLM: token ids in, token ids out, and weights that are verified after every update.

vLLM is driven turn by turn. The request of a turn carries its whole context, which vLLM finds in its prefix cache. As
the context is known here, an engine that died can be restarted with the current weights and given the unfinished turns
again; finished turns are never sampled twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from pact_fast.errors import EngineDied, EngineError, EngineTimeout
from pact_fast.model.adapter import engine_adapter
from pact_fast.model.weights import WeightSnapshot
from pact_fast.rollout.engine import Completion, Engine, Request, SyncReport
from pact_fast.rollout.vllm.transport import TurnOutput, TurnRequest, VllmTransport
from pact_fast.rollout.vllm.verification import WeightVerifier

POLL_SECONDS = 0.02  # longest wait for turns with the lock held, so that other threads get in
MAX_RESTARTS = 3  # in a row, without a finished turn in between
MAX_LOGPROB = 1e-3  # log-probs are at most 0, but for rounding


@dataclass
class _Session:
    """Everything sampled in a session so far, and its turn under way."""

    rng_key: tuple[int, ...]
    context: list[int] = field(default_factory=list)
    turns: int = 0
    turn: TurnRequest | None = None


class VllmEngine(Engine):
    """See Engine.

    One thread may sample while another updates the weights; the update waits for the turns under way.

    Args:
        transport: Where vLLM runs.
        eot_ids: Tokens that end a turn.
        deadline: Seconds without a finished turn after which the engine counts as hung (rollout.engine_timeout).
        dtype: In which weights are sent.
        verify_weights: rollout.verify_weights.
        vocab_size: Rows of the embedding, beyond which no token id may be; None: not checked.

    Attributes:
        restarts: Times that vLLM was restarted.
        sync_report: Of the last weight update.
    """

    applies_filters = True
    rewinds = True

    def __init__(
        self,
        transport: VllmTransport,
        eot_ids: Iterable[int],
        *,
        deadline: float,
        dtype: torch.dtype = torch.float32,
        verify_weights: str = "always",
        vocab_size: int | None = None,
    ):
        self.transport, self.name, self.version, self.restarts = transport, transport.name, -1, 0
        self.synchronous = transport.synchronous
        self.sync_report: SyncReport | None = None
        self._eot_ids = sorted(eot_ids)
        self._deadline, self._dtype = deadline, dtype
        self._vocab_size = vocab_size or 1 << 62
        self._verifier = WeightVerifier(transport, verify_weights)
        self._sessions: dict[int, _Session] = {}
        self._unfinished: set[int] = set()  # sessions with a turn under way: thousands of others may be open
        self._closed = False
        self._turn_count = 0  # makes the key of every turn unique
        # A plain lock is not fair: the sampling thread would take it again and again, and an update would wait for
        # ever. A thread that waits for _lock holds _fair_lock, so the next one queues behind it.
        self._fair_lock, self._lock = threading.Lock(), threading.Lock()
        self._completed: list[Completion] = []  # finished during a weight update, for the next `step`
        self._last_activity = time.monotonic()  # when a turn last finished, or the first one was submitted
        self._failures_in_row = 0  # restarts since a turn last finished

    # -- sampling ------------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        with self._exclusive():
            self._submit(request)

    def _submit(self, request: Request) -> None:
        self._check_open()
        if self.version < 0:
            raise EngineError(self.name, "it has no weights yet; call update_weights first")
        if not self.has_unfinished_turns():
            self._last_activity = time.monotonic()
        session = self._sessions.setdefault(request.session, _Session(request.rng_key))
        if request.keep is not None:
            del session.context[request.keep :]
        session.context += request.ids.tolist()
        session.turns += 1
        self._turn_count += 1
        seed = np.random.SeedSequence((*session.rng_key, session.turns)).generate_state(1, np.uint64)[0]
        turn = session.turn = TurnRequest(
            f"{request.session}/{session.turns}/{self.version}/{self._turn_count}",
            list(session.context),  # a copy: the session's own list grows
            request.max_new_tokens,
            request.temperature,
            int(seed) >> 1,
            self._eot_ids,
            self.version,
            request.filters,
        )
        self._unfinished.add(request.session)
        self._call_or_recover(lambda: self.transport.submit(turn))

    def step(self, timeout: float | None = None) -> list[Completion]:
        """Turns that finished; waits for one, at most `timeout` seconds (None: until the deadline)."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._exclusive():
                done = self._poll(POLL_SECONDS if end is None else min(POLL_SECONDS, end - time.monotonic()))
                if (
                    done
                    or self.synchronous
                    or not self.has_unfinished_turns()
                    or (end is not None and time.monotonic() >= end)
                ):
                    return done

    def has_unfinished_turns(self) -> bool:
        """True if a turn was submitted and has not finished."""
        return bool(self._unfinished)

    def _poll(self, timeout: float) -> list[Completion]:
        """Turns that finished; an engine that died, or has finished no turn within the deadline, is restarted."""
        self._check_open()
        if self._completed:
            done, self._completed = self._completed, []
            return done
        if not self.has_unfinished_turns():
            return []
        left = self._last_activity + self._deadline - time.monotonic()
        try:
            if left <= 0:
                raise EngineTimeout(self.name, f"no turn has ended for {self._deadline:g} s (rollout.engine_timeout)")
            outputs = self.transport.poll(max(min(timeout, left), 0.0))
        except (EngineDied, EngineTimeout) as error:
            self._recover(error)
            return []
        if outputs or self.synchronous:  # a step that returns shows that the engine lives; only a server can hang
            self._last_activity = time.monotonic()
        if outputs:
            self._failures_in_row = 0
        return [completion for output in outputs if (completion := self._finish(output))]

    def close(self, session: int) -> None:
        with self._exclusive():
            closed = self._sessions.pop(session, None)
            self._unfinished.discard(session)
            self._completed = [done for done in self._completed if done.session != session]
            if closed and closed.turn and not self._closed:
                key = closed.turn.key
                self._call_or_recover(lambda: self.transport.abort([key]))

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One thread at a time; a waiting thread enters before the current one can enter again."""
        with self._fair_lock:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(self.name, "it was shut down")

    def _finish(self, output: TurnOutput) -> Completion | None:
        """Append a finished turn to its session; None if the turn was cancelled meanwhile."""
        number = int(output.key.split("/")[0])
        session = self._sessions.get(number)
        if session is None or session.turn is None or session.turn.key != output.key:
            return None
        turn, session.turn = session.turn, None
        self._unfinished.discard(number)
        self._check_ids(output.ids, turn.max_tokens)
        with np.errstate(over="ignore"):  # becomes an infinity, which is refused
            ids, logprobs = np.array(output.ids, np.int64), np.array(output.logprobs, np.float32)
        self._check_output(ids, logprobs, turn.max_tokens)
        session.context += output.ids
        return Completion(number, ids, logprobs, int(ids[-1]) in self._eot_ids, turn.version, output.cached)

    def _check_ids(self, ids: list[int], max_tokens: int) -> None:
        """Raise an EngineError for more tokens than were asked for, or one that the model does not have."""
        if len(ids) > max_tokens:
            raise EngineError(self.name, f"{len(ids)} tokens came back where at most {max_tokens} were asked for")
        for token in ids:
            if not 0 <= token < self._vocab_size:
                shown = token if abs(token) < 1 << 63 else f"of {token.bit_length()} bits"
                raise EngineError(self.name, f"token {shown} came back, of a vocabulary of {self._vocab_size}")

    def _check_output(self, ids: np.ndarray, logprobs: np.ndarray, max_tokens: int) -> None:
        """Raise an EngineError for an impossible turn, which would otherwise become a reward of zero."""
        problem = None
        if not len(ids):
            problem = "a turn came back without a token"
        elif len(ids) != len(logprobs):
            problem = f"{len(ids)} tokens came back with {len(logprobs)} log-probs"
        elif not np.isfinite(logprobs).all() or logprobs.max() > MAX_LOGPROB:
            problem = f"a log-prob of {logprobs[~np.isfinite(logprobs) | (logprobs > MAX_LOGPROB)][0]} came back"
        elif len(ids) < max_tokens and int(ids[-1]) not in self._eot_ids:
            problem = f"a turn ended after {len(ids)} of {max_tokens} tokens without an end-of-turn token"
        if problem:
            raise EngineError(self.name, problem)

    # -- weights -------------------------------------------------------------------------------------------------------

    def update_weights(self, model: PreTrainedModel, version: int) -> None:
        """Send the model's weights as `version`, verify them, and reset the prefix cache.

        Turns under way finish first. Then the old weights are verified once more: tokens sampled since the last update
        came from the weights of the version they are stamped with. With LoRA, the frozen weights are sent once; after
        that only the adapter is, and it is verified in the buffers that vLLM multiplies with. rollout.verify_weights may
        turn both verifications off. May be called while another thread samples; that thread waits.

        Raises:
            WeightMismatch: The engine's weights differ from those that were sent.
            EngineError: The engine failed more often than MAX_RESTARTS in a row, or before it ever served.
        """
        with self._exclusive():
            completed: list[Completion] = []
            while self.has_unfinished_turns():
                completed += self._poll(POLL_SECONDS)
            self._completed += completed
            self._update(model, version)

    def _update(self, model: PreTrainedModel, version: int) -> None:
        self.transport.wake()
        if self.version >= 0 and self._verifier.due:
            self._verify_current()
        started = time.monotonic()
        adapter = engine_adapter(model, self._dtype)
        send_all = self.version < 0 or not adapter
        self.version = -1  # until the new weights are verified
        size = self._send_weights(model, version) if send_all else 0
        if adapter:
            size += self._send_adapter(adapter, version)
        loaded, verified = time.monotonic(), self._verifier.due
        # an engine that was restarted meanwhile has got the frozen weights again
        self._verify_until_stable(version, weights=send_all or not self._verifier.verified)
        self.sync_report = SyncReport(version, size, loaded - started, time.monotonic() - loaded if verified else None)

    def _send_weights(self, model: PreTrainedModel, version: int) -> int:
        """Returns the number of bytes."""
        snapshot = WeightSnapshot(model, self._dtype)
        self._load_with_restart(lambda: self.transport.load_weights(snapshot, version))
        self._verifier.expect_weights(model, snapshot)
        return snapshot.bytes

    def _send_adapter(self, adapter: dict[str, torch.Tensor], version: int) -> int:
        """Returns the number of bytes."""
        self._verifier.expect_adapter(adapter)
        self._load_with_restart(lambda: self.transport.load_adapter(adapter, version))
        return sum(tensor.nbytes for tensor in adapter.values())

    def _load_with_restart(self, load: Callable[[], None]) -> None:
        """Call `load`; if the engine dies of it, restart the engine, which loads the same again.

        An engine that has never served is not restarted: it would die again.
        """
        try:
            load()
        except (EngineDied, EngineTimeout) as error:
            if self.sync_report is None:
                raise
            self._restart(error)

    def sleep(self) -> None:
        """Free the device's memory for the update, if vLLM shares the trainer's device."""
        self.transport.sleep()

    def shutdown(self) -> None:
        """Stop vLLM for good; a thread that still samples gets an EngineError."""
        with self._exclusive():
            self._closed = True
            self.transport.close()

    def _verify_current(self) -> None:
        """Verify the weights of the current version; leaves version -1 if the engine died."""
        version, self.version = self.version, -1
        with suppress(EngineDied, EngineTimeout):  # it will be restarted with the new weights
            self._verify(version)
            self.version = version

    def _verify_until_stable(self, version: int, *, weights: bool = True) -> None:
        """Verify the loaded weights, then sample from them. An engine that dies is restarted and verified again."""
        while self.version < 0:
            try:
                self._verify(version, weights=weights)
                self.version = version
            except (EngineDied, EngineTimeout) as error:
                self._restart(error)
                weights = True

    def _verify(self, version: int, *, weights: bool = True) -> None:
        if self._verifier.due:
            self._verifier.verify(version, weights=weights)
        self.transport.reset_prefix_cache()

    # -- failures ------------------------------------------------------------------------------------------------------

    def _call_or_recover(self, call: Callable[[], None]) -> None:
        try:
            call()
        except (EngineDied, EngineTimeout) as error:
            self._recover(error)

    def _recover(self, error: EngineError) -> None:
        """Restart the engine, and submit the unfinished turns again."""
        version, self.version = self.version, -1
        self._restart(error)
        self._verify_until_stable(version)
        self._last_activity = time.monotonic()
        for session in self._sessions.values():
            if session.turn:
                self.transport.submit(session.turn)

    def _restart(self, error: EngineError) -> None:
        """Restart the engine. After MAX_RESTARTS failures in a row, raises the last one; `error` is the first."""
        while True:
            self._failures_in_row += 1
            self.restarts += 1
            self._verifier.engine_restarted()
            if self._failures_in_row > MAX_RESTARTS:
                raise error
            try:
                return self.transport.restart()
            except (EngineDied, EngineTimeout) as again:
                error = again
