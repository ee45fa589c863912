"""The registry of rollout engines, and the engine that a configuration asks for."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from transformers import PreTrainedModel

from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import Config
from pact_fast.distributed.world import World
from pact_fast.registry import Registry
from pact_fast.rollout.engine import Engine
from pact_fast.rollout.null_engine import NullEngine


class EngineBuilder:
    """Builds an engine, and answers what a run, its checks and its estimates must know before there is one.

    own_weights      it holds a copy of the weights, which has to be sent and can be verified
    sampler_differs  its log-probs differ from the trainer's (other kernels, older weights), so importance weights apply
    """

    own_weights = True
    sampler_differs = True

    def __init__(self, config: Config):
        self.config = config

    def samplers(self, world: World) -> list[int]:
        """Ranks that have an engine."""
        return list(range(world.size))

    def check_model(self, model: PreTrainedModel) -> None:
        """PactError if the engine cannot serve the model."""

    def memory_fraction(self) -> float:
        """Fraction of the trainer's device that the engine holds during an update."""
        return 0.0

    def shares_device(self) -> bool:
        """Whether it runs on the trainer's device."""
        return True

    def devices(self) -> int:
        """Devices of one copy of the model."""
        return 1

    def build(
        self,
        model: PreTrainedModel,
        renderer: ChatRenderer,
        *,
        folder: Path | None,
        autocast: AbstractContextManager | None,
        world: World,
    ) -> Engine:
        """The engine of this rank.

        Args:
            model: The trainer's model.
            renderer: For stop tokens, and the tokenizer.
            folder: The run directory, for files and logs of the engine; None: a temporary one.
            autocast: Precision context of the trainer's forward pass.
            world: All ranks.
        """
        raise NotImplementedError


engine: Registry[type[EngineBuilder]] = Registry("engine", "rollout.engine", "pact_fast.rollout", base=EngineBuilder)


def engine_builder(config: Config) -> EngineBuilder:
    """The builder that `rollout.engine` names. PactError if there is none."""
    return engine.get(config.rollout.engine)(config)


def make_engine(
    config: Config,
    model: PreTrainedModel,
    renderer: ChatRenderer,
    *,
    folder: Path | None = None,
    autocast: AbstractContextManager | None = None,
    world: World | None = None,
) -> Engine:
    """The engine of this rank, or a NullEngine where it has none. Arguments: see `EngineBuilder.build`."""
    builder, world = engine_builder(config), world or World()
    if world.rank not in builder.samplers(world):
        return NullEngine()
    builder.check_model(model)
    return builder.build(model, renderer, folder=folder, autocast=autocast, world=world)
