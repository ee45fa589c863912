"""The loss of OpenRLHF's training step as a function of log-probs and entropies: its own code, up to the backward pass."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from pact_fast.integrations.class_head import replace_method


class _LossReached(Exception):
    """The step has come to its backward pass."""

    def __init__(self, loss: torch.Tensor):
        super().__init__()
        self.loss = loss


class _Scores:
    """Stand-in for the actor whose forward pass returns known values."""

    def __init__(self, logprob: torch.Tensor, entropy: torch.Tensor):
        self._scores = logprob, SimpleNamespace(entropy=entropy)

    def train(self) -> None:
        """Nothing: the step calls it first."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._scores


class _Strategy:
    """Stands for the strategy: nothing is differentiated, and nothing is updated."""

    def __init__(self, own: Any):
        self._own = own

    def backward(self, loss: torch.Tensor, *args: Any, **options: Any) -> None:
        raise _LossReached(loss)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


class StepLoss:
    """The loss of one training step.

    old_logprob  [B, A] of the policy before the step
    """

    def __init__(self, own_step: Callable[..., Any], trainer: Any, experience: Any, *args: Any):
        self._own_step, self._trainer, self._experience, self._args = own_step, trainer, experience, args
        self.old_logprob = experience.action_log_probs

    def loss(self, logprob: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        """The scalar for log-probs of actions [B, A] and entropies [B, L − 1]."""
        trainer, experience = copy.copy(self._trainer), copy.copy(self._experience)
        mask = experience.action_mask
        trainer.actor = _Scores(logprob * mask.float(), entropy)
        trainer.strategy = _Strategy(trainer.strategy)
        experience.info = dict(experience.info)  # the step notes its statistics there
        try:
            self._own_step(trainer, experience, *self._args)
        except _LossReached as reached:
            return reached.loss
        raise RuntimeError("OpenRLHF's training_step ended without strategy.backward")


def loss_of_step(losses: list[Any]) -> list[Callable[[], None]]:
    """While a training step runs, its loss is the last of `losses`; returns the functions that undo it.

    [] in processes that have not imported OpenRLHF's trainer, which only those of the policy do, and before 0.11.
    """
    module = sys.modules.get("openrlhf.trainer.ray.ppo_actor")
    trainer_class, batch_info = getattr(module, "ActorPPOTrainer", None), getattr(module, "get_loss_batch_info", None)
    if trainer_class is None or batch_info is None:
        return []

    def make(before: Callable[..., Any]) -> Callable[..., Any]:
        def training_step(self: Any, experience: Any, kl_ctl: float, step: int, loss_batch_info: Any = None) -> Any:
            if loss_batch_info is None:  # computed once: ranks take part in it
                dynamic = self.args.train.dynamic_batch_enable
                buffer = {"replay_buffer": self.replay_buffer, "step": step, "dynamic_batch": dynamic}
                loss_batch_info = batch_info(self.strategy, experience.action_mask, **buffer)
            losses.append(StepLoss(before, self, experience, kl_ctl, step, loss_batch_info))
            try:
                return before(self, experience, kl_ctl, step, loss_batch_info)
            finally:
                losses.pop()

        return training_step

    return [replace_method(trainer_class, "training_step", make)]
