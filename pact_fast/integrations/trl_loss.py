"""The loss of a token in TRL's GRPO, its normalisers and its settings, as `pact_loss` takes them."""

from __future__ import annotations

from typing import Any

import torch

from pact_fast.integrations.grpo_loss import GrpoSettings, grpo_loss
from pact_fast.kernels import LossTokens
from pact_fast.kernels.token_losses import TokenLoss

At = tuple[torch.Tensor, torch.Tensor]  # (row, column) [N] of the tokens with a loss, in [B, C]
ONE_PASS = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo")  # losses of a token


def unsupported(trainer: Any) -> str | None:
    """Why the loss of a token depends on more than the token itself; None if it does not."""
    if trainer.loss_type not in ONE_PASS:
        return f"loss_type='{trainer.loss_type}' needs all log-probs of a sequence first"
    if trainer.importance_sampling_level != "token":
        return "a ratio per sequence needs all log-probs of a sequence first"
    if trainer.top_entropy_quantile < 1.0 or trainer.off_policy_mask_threshold is not None:
        return "a mask depends on the log-probs of all tokens"
    return "the router's loss needs more than hidden states" if trainer.aux_loss_enabled else None


def entropy_coef(trainer: Any) -> float:
    """Coefficient of the entropy bonus in the running optimizer step."""
    closed = trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target
    return 0.0 if not trainer._entropy_bonus_enabled or closed else trainer.entropy_coef


def loss_table(trainer: Any, inputs: dict[str, Any], mask: torch.Tensor, at: At, row: torch.Tensor) -> LossTokens:
    """The tokens, with the normaliser of the loss type as weight. mask: [B, C]; row: [N]."""
    kind, accumulation, batch = trainer.loss_type, trainer.current_gradient_accumulation_steps, len(mask)
    lengths, total = mask.sum(1).clamp(min=1).double(), mask.sum().clamp(min=1).double()
    if kind in ("grpo", "sapo"):
        items = batch * lengths[at[0]]
    elif kind in ("bnpo", "luspo", "dr_grpo"):
        items = {"bnpo": total, "luspo": batch, "dr_grpo": batch * trainer.max_completion_length}[kind]
    else:  # the tokens of all micro-batches and processes
        items = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
        items = items / trainer.args.steps_per_generation
    ones = torch.ones(len(row), dtype=torch.float64, device=mask.device)
    target, weight = inputs["completion_ids"][at], ones / (items * accumulation)
    return LossTokens(row, target, advantage=1.0, rl_weight=weight, entropy_weight=ones / (total * accumulation))


def loss_of_token(trainer: Any, inputs: dict[str, Any], at: At) -> TokenLoss:
    """TRL's loss of a token for `pact_loss`, without its normaliser and without the entropy bonus."""
    args, shape = trainer.args, inputs["completion_ids"].shape

    def column(name: str) -> Any:
        """[N] of [B], [B, 1] or [B, C]; None if TRL has not computed it."""
        values = inputs.get(name)
        if values is None:
            return None
        return (values[:, None] if values.dim() == 1 else values).expand(shape)[at]

    return grpo_loss(
        GrpoSettings(
            trainer.loss_type, trainer.epsilon_low, trainer.epsilon_high, trainer.beta, args.delta,
            args.use_bias_correction_kl, args.sapo_temperature_pos, args.sapo_temperature_neg,
        ),
        column("advantages"), column("old_per_token_logps"), column("ref_per_token_logps"),
        column("importance_sampling_ratio"),
    )  # fmt: skip
