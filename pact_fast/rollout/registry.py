"""The registry of rollout engines, and the engine that a configuration asks for.

An engine is registered as the engine's own class, or as an EngineBuilder where something has to be known before there
is an engine (ranks, devices, memory), or where the configuration decides which class it is:

    @engine("mine")                      # or rollout.engine=my_engine.py:MyEngine, from outside the package
    class MyEngine(Engine):
        def __init__(self, config, model, renderer): ...
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import Config
from pact_fast.distributed.world import World
from pact_fast.model.logit_check import Logprobs
from pact_fast.registry import Registry
from pact_fast.rollout.engine import Engine
from pact_fast.rollout.null_engine import NullEngine


class EngineBuilder:
    """Builder of an engine; it answers questions of a run, its checks and estimates before the engine exists.

    own_weights      True: it holds a copy of the weights, which has to be sent after every update; `pact-fast doctor`
                     tries such an engine. False: it samples from the trainer's own parameters
    sampler_differs  True: its log-probs differ from the trainer's (other kernels, older weights), so importance
                     weights apply
    """

    own_weights = True
    sampler_differs = True

    def __init__(self, config: Config):
        self.config = config

    def engine_ranks(self, world: World) -> list[int]:
        """Ranks that have an engine, ascending; default: all."""
        return list(range(world.size))

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise a PactError if the engine cannot serve the model."""

    def logprobs(self, model: PreTrainedModel) -> Logprobs | None:
        """The engine's log-probs for `pact_fast.model.logit_check`; None if it does not run in this process."""
        return None

    def memory_fraction(self) -> float:
        """Fraction of the trainer's device memory, 0 to 1, that the engine holds during an update."""
        return 0.0

    def shares_device(self) -> bool:
        """True if it runs on the trainer's device."""
        return True

    def devices_per_engine(self) -> int:
        """Devices that hold one copy of the model."""
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


EngineClass = Callable[[Config, PreTrainedModel, ChatRenderer], Engine]


class PlainEngineBuilder(EngineBuilder):
    """The builder of an engine class that is registered by itself: one engine on every rank, all properties default."""

    def __init__(self, config: Config, engine_class: EngineClass):
        super().__init__(config)
        self._engine_class = engine_class

    def build(
        self,
        model: PreTrainedModel,
        renderer: ChatRenderer,
        *,
        folder: Path | None,
        autocast: AbstractContextManager | None,
        world: World,
    ) -> Engine:
        return self._engine_class(self.config, model, renderer)


engine: Registry[Any] = Registry(
    "engine", "rollout.engine", "pact_fast.rollout"
)  # → an EngineBuilder class, or an EngineClass


def engine_builder(config: Config) -> EngineBuilder:
    """The builder of the engine that `rollout.engine` names.

    Raises:
        PactError: No engine has this name (names the nearest), or its file or class cannot be loaded.
    """
    found = engine.get(config.rollout.engine)
    if isinstance(found, type) and issubclass(found, EngineBuilder):
        return found(config)
    return PlainEngineBuilder(config, found)


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
    if world.rank not in builder.engine_ranks(world):
        return NullEngine()
    builder.check_model(model)
    return builder.build(model, renderer, folder=folder, autocast=autocast, world=world)
