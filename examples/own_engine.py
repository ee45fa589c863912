"""A rollout engine in one file: samples tokens uniformly, to try an environment or a reward without a model.

    pact-fast train quickstart rollout.engine=examples/own_engine.py:Uniform pretrain=null

An engine takes token ids and gives token ids with their log-probabilities. `EngineBuilder` says what a run must know before
there is an engine, and builds it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pact_fast.rollout.engine import Completion, Request
from pact_fast.rollout.registry import EngineBuilder


class UniformEngine:
    """Every turn has up to 8 tokens, each drawn uniformly from the vocabulary."""

    synchronous = True  # a call of `step` finishes one step of all sessions

    def __init__(self, vocabulary: int, end_of_turn: int):
        self.vocabulary, self.end_of_turn, self.version = vocabulary, end_of_turn, 0
        self._generators: dict[int, np.random.Generator] = {}
        self._requests: list[Request] = []

    def submit(self, request: Request) -> None:
        if request.rng_key:  # the first request of a session
            self._generators[request.session] = np.random.default_rng(request.rng_key)
        self._requests.append(request)

    def step(self, timeout: float | None = None) -> list[Completion]:
        requests, self._requests = self._requests, []
        return [self._sample(request) for request in requests]

    def close(self, session: int) -> None:
        self._generators.pop(session, None)
        self._requests = [request for request in self._requests if request.session != session]

    def update_weights(self, model: Any, version: int) -> None:
        self.version = version

    def sleep(self) -> None: ...

    def shutdown(self) -> None: ...

    def _sample(self, request: Request) -> Completion:
        length = min(8, request.max_new_tokens)
        ids = self._generators[request.session].integers(self.vocabulary, size=length)
        ids[-1] = self.end_of_turn
        logprobs = np.full(length, -math.log(self.vocabulary), np.float32)
        return Completion(request.session, ids, logprobs, ended=True, version=self.version)


class Uniform(EngineBuilder):
    """Selected by `rollout.engine`."""

    own_weights = False

    def build(self, model, renderer, *, folder, autocast, world) -> UniformEngine:
        return UniformEngine(len(renderer.tokenizer), renderer.eot_id)
