"""A class with the name and signature of Liger's GRPO loss, for trainers that import it: ms-swift, TRL 0.27 to 1.12.

The loss and its gradients are formed in one pass over the logits, which are never rounded to 16 bits.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pact_fast.errors import PactError
from pact_fast.integrations.grpo_loss import GrpoSettings, grpo_loss, metrics
from pact_fast.integrations.self_check import check_head, due
from pact_fast.kernels import Head, LossTokens, pact_loss

HOST = "Liger's GRPO loss"
NAME = "LigerFusedLinearGRPOLoss"
SERVED = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")


def install() -> Callable[[], None]:
    """Put the class in Liger's place, also in modules that have imported it; returns the function that undoes it."""
    import liger_kernel.chunked_loss as liger

    original = getattr(liger, NAME)
    holders = [m for m in list(sys.modules.values()) if getattr(m, "__dict__", {}).get(NAME) is original]
    for module in holders:
        setattr(module, NAME, LigerFusedLinearGRPOLoss)

    def undo() -> None:
        for module in holders:
            setattr(module, NAME, original)

    return undo


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """Liger's arguments and results; `compiled`, `chunk_size` and `use_ref_model` are accepted and have no effect.

    Raises PactError for a setting that is not served: loss types luspo and vespo, and per sequence anything but the clipped
    ratio with plain KL. On the first batch: the kernels and full logits disagree.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        **others: Any,
    ):
        super().__init__()
        self._sequence = importance_sampling_level == "sequence"
        if loss_type not in SERVED or (self._sequence and (loss_type in ("cispo", "sapo") or use_bias_correction_kl)):
            raise PactError(
                f"{HOST}: loss_type='{loss_type}' per {importance_sampling_level} is not served; use Liger's"
            )
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise PactError(f"{HOST}: loss_type='dr_grpo' needs max_completion_length")
        self._settings = GrpoSettings(
            loss_type, epsilon_low, epsilon_high, beta, delta, use_bias_correction_kl, sapo_temperature_pos,
            sapo_temperature_neg,
        )  # fmt: skip
        self._temperature, self._length, self._checked = temperature, max_completion_length, False

    def forward(
        self,
        _input: torch.Tensor,
        lin_weight: torch.Tensor,
        selected_token_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        advantages: torch.Tensor,
        bias: torch.Tensor | None = None,
        ref_per_token_logps: torch.Tensor | None = None,
        old_per_token_logps: torch.Tensor | None = None,
        ref_input: torch.Tensor | None = None,
        ref_weight: torch.Tensor | None = None,
        ref_bias: torch.Tensor | None = None,
        vllm_is_ratio: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(loss, [mean KL if beta, clipped fraction]); _input [B, T, D], ids and mask [B, T], advantages [B]."""
        if self._settings.beta and ref_per_token_logps is None and ref_input is not None:
            raise PactError(f"{HOST}: give ref_per_token_logps; the reference's hidden states are not served")
        at, shape = attention_mask.nonzero(as_tuple=True), selected_token_ids.shape
        columns = [
            None if t is None else (t[:, None] if t.dim() == 1 else t).expand(shape)[at]
            for t in (advantages, old_per_token_logps, ref_per_token_logps, vllm_is_ratio)
        ]
        advantage, old, ref, importance = columns
        hidden, row = _input.flatten(0, 1), at[0] * shape[1] + at[1]
        head = Head(lin_weight, bias)
        target, weight = selected_token_ids[at], self._weights(attention_mask, at, num_items_in_batch)
        if due(self._checked, len(row)):
            self._checked = True
            layer = functools.partial(torch.nn.functional.linear, weight=lin_weight, bias=bias)
            check_head(layer, head, hidden, row, target, self._temperature, HOST)
        assert advantage is not None
        shared: dict[str, Any] = {"temperature": self._temperature, "bias": bias}
        own = self._settings
        if self._sequence:
            scaled = advantage if importance is None else advantage * importance
            tokens = LossTokens(
                row, target, sequence=at[0], advantage=scaled, rl_weight=weight, ref_logprob=ref,
                **({} if old is None else {"old_logprob": old}),
            )  # fmt: skip
            shared |= {"policy_loss": "gspo_sequence", "clip": (own.epsilon_low, own.epsilon_high), "delta": own.delta}
            shared |= {"kl_coef": own.beta if ref is not None else 0.0}
        else:
            tokens = LossTokens(row, target, advantage=1.0, rl_weight=weight)
            shared |= {"policy_loss": grpo_loss(own, advantage, old, ref, importance)}
        out = pact_loss(hidden, lin_weight, tokens, **shared)
        ratio = out.logprob - (out.logprob if old is None else old)
        if self._sequence:
            counts = attention_mask.sum(1).clamp(min=1)
            ratio = (torch.zeros(shape, dtype=ratio.dtype, device=ratio.device).index_put(at, ratio).sum(1) / counts)[
                at[0]
            ]
        return out.loss, metrics(own, ratio.exp(), advantage, ref, out.logprob)

    def _weights(self, mask: torch.Tensor, at: Any, items: Any) -> torch.Tensor:
        """[N] normalisers of the loss types, as Liger and TRL define them."""
        kind, ones = self._settings.loss_type, torch.ones(len(at[0]), dtype=torch.float64, device=mask.device)
        if kind in ("grpo", "sapo"):
            return ones / (len(mask) * mask.sum(1).clamp(min=1).double()[at[0]])
        if kind in ("bnpo", "dr_grpo"):
            return ones / (mask.sum().clamp(min=1) if kind == "bnpo" else len(mask) * self._length)  # type: ignore[operator]
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        total = (
            mask.sum().double() if items is None else torch.as_tensor(items, dtype=torch.float64, device=mask.device)
        )
        if items is None and ranks > 1:
            dist.all_reduce(total)
        return ones / (total / ranks).clamp(min=1)
