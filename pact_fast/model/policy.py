"""The policy as one module: from packed token trees to losses or log-probs.

Decoder and fused head are submodules of one module and run inside its forward, because ZeRO-3 gathers the parameters of
a module just before the module's forward and backward; the fused head is then treated like any other layer.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from pact_fast.batch.packing import PackedBatch
from pact_fast.components import LossContext
from pact_fast.config.filters import UNFILTERED, SamplingFilters
from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.kernels import linear_logprob, pact_loss
from pact_fast.kernels.head.stats import SUMS
from pact_fast.kernels.head.tokens import LossTokens
from pact_fast.model.attention.ulysses import RowShards
from pact_fast.model.filters import log_kept_mass
from pact_fast.model.forward import paths_forward, tree_forward, unsupported
from pact_fast.model.head import head_layer, logit_transform
from pact_fast.model.recurrence.dispatch import recurrent_layers

FILTERED_LOGITS = 1 << 24  # logits that the filters are applied to at a time


class Policy(torch.nn.Module):
    """A model with the fused head; the parameters are the model's own. `filters`: which tokens the rollouts keep.

    model     the causal LM
    head      its fused head
    unshared  the reason why prefixes cannot be shared, None if they can
    """

    def __init__(
        self,
        model: PreTrainedModel,
        world: World | None = None,
        autocast: AbstractContextManager | None = None,
        filters: SamplingFilters = UNFILTERED,
    ):
        super().__init__()
        self.model = model
        self.head = FusedHead(model, filters)
        self.unshared = unsupported(model)
        self._group = world and world.sequence_group
        self._autocast = autocast or nullcontext()
        if self._group and (self.unshared or recurrent_layers(model)):
            reason = self.unshared or f"{model.config.model_type}: has recurrent layers"
            raise PactError(f"trainer.sequence_parallel_size needs attention in every layer: {reason}; set it to 1")

    def forward(
        self,
        batch: PackedBatch,
        tokens: LossTokens,
        temperature: float | torch.Tensor,
        loss: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The loss of a pack, or the log-probs of its supervised tokens.

        Args:
            batch: The pack.
            tokens: Its N supervised tokens. Their rows are relative to the rows of this rank, see `rows`.
            temperature: Of the logits; a float or [N].
            loss: Keyword arguments of `pact_loss`. None: only log-probs.

        Returns:
            (loss [], log-probs [N], statistics [len(SUMS), contexts, components]), or (log-probs [N],) without `loss`.
            With filters, the logs of the kept masses [N] follow, see `FusedHead.log_kept_mass`; the loss has added them to
            `tokens.sampler_logprob`.
        """
        row_shards = RowShards(self._group, len(batch)) if self._group else None
        with self._autocast:
            if self.unshared:
                hidden = paths_forward(self.model, batch)
            else:
                hidden = tree_forward(self.model, batch, row_shards=row_shards)
        return self.head(hidden, tokens, temperature, loss)

    def rows(self, batch: PackedBatch) -> tuple[int, int]:
        """(start, end) of the rows of a pack that this rank computes."""
        if not self._group:
            return 0, len(batch)
        row_shards = RowShards(self._group, len(batch))
        return row_shards.start, row_shards.end


class FusedHead(torch.nn.Module):
    """The language-model head, without logits of all rows at once. Weight [V, D] and bias [V] are the model's own.

    transform  operations of the model's class before and after the head
    filters    which tokens the rollouts were sampled from
    """

    bias: torch.nn.Parameter | None

    def __init__(self, model: PreTrainedModel, filters: SamplingFilters = UNFILTERED):
        super().__init__()
        self.filters = filters
        head = head_layer(model)
        self.weight = head.weight
        self.register_parameter("bias", getattr(head, "bias", None))
        self.transform = logit_transform(model)

    def forward(
        self, hidden: torch.Tensor, tokens: LossTokens, temperature: float | torch.Tensor, loss: dict[str, Any] | None
    ) -> tuple[torch.Tensor, ...]:
        """See `Policy.forward`. Returns a flat tuple of tensors, because ZeRO-3's hooks handle no deeper nesting."""
        transform = self.transform
        common: dict[str, Any] = {
            "temperature": temperature,
            "bias": self.bias,
            "softcap": transform.softcap,
            "logit_scale": transform.logit_scale,
        }
        hidden = transform.hidden(hidden)
        kept = self.log_kept_mass(hidden, tokens, temperature) if self.filters else None
        filtered = () if kept is None else (kept,)
        if loss is None:
            return linear_logprob(hidden[tokens.row], self.weight, tokens.target, **common).logprob, *filtered
        if kept is not None and tokens.sampler_logprob is not None:
            tokens = dataclasses.replace(tokens, sampler_logprob=tokens.sampler_logprob + kept)
        output = pact_loss(hidden, self.weight, tokens, **common, **loss)
        return output.loss, output.logprob, torch.stack([output.stats[name] for name in SUMS]), *filtered

    @torch.no_grad()
    def log_kept_mass(
        self, hidden: torch.Tensor, tokens: LossTokens, temperature: float | torch.Tensor
    ) -> torch.Tensor:
        """Log of the sampler filters' kept mass before each prompt-only rollout token; fp32 [N], nats.

        The sampler's log-prob is normalised over the kept tokens, the trainer's over all. Sampler's + this is the
        sampler's over all. 0 for other tokens, and for those with `old_logprob`: the policy has moved since, and this was
        added to `sampler_logprob` before.
        """
        kept = torch.zeros(len(tokens), device=hidden.device)
        index = ((tokens.context == LossContext.PROMPT) & tokens.old_logprob.isnan()).nonzero()[:, 0]
        weight = self.weight.to(hidden.dtype)
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        for part in index.split(max(FILTERED_LOGITS // len(weight), 1)):
            output = torch.nn.functional.linear(hidden[tokens.row[part]], weight, bias).float()
            scale = temperature[part, None] if isinstance(temperature, torch.Tensor) else temperature
            kept[part] = log_kept_mass(self.transform.logits(output) / scale, tokens.target[part], self.filters)
        return kept
