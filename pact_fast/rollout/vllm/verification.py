"""Compares the weights that vLLM's workers compute with against those that were sent."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from pact_fast.model.weights import (
    ExpectedWeights,
    WeightMismatch,
    WeightShard,
    WeightSnapshot,
    shape_and_fingerprint,
    tied_head,
    verify,
)
from pact_fast.rollout.vllm.transport import VllmTransport

log = logging.getLogger(__name__)


class WeightVerifier:
    """Keeps the fingerprints of the weights that were sent last, and compares them with the workers' reports.

    Args:
        transport: Where vLLM runs.
        when: rollout.verify_weights.

    Attributes:
        verified: Whether anything was verified since the engine has started.
    """

    def __init__(self, transport: VllmTransport, when: str = "always"):
        self._transport, self._when = transport, when
        self.verified = False
        if when == "never":
            log.warning(
                "rollout.verify_weights=never: whether %s computes with the trainer's weights is not checked",
                transport.name,
            )
        self._weights: ExpectedWeights = {}
        self._adapter: ExpectedWeights = {}  # empty without LoRA

    @property
    def due(self) -> bool:
        """Whether the setting asks for a comparison now."""
        return self._when == "always" or (self._when == "first" and not self.verified)

    def engine_restarted(self) -> None:
        """Note that the engine has lost its verified weights."""
        self.verified = False

    def expect_weights(self, model: PreTrainedModel, snapshot: WeightSnapshot) -> None:
        """`snapshot` of `model` was sent. A head tied to the embedding must be equal to it."""
        self._weights = dict(snapshot.expected)
        tied = tied_head(model)
        if tied and tied[1] in self._weights:
            self._weights[tied[0]] = self._weights[tied[1]]

    def expect_adapter(self, adapter: dict[str, torch.Tensor]) -> None:
        """`adapter` is sent."""
        self._adapter = {name: shape_and_fingerprint(tensor) for name, tensor in adapter.items()}

    def verify(self, version: int, *, weights: bool = True) -> None:
        """Compare the adapter, if there is one, and, if `weights`, the weights (under it).

        Raises:
            WeightMismatch: The engine's weights differ from those that were sent, or have another version.
        """
        if self._adapter:
            shards = self._of_version(version, self._transport.report_adapter())
            # vLLM has buffers for layers without an adapter as well, which are zero
            verify(self._adapter, [s for s in shards if s.name in self._adapter or s.fingerprint])
        if weights:
            self._verify_weights(self._of_version(version, self._transport.report_weights()))
        self.verified = True

    def _of_version(self, version: int, report: tuple[int, list[WeightShard]]) -> list[WeightShard]:
        found, shards = report
        if found != version:
            raise WeightMismatch(
                f"{self._transport.name}: it answers with weights of version {found}, the trainer has sent {version}; "
                "another trainer may be using this server"
            )
        return shards

    def _verify_weights(self, shards: list[WeightShard]) -> None:
        expected = dict(self._weights)
        reported = {shard.name for shard in shards}
        for name in [n for n in expected if n not in reported and self._is_tied_copy(n)]:
            del expected[name]  # the engine uses the embedding itself as head
        verify(expected, shards)

    def _is_tied_copy(self, name: str) -> bool:
        return name == "lm_head.weight" and self._weights[name] in [
            value for other, value in self._weights.items() if other != name
        ]
