"""Key-value cache with one slot per session, each with its own length, for any Hugging Face decoder.

It plugs into the attention registry of transformers, not into the model's cache class: the attention function gets the
new tokens' keys and values (after the rotary embedding), writes them into their slots, and attends over the slots.
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from pact_fast.model.forward import decoder_of

ATTENTION_NAME = "pact_slots"
CAPACITY_STEP = 128  # slots grow by this many positions at a time


class SlotCache:
    """keys, values: one tensor [slots, heads, capacity, head_dim] per layer, made at its first use."""

    def __init__(self, slots: int):
        self.slots = slots
        self.capacity = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._rows: torch.Tensor | slice = slice(0, 0)
        self._write_rows = torch.zeros(0, dtype=torch.int64)
        self._positions = torch.zeros(0, dtype=torch.int64)
        self._mask: torch.Tensor | None = None
        self._visible = 0

    def reserve(self, length: int) -> None:
        """Grow every slot to at least `length` positions."""
        if length <= self.capacity:
            return
        self.capacity = -(-length // CAPACITY_STEP) * CAPACITY_STEP
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_zeros(*old.shape[:2], self.capacity, old.shape[3])
                new[:, :, : old.shape[2]] = old
                tensors[layer] = new

    def begin(self, rows: torch.Tensor | slice, positions: torch.Tensor, dtype: torch.dtype) -> None:
        """Set the slots `rows` and int64 `positions` [b, n] of the next forward pass, and its mask of `dtype`."""
        self.reserve(int(positions.max()) + 1)
        self._rows, self._positions = rows, positions
        self._visible = int(positions.max()) + 1
        index = torch.arange(self.slots, device=positions.device)[rows]
        self._write_rows = index[:, None].expand_as(positions)
        visible = torch.arange(self._visible, device=positions.device) <= positions[..., None]  # [b, n, visible]
        self._mask = torch.zeros(visible.shape, dtype=dtype, device=positions.device).masked_fill_(~visible, -torch.inf)

    @torch.inference_mode()
    def copy(self, source: int, targets: torch.Tensor) -> None:
        """Copy the slot `source` into the slots `targets`."""
        for tensors in (self.keys, self.values):
            for layer in tensors:
                layer[targets] = layer[source].clone()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Write k, v [b, Hkv, n, D] into the slots, and attend with q [b, Hq, n, D]; returns [b, n, Hq, D]."""
        while len(self.keys) <= layer:
            shape = (self.slots, k.shape[1], self.capacity, k.shape[3])
            self.keys.append(k.new_zeros(shape))
            self.values.append(k.new_zeros(shape))
        keys, values = self.keys[layer], self.values[layer]
        keys[self._write_rows, :, self._positions] = k.transpose(1, 2)
        values[self._write_rows, :, self._positions] = v.transpose(1, 2)
        b, heads, n, d = q.shape
        groups = heads // k.shape[1]
        # grouped queries become extra query rows of their key-value head, so the cache is not repeated
        q = q.reshape(b, k.shape[1], groups * n, d)
        assert self._mask is not None
        mask = self._mask.repeat(1, groups, 1)[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            q, keys[self._rows, :, : self._visible], values[self._rows, :, : self._visible], attn_mask=mask, scale=scale
        )
        return out.reshape(b, heads, n, d).transpose(1, 2)


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, slot_cache=None, **_):
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return slot_cache.attend(module.layer_idx, query, key, value, scale).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)


def forward(
    model: PreTrainedModel, cache: SlotCache, rows: torch.Tensor | slice, ids: torch.Tensor, positions: torch.Tensor
):
    """Hidden states [b, n, D] of tokens `ids` [b, n] at `positions` [b, n] of the slots `rows`; extends the cache."""
    if model.config._attn_implementation != ATTENTION_NAME:
        model.set_attn_implementation(ATTENTION_NAME)
    cache.begin(rows, positions, next(model.parameters()).dtype)
    return decoder_of(model)(input_ids=ids, position_ids=positions, slot_cache=cache, use_cache=False).last_hidden_state
