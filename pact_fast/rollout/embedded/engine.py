"""The embedded engine: continuous batching on a transformers model in this process.

Every running session feeds one token per step: the token it has just sampled, or the next token of the text appended to
its context. Turns therefore need no barrier, and an observation is fed while the other sessions continue sampling. Long
texts are prefilled, many tokens per forward pass; sessions that start with the same prompt share it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from pact_fast.config.filters import SamplingFilters
from pact_fast.kernels.decoder import sampling
from pact_fast.model.adapter import ADAPTER_NAME, adapted_layers
from pact_fast.model.device import release_memory
from pact_fast.model.filters import filtered
from pact_fast.model.head import head_layer, logit_transform
from pact_fast.model.inference import linear
from pact_fast.model.recognition import is_plain_linear
from pact_fast.model.weights import base_parameters, gathered
from pact_fast.rollout.embedded.inverse_cdf import inverse_cdf
from pact_fast.rollout.embedded.slot_cache import SlotCache, Text, forward_with
from pact_fast.rollout.engine import Completion, Engine, Request

MIN_PREFILL_TOKENS = 24  # shorter texts are fed token by token in the decode steps
PREFILL_TOKENS = 4096  # of one forward pass, at most, which bounds its activations


@dataclass
class _Session:
    """A session in a slot of the cache, and its turn under way."""

    id: int
    slot: int
    generator: np.random.Generator
    length: int = 0  # tokens in the cache
    pending: deque[int] = field(default_factory=deque)  # tokens to feed before sampling continues
    request: Request | None = None  # None: waiting for its next turn
    filters: SamplingFilters | None = None  # None: every token may be sampled
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TransformersEngine(Engine):
    """See Engine.

    Args:
        model: The training model; its parameters are used in place.
        eot_ids: Tokens that end a turn.
        slots: Sessions that run at once; further ones queue.
        autocast: Precision context of the forward pass.
    """

    name = "the embedded engine"
    synchronous = True
    applies_filters = True
    rewinds = True

    def __init__(
        self,
        model: PreTrainedModel,
        eot_ids: Iterable[int],
        *,
        slots: int = 128,
        autocast: AbstractContextManager | None = None,
    ):
        self.model, self.version = model, 0
        self._eot_ids = frozenset(eot_ids)
        self._device = next(model.parameters()).device
        self._forward, self._logits = forward_with(model), logits_of(model)
        self._cache = SlotCache(slots)
        self._slots: list[_Session] = []  # session of slot i; no slot between is empty
        self._sessions: dict[int, _Session] = {}
        self._queue: deque[Request] = deque()
        self._autocast = autocast or nullcontext()

    def submit(self, request: Request) -> None:
        session = self._sessions.get(request.session)
        if session is None:
            self._queue.append(request)
            return
        if request.keep is not None:
            _rewind(session, request.keep)
        self._assign(session, request)

    def close(self, session: int) -> None:
        closed = self._sessions.pop(session, None)
        if closed is None:
            self._queue = deque(r for r in self._queue if r.session != session)
            return
        last = self._slots.pop()
        if last is not closed:  # keep the slots dense: the last one moves into the freed slot
            self._cache.copy(last.slot, [closed.slot], last.length)
            last.slot = closed.slot
            self._slots[closed.slot] = last
        if not self._sessions and not self._queue:  # the update needs the memory
            self._cache.clear()
            release_memory()

    def update_weights(self, model: PreTrainedModel, version: int) -> None:
        self.version = version  # it samples from the trainer's own parameters

    @torch.inference_mode()
    def step(self, timeout: float | None = None) -> list[Completion]:
        with self._autocast:
            self._admit()
            self._prefill([s for s in self._slots if s.request and len(s.pending) > MIN_PREFILL_TOKENS])
            return self._decode()

    def _assign(self, session: _Session, request: Request) -> None:
        session.request = request
        session.filters = request.filters if request.filters and request.temperature else None
        session.pending.extend(request.ids.tolist())
        session.ids, session.logprobs = [], []

    def _admit(self) -> None:
        """Give free slots to queued sessions. Equal prompts are computed once, and their cache is copied."""
        new: list[_Session] = []
        while self._queue and len(self._slots) < self._cache.slots:
            request = self._queue.popleft()
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(request.rng_key)))
            session = _Session(request.session, len(self._slots), generator)
            self._assign(session, request)
            self._slots.append(session)
            self._sessions[session.id] = session
            new.append(session)
        first: dict[bytes, _Session] = {}  # by prompt
        duplicates: list[tuple[_Session, _Session]] = []  # (session, the one that computes its prompt)
        for session in new:
            assert session.request is not None
            source = first.setdefault(session.request.ids.tobytes(), session)
            if source is not session:
                duplicates.append((session, source))
        self._prefill(list(first.values()))
        for source in first.values():
            slots = [session.slot for session, other in duplicates if other is source]
            if slots:
                self._cache.copy(source.slot, slots, source.length)
        for session, source in duplicates:
            session.length, session.pending = source.length, deque(source.pending)

    def _prefill(self, sessions: list[_Session]) -> None:
        """Feed all pending tokens but the last, which the next decode step feeds to sample the token after it.

        A forward pass takes at most PREFILL_TOKENS tokens: of several texts, or a part of a long one.
        """
        waiting = deque(s for s in sessions if len(s.pending) > 1)
        while waiting:
            batch: list[tuple[_Session, int]] = []  # with the number of tokens to feed
            room = PREFILL_TOKENS
            while waiting and room:
                session = waiting[0]
                count = min(len(session.pending) - 1, room)
                batch.append((session, count))
                room -= count
                if count < len(session.pending) - 1:
                    break
                waiting.popleft()
            self._feed_texts(batch)

    def _feed_texts(self, batch: list[tuple[_Session, int]]) -> None:
        """One forward pass over the next pending tokens of each session."""
        ids = np.array([s.pending.popleft() for s, count in batch for _ in range(count)], dtype=np.int64)
        texts = [Text(s.slot, s.length, count) for s, count in batch]
        slots = np.repeat([text.slot for text in texts], [text.tokens for text in texts])
        positions = np.concatenate([np.arange(text.start, text.start + text.tokens) for text in texts])
        for session, count in batch:
            session.length += count
        self._forward(self._cache, self._tensor(slots), self._tensor(ids), self._tensor(positions), texts)

    def _decode(self) -> list[Completion]:
        """One token of every running session; returns the turns that it finished."""
        running = [s for s in self._slots if s.request]
        if not running:
            return []
        # A padded batch takes all slots, or it would have to copy those that run. A session that waits for its tools
        # then feeds token 0 at its next position; the real token overwrites it later.
        fed = running if self._cache.any_slots else self._slots
        hidden = self._forward(
            self._cache,
            self._tensor(np.array([s.slot for s in fed], dtype=np.int64)),
            self._tensor(np.array([s.pending[0] if s.request else 0 for s in fed], dtype=np.int64)),
            self._tensor(np.array([s.length for s in fed], dtype=np.int64)),
            None,
        )
        sampling: list[_Session] = []
        rows: list[int] = []
        for row, session in enumerate(fed):
            if session.request:
                session.pending.popleft()
                session.length += 1
                if not session.pending:
                    sampling.append(session)
                    rows.append(row)
        if not sampling:
            return []
        if len(rows) < len(fed):
            hidden = hidden[torch.tensor(rows, device=self._device)]
        tokens, logprobs = self._sample(self._logits(hidden), sampling)
        return [done for s, t, p in zip(sampling, tokens, logprobs, strict=True) if (done := self._append(s, t, p))]

    def _sample(self, logits: torch.Tensor, sessions: list[_Session]) -> tuple[list[int], list[float]]:
        """Inverse-CDF sampling with one uniform variate per session and token; returns tokens and their log-probs."""
        temperatures = [s.request.temperature for s in sessions if s.request]
        uniform = torch.tensor([s.generator.random() for s in sessions], dtype=torch.float64, device=logits.device)
        filters = [s.filters for s in sessions]
        if not any(filters) and sampling.serves(logits):
            drawn, logprobs = sampling.sample(logits, torch.tensor(temperatures, dtype=torch.float32), uniform)
            return drawn.tolist(), logprobs.tolist()
        scale = torch.tensor([t or 1.0 for t in temperatures], device=logits.device)
        logp = torch.log_softmax(logits / scale[:, None], -1)
        if any(filters):
            logp = _filter(logp, filters)
        tokens = inverse_cdf(logp, uniform)
        greedy = torch.tensor([t == 0 for t in temperatures], device=logits.device)
        tokens = torch.where(greedy, logits.argmax(-1), tokens)
        return tokens.tolist(), logp.gather(1, tokens[:, None])[:, 0].tolist()

    def _append(self, session: _Session, token: int, logprob: float) -> Completion | None:
        """Add a sampled token; returns the turn if this token ends it."""
        session.ids.append(token)
        session.logprobs.append(logprob)
        session.pending.append(token)
        assert session.request is not None
        ended = token in self._eot_ids
        if not ended and len(session.ids) < session.request.max_new_tokens:
            return None
        session.request = None
        ids, logprobs = np.array(session.ids, np.int64), np.array(session.logprobs, np.float32)
        return Completion(session.id, ids, logprobs, ended, self.version)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _rewind(session: _Session, keep: int) -> None:
    """Forget all but the first `keep` tokens of the context. Keys and values behind them are overwritten in time."""
    fed = min(session.length, keep)
    session.pending = deque(list(session.pending)[: keep - session.length] if keep > session.length else ())
    session.length = fed


def _filter(logp: torch.Tensor, filters: list[SamplingFilters | None]) -> torch.Tensor:
    """Log-probs [n, V], normalised over the tokens that the filters of each row keep; −inf for the other tokens."""
    kinds = {kind for kind in filters if kind}
    if len(kinds) == 1 and None not in filters:
        return torch.log_softmax(filtered(logp, kinds.pop()), -1)
    for kind in kinds:
        rows = torch.tensor([f == kind for f in filters], device=logp.device)
        logp[rows] = torch.log_softmax(filtered(logp[rows], kind), -1)
    return logp


def logits_of(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from hidden states [..., D] to the model's logits, fp32 [..., V]."""
    head, transform = head_layer(model), logit_transform(model)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        x = transform.hidden(hidden)
        # logits rounded to bf16 would cost 0.03 nats of log-prob
        z = linear(x, head.weight, None, torch.float32) if is_plain_linear(head) else head(x).float()
        return transform.logits(z)

    return logits


@torch.inference_mode()
def engine_logprobs(
    model: PreTrainedModel, ids: torch.Tensor, targets: torch.Tensor, autocast: AbstractContextManager
) -> torch.Tensor:
    """Log-probs as the engine computes them: a text, then token by token.

    Args:
        model: The model.
        ids: int64 [b, n], b sequences.
        targets: int64 [b, n, K], tokens after each position.
        autocast: Precision context of the forward pass.

    Returns:
        fp32 [b, n, K].
    """
    b, n = ids.shape
    cache, text, forward = SlotCache(b), n // 2, forward_with(model)
    slots = torch.arange(b, device=ids.device)
    with autocast:
        texts = [Text(slot, 0, text) for slot in range(b)]
        at = torch.arange(text, device=ids.device)
        parts = [forward(cache, slots.repeat_interleave(text), ids[:, :text].flatten(), at.repeat(b), texts)]
        parts = [parts[0].view(b, text, -1)]
        for i in range(text, n):
            parts.append(forward(cache, slots, ids[:, i], torch.full_like(slots, i), None)[:, None])
        logits = logits_of(model)(torch.cat(parts, 1))
    return torch.log_softmax(logits, -1).gather(-1, targets)


class ReplicaEngine(TransformersEngine):
    """For a model that ZeRO-3 has partitioned: the engine holds a whole copy, with adapters merged.

    Forward passes of a partitioned model are collectives; with a copy, every rank can make as many steps as it needs.
    An update refreshes the copy tensor by tensor. For models of which one device can hold a copy.
    """

    def __init__(self, model: PreTrainedModel, eot_ids: Iterable[int], **settings: Any):
        copy = torch.nn.Module.to(type(model)(model.config), model.device, model.dtype)
        copy.eval().requires_grad_(False)
        super().__init__(copy, eot_ids, **settings)

    @torch.no_grad()
    def update_weights(self, model: PreTrainedModel, version: int) -> None:
        copies = dict(self.model.named_parameters())
        for name, parameter in base_parameters(model):
            with gathered([parameter]):
                copies[name].copy_(parameter)
        for name, layer in adapted_layers(model):
            with gathered(layer.parameters()):
                copies[f"{name}.weight"].add_(layer.get_delta_weight(ADAPTER_NAME))
        super().update_weights(model, version)
