"""The embedded engine: continuous batching on a transformers model in this process.

Every running session feeds one token per step: the token it has just sampled, or the next token of the text appended to its
context. So turns need no barrier, and a tool's answer enters while the other sessions go on sampling. Long texts are
prefilled in one forward; sessions that start with the same prompt share that forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from pact_fast.model.adapter import ADAPTER_NAME, adapted_layers
from pact_fast.model.weights import base_parameters, gathered
from pact_fast.rollout.embedded.slot_cache import SlotCache, forward
from pact_fast.rollout.engine import Completion, Request

PREFILL_FROM = 24  # shorter texts ride along with the decode steps of the others


@dataclass
class _Session:
    id: int
    slot: int
    generator: np.random.Generator
    length: int = 0  # tokens in the cache
    pending: deque[int] = field(default_factory=deque)  # tokens to feed before sampling goes on
    request: Request | None = None  # None: waiting for its next turn
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TransformersEngine:
    """See Engine. `eot_ids` end a turn; `slots` sessions run at once, further ones queue."""

    synchronous = True

    def __init__(
        self,
        model: PreTrainedModel,
        eot_ids: Iterable[int],
        *,
        slots: int = 128,
        autocast: AbstractContextManager | None = None,
    ):
        self.model, self.version = model, 0
        self._eot = frozenset(eot_ids)
        self._device = next(model.parameters()).device
        self._cache = SlotCache(slots)
        self._slots: list[_Session] = []  # session of slot i; always dense
        self._sessions: dict[int, _Session] = {}
        self._queue: deque[Request] = deque()
        self._autocast = autocast or nullcontext()

    def submit(self, request: Request) -> None:
        session = self._sessions.get(request.session)
        if session is None:
            self._queue.append(request)
            return
        self._assign(session, request)

    def close(self, session: int) -> None:
        gone = self._sessions.pop(session, None)
        if gone is None:
            self._queue = deque(r for r in self._queue if r.session != session)
            return
        last = self._slots.pop()
        if last is not gone:  # keep the slots dense: the last one moves into the hole
            self._cache.copy(last.slot, torch.tensor([gone.slot], device=self._device))
            last.slot = gone.slot
            self._slots[gone.slot] = last

    def update_weights(self, model: PreTrainedModel, version: int) -> None:
        self.version = version  # they are the trainer's own

    def sleep(self) -> None: ...

    def shutdown(self) -> None: ...

    @torch.inference_mode()
    def step(self, timeout: float | None = None) -> list[Completion]:
        with self._autocast:
            self._admit()
            self._prefill([s for s in self._slots if s.request and len(s.pending) > PREFILL_FROM])
            return self._decode()

    def _assign(self, session: _Session, request: Request) -> None:
        session.request = request
        session.pending.extend(request.ids.tolist())
        session.ids, session.logprobs = [], []

    def _admit(self) -> None:
        """Give free slots to queued sessions; equal prompts are computed once and copied."""
        new: list[_Session] = []
        while self._queue and len(self._slots) < self._cache.slots:
            request = self._queue.popleft()
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(request.rng_key)))
            session = _Session(request.session, len(self._slots), generator)
            self._assign(session, request)
            self._slots.append(session)
            self._sessions[session.id] = session
            new.append(session)
        first: dict[bytes, _Session] = {}
        twins: list[tuple[_Session, _Session]] = []
        for session in new:
            assert session.request is not None
            twin = first.setdefault(session.request.ids.tobytes(), session)
            if twin is not session:
                twins.append((session, twin))
        self._prefill(list(first.values()))
        for twin in first.values():
            slots = [session.slot for session, other in twins if other is twin]
            if slots:
                self._cache.copy(twin.slot, torch.tensor(slots, device=self._device))
        for session, twin in twins:
            session.length, session.pending = twin.length, deque(twin.pending)

    def _prefill(self, sessions: list[_Session]) -> None:
        """Feed all pending tokens but the last, which the next decode step feeds in order to sample after it."""
        sessions = [s for s in sessions if len(s.pending) > 1]
        if not sessions:
            return
        counts = [len(s.pending) - 1 for s in sessions]
        width = max(counts)
        ids = np.zeros((len(sessions), width), dtype=np.int64)
        positions = np.zeros_like(ids)
        for row, (session, count) in enumerate(zip(sessions, counts, strict=True)):
            ids[row, :count] = [session.pending.popleft() for _ in range(count)]
            # padding lands behind the row's end, where later tokens overwrite it
            positions[row] = session.length + np.arange(width)
            session.length += count
        rows = torch.tensor([s.slot for s in sessions], device=self._device)
        forward(self.model, self._cache, rows, self._tensor(ids), self._tensor(positions))

    def _decode(self) -> list[Completion]:
        if not any(s.request for s in self._slots):
            return []
        # a session that waits for its tools repeats its place with token 0; the real token overwrites it later
        ids = np.array([s.pending[0] if s.request else 0 for s in self._slots], dtype=np.int64)
        positions = np.array([s.length for s in self._slots], dtype=np.int64)
        hidden = forward(
            self.model,
            self._cache,
            slice(0, len(self._slots)),
            self._tensor(ids)[:, None],
            self._tensor(positions)[:, None],
        )
        sampling: list[_Session] = []
        for session in self._slots:
            if session.request:
                session.pending.popleft()
                session.length += 1
                if not session.pending:
                    sampling.append(session)
        if not sampling:
            return []
        rows = torch.tensor([s.slot for s in sampling], device=self._device)
        head = self.model.get_output_embeddings()
        tokens, logprobs = self._sample(head(hidden[rows, 0]).float(), sampling)
        return [done for s, t, p in zip(sampling, tokens, logprobs, strict=True) if (done := self._append(s, t, p))]

    def _sample(self, logits: torch.Tensor, sessions: list[_Session]) -> tuple[list[int], list[float]]:
        """Inverse-CDF sampling with one uniform number per session and token."""
        temperatures = [s.request.temperature for s in sessions if s.request]
        scale = torch.tensor([t or 1.0 for t in temperatures], device=logits.device)
        logp = torch.log_softmax(logits / scale[:, None], -1)
        cdf = logp.double().exp().cumsum(-1)
        uniform = torch.tensor([s.generator.random() for s in sessions], dtype=torch.float64, device=logits.device)
        tokens = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0].clamp_(
            max=logits.shape[1] - 1
        )
        greedy = torch.tensor([t == 0 for t in temperatures], device=logits.device)
        tokens = torch.where(greedy, logits.argmax(-1), tokens)
        return tokens.tolist(), logp.gather(1, tokens[:, None])[:, 0].tolist()

    def _append(self, session: _Session, token: int, logprob: float) -> Completion | None:
        session.ids.append(token)
        session.logprobs.append(logprob)
        session.pending.append(token)
        assert session.request is not None
        ended = token in self._eot
        if not ended and len(session.ids) < session.request.max_new_tokens:
            return None
        session.request = None
        ids, logprobs = np.array(session.ids, np.int64), np.array(session.logprobs, np.float32)
        return Completion(session.id, ids, logprobs, ended, self.version)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


class ReplicaEngine(TransformersEngine):
    """For a model that ZeRO-3 has split: the engine has a whole copy, adapters merged, which updates refresh tensor by tensor.

    So processes can sample as many steps as each needs. It is meant for models of which a device can hold a copy.
    """

    def __init__(self, model: PreTrainedModel, eot_ids: Iterable[int], **settings):
        copy = torch.nn.Module.to(type(model)(model.config), model.device, model.dtype)
        copy.eval().requires_grad_(False)
        super().__init__(copy, eot_ids, **settings)

    @torch.no_grad()
    def update_weights(self, model: PreTrainedModel, version: int) -> None:
        own = dict(self.model.named_parameters())
        for name, parameter in base_parameters(model):
            with gathered([parameter]):
                own[name].copy_(parameter)
        for name, layer in adapted_layers(model):
            with gathered(layer.parameters()):
                own[f"{name}.weight"].add_(layer.get_delta_weight(ADAPTER_NAME))
        super().update_weights(model, version)
