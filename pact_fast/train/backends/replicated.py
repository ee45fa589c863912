"""Who holds parameters, gradients and optimizer states. This one: every process holds all of them (ZeRO-0, so to say).

Losses of packs add up, and so do their gradients over processes: every normaliser is in the tokens' weights already. So there
is nothing to average, and one sum per optimizer step is all that processes exchange.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist

from pact_fast.config import TrainerConfig
from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.model.policy import Policy

BUCKET = 64 << 20  # bytes of gradients summed at a time


class Backend(Protocol):
    """`lockstep`: every process has to run forward and backward equally often."""

    lockstep: bool

    def forward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """The policy's; see `Policy.forward`."""

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of the loss to what was added before; `last`: a step follows."""

    def step(self, learning_rate: float) -> float:
        """Sum the gradients over processes, clip, step, clear; the norm before clipping. Nothing happens to the parameters if
        the norm is not finite.
        """

    def discard(self) -> None:
        """Forget what was added since the last step."""

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What a checkpoint needs beside the model's weights, ("name of the parameter/kind", whole tensor), in a fixed order.
        Every process has to go through all of it.
        """

    def load_state(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state` gave. PactError if the model has other parameters."""


class Replicated:
    """AdamW on whole parameters."""

    lockstep = False

    def __init__(self, policy: Policy, trainer: TrainerConfig, world: World):
        self.forward, self._model, self._world = policy, policy.model, world
        self._max_norm = trainer.max_grad_norm
        self.optimizer = make_optimizer(policy.model, trainer)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        self._sum()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = float(torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._max_norm))
        if norm - norm == 0.0:  # neither infinite nor NaN
            self.optimizer.step()
        self.discard()
        return norm

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._model.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{name}/{kind}", value

    def load_state(self, saved: Mapping[str, torch.Tensor]) -> None:
        names = {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}
        entries: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        for key, value in saved.items():
            name, _, kind = key.rpartition("/")
            check_fits(name, kind, value.shape, names)
            entries.setdefault(names[name], {})[kind] = value.clone()  # updated in place
        device = next(self._model.parameters()).device
        for parameter, state in entries.items():
            self.optimizer.state[parameter] = {kind: value.to(device) for kind, value in state.items()}

    def _sum(self) -> None:
        """Gradients over all processes. A process whose packs left a parameter out counts as 0 there."""
        if self._world.size == 1:
            return
        trained = [p for p in self._model.parameters() if p.requires_grad]
        present = self._world.all_reduce_sum(torch.tensor([float(p.grad is not None) for p in trained]), "gradients")
        bucket: list[torch.Tensor] = []
        size = 0
        for parameter, count in zip(trained, present, strict=True):
            if not count:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            size += parameter.grad.nbytes
            if size >= BUCKET:
                self._sum_bucket(bucket)
                bucket, size = [], 0
        self._sum_bucket(bucket)

    def _sum_bucket(self, bucket: list[torch.Tensor]) -> None:
        if not bucket:
            return
        flat = torch.cat([grad.flatten() for grad in bucket])
        with self._world.peer_errors("gradients"):
            dist.all_reduce(flat)
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def make_optimizer(model: torch.nn.Module, trainer: TrainerConfig, **more: Any) -> torch.optim.AdamW:
    """AdamW in one pass over memory (fused), without temporaries; norms and biases are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrix = [len(getattr(p, "ds_shape", p.shape)) >= 2 for p in trained]  # ZeRO-3 leaves an empty shape
    decay = [p for p, yes in zip(trained, matrix, strict=True) if yes]
    plain = [p for p, yes in zip(trained, matrix, strict=True) if not yes]
    groups = [{"params": decay, "weight_decay": trainer.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=trainer.learning_rate,
        betas=(trainer.adam_beta1, trainer.adam_beta2),
        eps=trainer.adam_epsilon,
        fused=True,
        **more,
    )


def check_fits(name: str, kind: str, shape: torch.Size, parameters: dict[str, torch.nn.Parameter]) -> None:
    """PactError if a saved state belongs to no parameter."""
    own = parameters.get(name)
    if own is None:
        problem = f"it has a state of '{name}', which the model does not train"
    elif kind != "step" and shape != (wanted := getattr(own, "ds_shape", own.shape)):
        problem = f"'{name}' has the shape {tuple(wanted)}, its state {tuple(shape)}"
    else:
        return
    raise PactError(f"the saved optimizer does not fit the model: {problem}; resume with the run's own settings")
