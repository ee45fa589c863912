"""prime-rl: log-probs and entropies of its fused heads, and its fused cross entropy, by these kernels.

Call `install` in the module that `[trainer.loss] type = "custom", import_path = ...` names: the trainer imports it in every
process.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from pact_fast.errors import PactError
from pact_fast.integrations.class_head import ClassHead, replace_method
from pact_fast.integrations.self_check import check_close, z_dtype
from pact_fast.kernels import Head, linear_cross_entropy

HOST = "prime-rl"
PACKAGE = "prime_rl.trainer.models.layers"
# module, class; those with log-probs for RL, those with a loss for SFT. An older prime-rl does not have all of them
SCORING = (("lm_head", "FusedOutputLinear"), ("lm_head_gemma", "GemmaFusedOutputLinear"))
CROSS_ENTROPY = (("lm_head", "FusedCrossEntropyOutputLinear"), ("lm_head", "QuackFusedCrossEntropyOutputLinear"))


def install() -> Callable[[], None]:
    """Let prime-rl's heads (0.8) compute with these kernels; returns the function that undoes it.

    Served: `FusedOutputLinear` and its Gemma form with the soft-cap, at a temperature per token; entropies can be
    differentiated, too. Cross entropy of Liger's and quack's heads, without either package's kernels. Left to prime-rl: calls
    without labels, and calls with further arguments (sampling masks, top-k outputs); the vanilla head returns logits, which
    nothing here replaces, so leave `fused_lm_head_token_chunk_size` on.

    Raises:
        ImportError: prime-rl is not installed.
        PactError: None of its heads is known. On the first batch: the kernels and full logits disagree.
    """
    undo = [
        replace_method(head, "forward", make)
        for known, make in ((SCORING, _scoring), (CROSS_ENTROPY, _cross_entropy))
        for head in _classes(known)
    ]
    if not undo:
        raise PactError(f"{HOST}: {PACKAGE}.lm_head has no supported head class; use prime-rl 0.8")

    def remove() -> None:
        while undo:
            undo.pop()()

    return remove


def _classes(known: tuple[tuple[str, str], ...]) -> list[type]:
    import_module(f"{PACKAGE}.lm_head")
    found = []
    for module, name in known:
        try:
            found.append(getattr(import_module(f"{PACKAGE}.{module}"), name, None))
        except ModuleNotFoundError:  # of Gemma's head
            continue
    return [head for head in found if head is not None]


def _scoring(before: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a head whose output holds log-probs and entropies [B, S]."""
    head = ClassHead(HOST)

    def forward(self: Any, hidden_states: Any, labels: Any = None, temperature: Any = None, *args: Any, **options: Any):
        if labels is None or temperature is None or args or any(value is not None for value in options.values()):
            return before(self, hidden_states, labels, temperature, *args, **options)
        logprob, entropy = head(hidden_states, self.weight, labels, temperature, getattr(self, "softcap", None))
        return {"logprobs": logprob, "entropy": entropy}

    return forward


def _cross_entropy(before: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a head whose output is the mean loss over labels that are not −100."""
    head = ClassHead(HOST)

    def forward(self: Any, hidden_states: Any, labels: Any = None, *args: Any, **options: Any):
        if labels is None:
            return before(self, hidden_states, labels, *args, **options)
        rows, targets = hidden_states.flatten(0, -2), labels.flatten()
        softcap = getattr(getattr(self, "fused_ce", None), "softcap", None)
        loss = linear_cross_entropy(rows, self.weight, targets, softcap=softcap)
        if head.check(rows, self.weight, targets, softcap=softcap):
            with torch.no_grad():
                theirs = before(self, hidden_states, labels, *args, **options)["loss"]
            check_close("the loss", loss, theirs, z_dtype(rows, Head(self.weight)), HOST)
        return {"loss": loss}

    return forward
