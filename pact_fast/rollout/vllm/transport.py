"""The interface between VllmEngine and a running vLLM, in this process or another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from pact_fast.config.filters import UNFILTERED, SamplingFilters
from pact_fast.model.weights import WeightShard, WeightSnapshot


@dataclass(frozen=True)
class TurnRequest:
    """One turn to generate, with the ids of its whole context.

    key          unique to this request
    ids          the context
    max_tokens   most tokens to sample
    temperature  0 is greedy
    seed         of the sampling
    stop         token ids that end the turn
    version      of the weights that sample it
    filters      which tokens may be sampled; vLLM ignores them where greedy
    """

    key: str
    ids: list[int]
    max_tokens: int
    temperature: float
    seed: int
    stop: list[int]
    version: int
    filters: SamplingFilters = UNFILTERED


@dataclass(frozen=True)
class TurnOutput:
    """A finished turn: sampled ids and their log-probs.

    cached  tokens of the context that vLLM found in its prefix cache; None if it does not report it
    """

    key: str
    ids: list[int]
    logprobs: list[float]
    cached: int | None = None


class VllmTransport(Protocol):
    """A vLLM in this process, in a process that we start, or behind a URL. Failures are EngineErrors.

    name         for messages
    synchronous  True: `poll` is one step of the engine, so that counting calls is a clock
    """

    name: str
    synchronous: bool

    def submit(self, turn: TurnRequest) -> None: ...

    def poll(self, timeout: float) -> list[TurnOutput]:
        """Turns that finished; waits at most `timeout` seconds for one (synchronous: makes one step)."""

    def abort(self, keys: list[str]) -> None: ...

    def load_weights(self, weights: WeightSnapshot, version: int) -> None:
        """Load these weights; nothing is being generated meanwhile.

        The iterator is always exhausted, even on failure: under ZeRO-3 gathering is a collective.
        """

    def load_adapter(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        """Load this adapter under a name of its own, and use it for every turn from now on."""

    def restart(self) -> None:
        """Restart the engine if it is ours, else reconnect, and load the last weights again.

        Raises:
            WeightsUnavailable: That version of the weights no longer exists.
        """

    def report_weights(self) -> tuple[int, list[WeightShard]]:
        """(version, fingerprints) of the weights in use, from all workers."""

    def report_adapter(self) -> tuple[int, list[WeightShard]]:
        """(version, fingerprints) of the adapter in use, from all workers."""

    def reset_prefix_cache(self) -> None: ...

    def sleep(self) -> None:
        """Free device memory, where vLLM shares the trainer's device."""

    def wake(self) -> None: ...

    def close(self) -> None: ...
