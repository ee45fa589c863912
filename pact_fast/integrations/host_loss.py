"""One pass over the logits for a loss that only the host's own code can compute, as long as it is a sum over tokens.

Chunk by chunk, the host's loss is differentiated by the chunk's log-probs and entropies while the other tokens keep
constant ones. For a sum over tokens these are the derivatives at all tokens' final values. That is not believed: for every
batch, the derivatives at the final values are compared with those that were used, and where they differ the gradients are
formed in a second pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pact_fast.integrations.fused_forward import separate_logprobs
from pact_fast.integrations.one_gradient import OneGradient, differ
from pact_fast.kernels import Head, LossTokens, pact_loss
from pact_fast.kernels.head.gemm import accumulation_dtype

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (log-probs [N], entropies [N]) → scalar


class HostLoss:
    """Log-probs and entropies with gradients for a loss of the host; one object for all batches.

    token_wise  whether the loss has been a sum over tokens so far, or all tokens in one chunk; afterwards a second pass forms
                the gradients
    """

    def __init__(self) -> None:
        self.token_wise = True

    def __call__(
        self,
        hidden: torch.Tensor,
        head: Head,
        row: torch.Tensor,
        target: torch.Tensor,
        loss: Loss,
        start: torch.Tensor,
        temperature: float | torch.Tensor = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probs, entropies) [N], for which any multiple of `loss` may be differentiated.

        Args:
            hidden: [T, D].
            head: Of `head_of`.
            row, target: int64 [N].
            loss: Without side effects and collectives: it is called for every chunk, not equally often on all ranks.
            start: [N] log-probs at which the loss is finite, such as those of the old policy.
            temperature: A number or [N].
        """
        if self.token_wise:
            found = _in_one_pass(hidden, head, row, target, loss, start, temperature)
            if found is not None:
                return found
            self.token_wise = False
        return separate_logprobs(hidden[row], head, target, temperature=temperature)[:2]


def derivatives(loss: Loss, logprob: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dL/dlogprob and dL/dentropy, [N] each."""
    with torch.enable_grad():
        at = logprob.detach().requires_grad_(), entropy.detach().requires_grad_()
        total = loss(*at)
        found = torch.autograd.grad(total, at, allow_unused=True) if total.requires_grad else (None, None)
    g, h = (torch.zeros_like(logprob) if d is None else d for d in found)
    return g, h


def _in_one_pass(
    hidden: torch.Tensor,
    head: Head,
    row: torch.Tensor,
    target: torch.Tensor,
    loss: Loss,
    start: torch.Tensor,
    temperature: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """None if the loss turns out not to be a sum over tokens."""
    start = start.to(accumulation_dtype(hidden, head.weight))
    nothing = torch.zeros_like(start)
    reads_entropy = bool(derivatives(loss, start, nothing)[1].any())
    formed = torch.zeros_like(start), torch.zeros_like(start)

    def of_chunk(logprob: torch.Tensor, entropy: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if len(index):
            now = start.index_put((index,), logprob.detach()), nothing.index_put((index,), entropy.detach())
            for kept, found in zip(formed, derivatives(loss, *now), strict=True):
                kept[index] = found[index]
        g, h = (kept[index] for kept in formed)
        return g * logprob + h * entropy if reads_entropy else g * logprob

    tokens = LossTokens(row, target, advantage=1.0, rl_weight=1.0)
    out = pact_loss(
        head.input(hidden), head.weight, tokens, policy_loss=of_chunk, temperature=temperature, **head.options
    )
    final = torch.cat(derivatives(loss, out.logprob, out.entropy))
    if differ(torch.cat(formed), final):
        return None
    return OneGradient.apply(out.loss, out.logprob, out.entropy, *formed)
