r"""verl: its fused head, `use_fused_kernels`, on these kernels.

    VERL_USE_EXTERNAL_MODULES=pact_fast.integrations.verl_plugin python -m verl.trainer.main_ppo \
        actor_rollout_ref.model.use_fused_kernels=true ...

verl imports that module in every worker, and it calls `install`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pact_fast.integrations.self_check import check_head, due
from pact_fast.kernels import Head, linear_logprob

HOST = "verl"


def install() -> Callable[[], None]:
    """Let verl's `FusedLinearForPPO` compute log-probs and entropies with these kernels; returns the function that undoes it.

    Serves the FSDP, FSDP2 and other engines whose models call that class: `model.use_fused_kernels=true` with
    `fused_kernel_options.impl_backend=torch` (verl's default). Heads that FSDP2 shards by themselves are gathered; verl's own
    class fails there. All tokens are scored, as in verl; gradients are computed for those whose loss reads them.

    Raises:
        ImportError: verl 0.9 or newer is not installed.
        PactError: On the first batch, from the forward pass: the kernels and full logits disagree.
    """
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    before, checked = FusedLinearForPPO.forward, False

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        vocab_weights: torch.Tensor,
        input_ids: torch.Tensor,
        temperature: float | torch.Tensor = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal checked
        hidden, targets = hidden_states.flatten(0, -2), input_ids.flatten().long()
        weight = vocab_weights.full_tensor() if hasattr(vocab_weights, "full_tensor") else vocab_weights
        if torch.is_grad_enabled() and due(checked, len(targets)):
            checked = True
            _check(hidden, weight, targets, temperature)
        out = linear_logprob(hidden, weight, targets, temperature=temperature, entropy=True)
        assert out.entropy is not None
        shape = input_ids.shape
        return out.logprob.view(shape), out.entropy.to(hidden.dtype).view(shape)

    FusedLinearForPPO.forward = forward

    def remove() -> None:
        FusedLinearForPPO.forward = before

    return remove


def _check(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: Any) -> None:
    rows = torch.arange(len(targets), device=targets.device)
    value = float(torch.as_tensor(temperature).flatten()[0])

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight)

    check_head(layer, Head(weight), hidden, rows, targets, value, HOST)
