"""The mode in which the policy is updated: as in evaluation, with gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer


def update_mode(model: torch.nn.Module) -> None:
    """Put the model into the mode of updates: nothing random, and gradient checkpointing where it is enabled.

    `model.train()` would switch on whatever a configuration holds: dropout, layer dropout, noise in routers. The policy
    that is updated would then not be the one that sampled. transformers checkpoints layers only in training mode, so
    these layers are left in it, but run their own code in evaluation mode.
    """
    model.eval()
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    layers = [m for m in checkpointed if isinstance(m, GradientCheckpointingLayer)]
    # code that does not use transformers' layer class checks the mode of the module that holds the layers
    for module in layers or checkpointed:
        checkpoint: Any = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(module, GradientCheckpointingLayer) and not isinstance(checkpoint, _InEvaluationMode):
            vars(module)["_gradient_checkpointing_func"] = _InEvaluationMode(module, checkpoint)
        module.training = True


class _InEvaluationMode:
    """A checkpointing function, called as `checkpoint(function, *args)`, that runs the layer in evaluation mode."""

    def __init__(self, layer: torch.nn.Module, checkpoint: Any):
        self._layer, self._checkpoint = layer, checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        layer = self._layer

        def run(*inputs: Any) -> Any:  # in the forward pass, and again in the backward pass
            before, layer.training = layer.training, False
            try:
                return function(*inputs)
            finally:
                layer.training = before

        return self._checkpoint(run, *args)
