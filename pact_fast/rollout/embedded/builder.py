"""Builds the embedded engine."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from pathlib import Path

from transformers import PreTrainedModel

from pact_fast.chat.rendering import ChatRenderer
from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.model.forward import unsupported
from pact_fast.model.logit_check import Logprobs
from pact_fast.rollout.engine import Engine
from pact_fast.rollout.registry import EngineBuilder, engine


@engine("transformers")
class EmbeddedBuilder(EngineBuilder):
    """Samples with the trainer's own weights and kernels; for small models."""

    own_weights = False
    sampler_differs = False

    def check_model(self, model: PreTrainedModel) -> None:
        """The slot cache has the same limits as tree attention: full causal attention only."""
        reason = unsupported(model)
        if reason is not None:
            raise PactError(
                f"the embedded rollout engine does not serve this model ({reason}); use rollout.engine=vllm, or "
                "another model"
            )

    def logprobs(self, model: PreTrainedModel) -> Logprobs | None:
        from pact_fast.rollout.embedded.engine import engine_logprobs

        return functools.partial(engine_logprobs, model)

    def build(
        self,
        model: PreTrainedModel,
        renderer: ChatRenderer,
        *,
        folder: Path | None,
        autocast: AbstractContextManager | None,
        world: World,
    ) -> Engine:
        from pact_fast.rollout.embedded.engine import ReplicaEngine, TransformersEngine

        rollout = self.config.rollout
        partitioned = any(hasattr(p, "ds_id") for p in model.parameters())  # by ZeRO-3
        kind = ReplicaEngine if partitioned else TransformersEngine
        stop = renderer.stop_ids(rollout.stop_at_tool_call)
        return kind(model, stop, slots=rollout.max_batch_size, autocast=autocast)
