"""The engine of a rank that samples nothing itself."""

from __future__ import annotations

from transformers import PreTrainedModel

from pact_fast.model.adapter import adapter_tensors
from pact_fast.model.weights import checkpoint_weights
from pact_fast.rollout.engine import Completion, Engine, Request


class NullEngine(Engine):
    """See Engine. It only takes part in collectives: under ZeRO-3 all ranks gather weights that any rank sends."""

    applies_filters = rewinds = True  # it samples nothing

    def submit(self, request: Request) -> None:
        raise RuntimeError("this rank has no engine (EngineBuilder.engine_ranks)")

    def step(self, timeout: float | None = None) -> list[Completion]:
        return []

    def close(self, session: int) -> None: ...

    def update_weights(self, model: PreTrainedModel, version: int) -> None:
        adapter = adapter_tensors(model)
        if any(hasattr(p, "ds_id") for p in model.parameters()) and (self.version < 0 or not adapter):
            for _ in checkpoint_weights(model):
                pass
        self.version = version
