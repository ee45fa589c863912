"""Hugging Face Trainer: the loss of `labels=` without logits, its gradients in the pass that would make them.

    trainer = Trainer(...)
    install(trainer)  # before trainer.train()

Evaluation, generation and saving run the model's own code. `install` needs torch and transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pact_fast.errors import PactError
from pact_fast.integrations.fused_forward import replace_forward
from pact_fast.integrations.self_check import RandomState, check_close, check_head_of, due, z_dtype
from pact_fast.kernels import head_of, linear_cross_entropy

HOST = "Trainer"


def install(trainer: Any) -> Callable[[], None]:
    """Let a Trainer of transformers train a causal LM on the loss of these kernels; returns the function that undoes it.

    Served are batches with `labels` in training. Batches with logits to keep, router losses or pre-shifted labels go to the
    model's own forward.

    Raises:
        PactError: The trainer computes its loss from logits, or the model's head is not supported. On the first
            batch: the kernels and the model's own code disagree.
    """
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        raise PactError(
            "Trainer: compute_loss_func and label_smoothing_factor need logits; remove them or this adapter"
        )
    return replace_forward(trainer.model, _without_logits)


def _without_logits(causal_lm: Any, before: Callable[..., Any]) -> Callable[..., Any]:
    """The model's forward, with a loss in place of logits in training."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    checked = False

    def forward(*args: Any, labels: torch.Tensor | None = None, **options: Any) -> Any:
        nonlocal checked
        special = {"output_router_logits", "shift_labels", "logits_to_keep"} & options.keys()
        if labels is None or not causal_lm.training or special or _has_router(causal_lm):
            return before(*args, **options | ({} if labels is None else {"labels": labels}))
        count = options.pop("num_items_in_batch", None)
        random = None if checked else RandomState(causal_lm.device)
        hidden = causal_lm.base_model(*args, **options | {"use_cache": False}).last_hidden_state
        head = head_of(causal_lm)
        total = linear_cross_entropy(
            head.input(hidden), head.weight, labels, shift=True, reduction="sum", **head.options
        )
        kept = labels[:, 1:] != -100
        divisor = kept.sum() if count is None else torch.as_tensor(count, device=total.device)
        if random is not None and due(checked, int(kept.sum())):
            checked = True
            with random.replayed(), torch.no_grad():
                theirs = before(*args, labels=labels, **options | {"num_items_in_batch": count}).loss
            dtype = z_dtype(hidden, head)
            check_close("the loss", total / divisor, theirs, dtype, HOST)
            rows = torch.nn.functional.pad(kept, (0, 1)).flatten().nonzero().squeeze(1)
            check_head_of(causal_lm, hidden.flatten(0, 1), rows, labels[:, 1:][kept], 1.0, HOST)
        return CausalLMOutputWithPast(loss=total / divisor)

    return forward


def _has_router(causal_lm: Any) -> bool:
    return bool(getattr(causal_lm.config.get_text_config(), "output_router_logits", False))
