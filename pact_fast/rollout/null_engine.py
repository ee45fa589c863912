"""In place of an engine, for a training process that samples nothing itself."""

from __future__ import annotations

from transformers import PreTrainedModel

from pact_fast.model.adapter import adapter_tensors
from pact_fast.model.weights import checkpoint_weights
from pact_fast.rollout.engine import Completion, Request


class NullEngine:
    """See Engine. Under ZeRO-3, weights that go to another process's engine are gathered by all."""

    synchronous = False

    def __init__(self) -> None:
        self.version = -1

    def submit(self, request: Request) -> None:
        raise RuntimeError("this process has no engine")

    def step(self, timeout: float | None = None) -> list[Completion]:
        return []

    def close(self, session: int) -> None: ...

    def update_weights(self, model: PreTrainedModel, version: int) -> None:
        adapter = adapter_tensors(model)
        if any(hasattr(p, "ds_id") for p in model.parameters()) and (self.version < 0 or not adapter):
            for _ in checkpoint_weights(model):
                pass
        self.version = version

    def sleep(self) -> None: ...

    def shutdown(self) -> None: ...
