"""The policy as one module: token trees in, losses or log-probs out.

Trunk and head run inside one forward, each in a module of its own, so that whoever distributes parameters (ZeRO-3 gathers
a module's just before its forward and its backward) serves the fused head like any layer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from pact_fast.batch.packing import PackedBatch
from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.kernels import linear_logprob, pact_loss
from pact_fast.kernels.head.stats import SUMS
from pact_fast.kernels.head.tokens import LossTokens
from pact_fast.model.attention.ulysses import RowShards
from pact_fast.model.forward import paths_forward, tree_forward, unsupported


class Policy(torch.nn.Module):
    """`model` and its head; the parameters are the model's own. `unshared`: why prefixes cannot be shared, else None."""

    def __init__(
        self, model: PreTrainedModel, world: World | None = None, autocast: AbstractContextManager | None = None
    ):
        super().__init__()
        self.model = model
        self.head = FusedHead(model)
        self.unshared = unsupported(model)
        self._group = world and world.sequence_group
        self._autocast = autocast or nullcontext()
        if self.unshared and self._group:
            raise PactError(f"trainer.sequence_parallel_size needs tree attention: {self.unshared}")

    def forward(
        self,
        batch: PackedBatch,
        tokens: LossTokens,
        temperature: float | torch.Tensor,
        loss: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """(loss, log-probs [N], statistics [len(SUMS), contexts, components]) of pact_loss with the settings `loss`, or
        (log-probs,) without them. tokens.row counts the rows of this process, see `rows`.
        """
        row_shards = RowShards(self._group, len(batch)) if self._group else None
        with self._autocast:
            if self.unshared:
                hidden = paths_forward(self.model, batch)
            else:
                hidden = tree_forward(self.model, batch, row_shards=row_shards)
        return self.head(hidden, tokens, temperature, loss)

    def rows(self, batch: PackedBatch) -> tuple[int, int]:
        """The rows of a pack that this process computes."""
        if not self._group:
            return 0, len(batch)
        row_shards = RowShards(self._group, len(batch))
        return row_shards.start, row_shards.end


class FusedHead(torch.nn.Module):
    """The language-model head, whose logits are never whole. Weight [V, D] and bias [V] are the model's own parameters."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        head = model.get_output_embeddings()
        self.weight = head.weight
        self.register_parameter("bias", getattr(head, "bias", None))
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def forward(
        self, hidden: torch.Tensor, tokens: LossTokens, temperature: float | torch.Tensor, loss: dict[str, Any] | None
    ) -> tuple[torch.Tensor, ...]:
        """A tuple of tensors: ZeRO-3's hooks look no deeper."""
        common: dict[str, Any] = {"temperature": temperature, "bias": self.bias, "softcap": self.softcap}
        if loss is None:
            return (linear_logprob(hidden[tokens.row], self.weight, tokens.target, **common).logprob,)
        output = pact_loss(hidden, self.weight, tokens, **common, **loss)
        return output.loss, output.logprob, torch.stack([output.stats[name] for name in SUMS])
