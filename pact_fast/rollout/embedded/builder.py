"""Builds the embedded engine."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from pathlib import Path

from transformers import PreTrainedModel

from pact_fast.chat.rendering import ChatRenderer
from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.model.forward import decoder_of, layer_kinds
from pact_fast.model.logit_check import Logprobs
from pact_fast.rollout.engine import Engine
from pact_fast.rollout.registry import EngineBuilder, engine

SINKS = (".sinks", ".attention_sink_bias")  # how models name the parameters


@engine("transformers")
class EmbeddedBuilder(EngineBuilder):
    """Samples with the trainer's own weights and kernels; for small models."""

    own_weights = False
    sampler_differs = False

    def check_model(self, model: PreTrainedModel) -> None:
        """The slot cache holds keys and values of full causal attention only."""
        reason = unserved(model)
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


def unserved(model: PreTrainedModel) -> str | None:
    """The reason why the embedded engine does not serve a model; None if it does."""
    config = model.config.get_text_config()
    kinds = set(layer_kinds(config)) - {"full_attention"}
    if kinds:
        return f"{config.model_type}: needs full attention in every layer, found {', '.join(sorted(kinds))}"
    if not model._supports_attention_backend:
        return f"{config.model_type}: its transformers code does not take an attention function"
    if not layer_kinds(config) and getattr(config, "sliding_window", None):
        return f"{config.model_type}: attends to a window of {config.sliding_window} tokens"
    if getattr(config, "attn_logit_softcapping", None):
        return f"{config.model_type}: soft-caps its attention scores"
    if any(name.endswith(SINKS) for name, _ in decoder_of(model).named_parameters()):
        return f"{config.model_type}: has attention sinks"
    return None
