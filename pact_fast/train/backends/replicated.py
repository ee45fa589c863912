"""`Replicated`: every rank holds full parameters, gradients and optimizer state (ZeRO-0).

Ranks communicate once per optimizer step: an all-reduce sum of the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from pact_fast.config import TrainerConfig
from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.model.policy import Policy
from pact_fast.train.backends.base import Forward

BUCKET = 64 << 20  # bytes of gradients per all-reduce


class Replicated:
    """Fused AdamW on full parameters; a `Backend` that can discard gradients."""

    lockstep = sharded = False

    def __init__(self, policy: Policy, trainer: TrainerConfig, world: World):
        self.forward: Forward = policy
        self.model, self._world = policy.model, world
        self._max_norm = trainer.max_grad_norm
        self.optimizer = make_optimizer(policy.model, trainer)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        self.reduce_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._max_norm))
        if math.isfinite(norm):
            self.optimizer.step()
        self.discard()
        return norm

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{name}/{kind}", value

    def changed_by_step(self) -> Iterator[torch.Tensor]:
        yield from self.model.parameters()
        for state in self.optimizer.state.values():
            yield from state.values()

    def load_state(self, saved: Mapping[str, torch.Tensor]) -> None:
        names = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        entries: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        for key, value in saved.items():
            name, _, kind = key.rpartition("/")
            check_fits(name, kind, value.shape, names)
            entries.setdefault(names[name], {})[kind] = value.clone()  # the optimizer updates it in place
        device = next(self.model.parameters()).device
        for parameter, state in entries.items():
            self.optimizer.state[parameter] = {kind: value.to(device) for kind, value in state.items()}

    def reduce_gradients(self) -> None:
        """Sum gradients over ranks, in buckets. A rank whose packs left a parameter out contributes zeros to it."""
        if self._world.size == 1:
            return
        trained = [p for p in self.model.parameters() if p.requires_grad]
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
                self._reduce_bucket(bucket)
                bucket, size = [], 0
        self._reduce_bucket(bucket)

    def _reduce_bucket(self, bucket: list[torch.Tensor]) -> None:
        if not bucket:
            return
        flat = torch.cat([grad.flatten() for grad in bucket])
        with self._world.peer_errors("gradients"):
            dist.all_reduce(flat)
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def make_optimizer(model: torch.nn.Module, trainer: TrainerConfig, **more: Any) -> torch.optim.AdamW:
    """Fused AdamW (one pass over memory, no temporaries). Weight decay applies to matrices, not to norms and biases."""
    trained = [p for p in model.parameters() if p.requires_grad]
    is_matrix = [len(getattr(p, "ds_shape", p.shape)) >= 2 for p in trained]  # ZeRO-3 leaves an empty shape
    decay = [p for p, matrix in zip(trained, is_matrix, strict=True) if matrix]
    no_decay = [p for p, matrix in zip(trained, is_matrix, strict=True) if not matrix]
    groups = [{"params": decay, "weight_decay": trainer.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=trainer.learning_rate,
        betas=(trainer.adam_beta1, trainer.adam_beta2),
        eps=trainer.adam_epsilon,
        fused=True,
        **more,
    )


def check_fits(name: str, kind: str, shape: tuple[int, ...], parameters: dict[str, torch.nn.Parameter]) -> None:
    """Check one entry of a saved optimizer state against the model.

    Args:
        name: Parameter name in the saved state.
        kind: "step", "exp_avg", …
        shape: Shape of the saved tensor.
        parameters: The model's trained parameters by name.

    Raises:
        PactError: There is no such parameter, or it has another shape.
    """
    parameter = parameters.get(name)
    if parameter is None:
        problem = f"it has a state of '{name}', which the model does not train"
    elif kind != "step" and shape != (expected := getattr(parameter, "ds_shape", parameter.shape)):
        problem = f"'{name}' has the shape {tuple(expected)}, its state {tuple(shape)}"
    else:
        return
    raise PactError(f"the saved optimizer does not fit the model: {problem}; resume with the run's own settings")
