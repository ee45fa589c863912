"""The backend protocol: ownership of parameters, gradients and optimizer state, and the optimizer step.

Losses of packs add up, and so do their gradients over ranks: every normaliser is already in the tokens' weights. Backends
therefore sum gradients, they never average them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from pact_fast.batch.packing import PackedBatch
from pact_fast.kernels.head.tokens import LossTokens


class Forward(Protocol):
    """A policy's forward pass, see `Policy.forward`."""

    def __call__(
        self,
        batch: PackedBatch,
        tokens: LossTokens,
        temperature: float | torch.Tensor,
        loss: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """(loss, log-probs [N], statistics), or (log-probs [N],) if `loss` is None; more with filters, see `Policy.forward`."""
        ...


class Backend(Protocol):
    """Owner of the training state.

    lockstep  forward and backward contain collectives, so every rank has to run both equally often
    sharded   each rank holds, and saves, its own part of the optimizer state
    forward   the policy's forward pass
    """

    lockstep: bool
    sharded: bool

    @property
    def forward(self) -> Forward: ...

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate the gradient of `loss`. `last`: no further backward pass precedes the next `step`."""

    def step(self, learning_rate: float) -> float:
        """Sum gradients over ranks, clip, step, clear. Returns the gradient norm before clipping.

        If the norm is not finite, the parameters keep their values.
        """
        ...

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The optimizer state for a checkpoint: ("parameter name/kind", tensor), in a fixed order.

        If it is sharded: what this rank has of it, fragments under keys of `tensor_files.fragment_key`.
        """
        ...

    def changed_by_step(self) -> Iterator[torch.Tensor]:
        """Tensors of weights and optimizer state that `step` changes in place, and nothing else changes or moves.

        A save copies them in the background until the next step; what is not among them, at once.
        """
        ...

    def load_state(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Restore the tensors of `state`. If the state is sharded, each rank reads only its part of `TensorFiles`.

        Raises:
            PactError: The saved state belongs to a model with other parameters.
        """


@runtime_checkable
class CanDiscard(Protocol):
    """A backend that can drop accumulated gradients, so that an update can be retried after running out of memory."""

    def discard(self) -> None:
        """Clear the gradients accumulated since the last step."""
