"""An engine for any decoder: before every token, the model's own logits over the whole context. No cache, so for tests.

A run names it as `rollout.engine=tests/support/plain_engine.py:Plain`. A quarter of all tokens end a turn, so that models with
random weights take several short turns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from pact_fast.rollout.engine import Completion, Engine, Request

ENDS = 4  # every so manieth token ends a turn


@dataclass
class Session:
    generator: np.random.Generator
    context: list[int] = field(default_factory=list)
    request: Request | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Plain(Engine):
    """See Engine. Samples from the trainer's own parameters; one token of every session per step."""

    synchronous = True
    rewinds = True

    def __init__(self, config, model, renderer):
        self.model, self.sessions = model, {}

    def submit(self, request: Request) -> None:
        session = self.sessions.setdefault(request.session, Session(np.random.default_rng(request.rng_key)))
        if request.keep is not None:
            del session.context[request.keep :]
        session.context += request.ids.tolist()
        session.request, session.ids, session.logprobs = request, [], []

    def close(self, session: int) -> None:
        self.sessions.pop(session, None)

    def update_weights(self, model, version: int) -> None:
        self.model, self.version = model, version

    @torch.no_grad()
    def step(self, timeout: float | None = None) -> list[Completion]:
        self.model.set_attn_implementation("eager")  # updates set their own
        running = [(number, session) for number, session in self.sessions.items() if session.request]
        return [done for number, session in running if (done := self._sample(number, session))]

    def _sample(self, number: int, session: Session) -> Completion | None:
        request = session.request
        logits = self.model(torch.tensor([session.context]), use_cache=False).logits[0, -1].double()
        logp = (logits / (request.temperature or 1.0)).log_softmax(-1)
        p = logp.exp().numpy()
        token = int(session.generator.choice(len(p), p=p / p.sum()) if request.temperature else p.argmax())
        for one in (session.ids, session.context):
            one.append(token)
        session.logprobs.append(float(logp[token]))
        ended = token % ENDS == 0
        if not ended and len(session.ids) < request.max_new_tokens:
            return None
        session.request = None
        ids, logprobs = np.array(session.ids, np.int64), np.array(session.logprobs, np.float32)
        return Completion(number, ids, logprobs, ended, self.version)
