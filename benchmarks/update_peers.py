"""Competing implementations of parts of an update: chunked heads, and attention over packs with shared prefixes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from pact_fast.tree import PackedBatch

Tensor = torch.Tensor
TORCH_HEAD_ROWS = 1024


def torch_head(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Log-probs in chunks of rows; logits are recomputed in the backward pass."""

    def chunk(rows: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        logits = (rows @ weight.t()).float()
        return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)

    pairs = zip(hidden.split(TORCH_HEAD_ROWS), target.split(TORCH_HEAD_ROWS), strict=True)
    return torch.cat([checkpoint(chunk, rows, weight, ids, use_reentrant=False) for rows, ids in pairs])


def liger_head(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Liger's chunked log-prob, from its GRPO loss."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, target[None])[0]


def last_hidden(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Hidden states of the decoder [B, T, D], after the final norm."""
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Set the model's attention function."""
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)


def _inputs(model: PreTrainedModel, batch: PackedBatch) -> dict[str, Tensor]:
    ids, positions = (torch.as_tensor(t, device=model.device)[None] for t in (batch.input_ids, batch.position_ids))
    return {"input_ids": ids, "position_ids": positions}


def flex_forward(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Hidden states [T, D] by one FlexAttention call per layer; the block mask is built in each update."""
    from torch.nn.attention.flex_attention import create_block_mask

    use_attention(model, "bench_flex")
    end = torch.as_tensor(batch.subtree_end, device=model.device)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < end[k])

    on_cuda, size = end.is_cuda, len(batch)
    mask = create_block_mask(sees, None, None, size, size, device=str(model.device), _compile=on_cuda)
    return last_hidden(model, **_inputs(model, batch), block_mask=mask)[0]


@functools.cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    call: Any = flex_attention
    return torch.compile(call, dynamic=False) if compiled else call


def _flex_attention(module, q, k, v, mask, scaling=None, dropout=0.0, block_mask=None, **_):
    out = _flex(q.is_cuda)(q, k, v, block_mask=block_mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).contiguous(), None


def grouped_forward(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Hidden states [T, D] by the package prefix-grouper; the pack is one prefix with branches."""
    from prefix_grouper import PrefixGrouper

    use_attention(model, "bench_grouped")
    runs, (prefix,) = batch.calls[0].spans, batch.calls[1].spans
    lengths = [runs[0].q1 - prefix.k1, *(run.q1 - run.q0 for run in runs[1:])]
    grouper = PrefixGrouper([[prefix.k1, *lengths]], device=model.device)
    rows, keys = max(lengths), prefix.k1 + max(lengths)
    sees = torch.ones(rows, keys, dtype=torch.bool, device=model.device).tril(keys - rows)[None, None]
    return last_hidden(model, **_inputs(model, batch), prefix_grouper=grouper, suffix_mask=sees)[0]


def _grouped_attention(module, q, k, v, mask, scaling=None, dropout=0.0, prefix_grouper=None, suffix_mask=None, **_):
    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:  # rollouts of one length: no padding
        mask = None if q.shape[2] == k.shape[2] else suffix_mask
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, is_causal=mask is None)[0]

    return prefix_grouper.forward(attend, q, k, v), None


def register(name: str, attention: Callable[..., Any]) -> None:
    """Register the attention functions of the peers."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)


register("bench_flex", _flex_attention)
register("bench_grouped", _grouped_attention)
