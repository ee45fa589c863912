r"""verl: its fused head on these kernels; and engines with the loss in one pass, and with prompts computed once.

    VERL_USE_EXTERNAL_MODULES=pact_fast.integrations.verl_plugin VERL_ENGINE_VENDOR=pact python -m verl.trainer.main_ppo ...

verl imports that module in every worker. VERL_ENGINE_VENDOR: `pact`, `pact_tree`, or nothing for the head alone, which
needs `actor_rollout_ref.model.use_fused_kernels=true`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pact_fast.integrations.class_head import ClassHead, replace_method

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

    head = ClassHead(HOST)

    def make(before: Callable[..., Any]) -> Callable[..., Any]:
        def forward(
            self: Any,
            hidden_states: torch.Tensor,
            vocab_weights: torch.Tensor,
            input_ids: torch.Tensor,
            temperature: float | torch.Tensor = 1.0,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            logprob, entropy = head(hidden_states, vocab_weights, input_ids, temperature)
            return logprob, entropy.to(hidden_states.dtype)

        return forward

    return replace_method(FusedLinearForPPO, "forward", make)


def register_engines() -> None:
    """Register engines that `VERL_ENGINE_VENDOR` chooses, for language models under `fsdp` and `fsdp2`.

    `pact`: the loss, any that verl knows or that is registered with it, is differentiated in the pass that makes the logits,
    which are made for tokens with a loss only. `pact_tree`: in addition, a prompt is computed once for all of its responses
    in a micro-batch; set `actor.use_prefix_grouper=true`, which keeps them on one rank. Other micro-batches (images, Ulysses,
    distillation, routing replay) are left to verl, with a warning that says why.

    Raises:
        ImportError: verl 0.9 or newer is not installed.
    """
    from pact_fast.integrations.verl_engine import register

    register()
