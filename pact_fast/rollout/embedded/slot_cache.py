"""Key-value cache with one slot per session, each with its own length, for any Hugging Face decoder.

It plugs into the attention registry of transformers, not into the model's cache class: the attention function gets the
new tokens' keys and values (after the rotary embedding), writes them into their slots, and attends over the slots.
One token per slot is attended in one batch; texts slot by slot, with the kernel of tree attention where there is one,
else in blocks of queries, so that memory is linear in the length of a text.
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from pact_fast.model.attention import cpu
from pact_fast.model.forward import decoder_of

ATTENTION_NAME = "pact_slots"
QUERY_BLOCK = 256  # queries that share a dense mask
CAPACITY_STEP = 128  # slots grow by this many positions at a time


class SlotCache:
    """keys, values: one tensor [allocated slots, heads, capacity, head_dim] per layer, made at its first use."""

    def __init__(self, slots: int):
        self.slots = slots
        self.capacity = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._rows: torch.Tensor | slice = slice(0, 0)
        self._write_rows = torch.zeros(0, dtype=torch.int64)
        self._positions = torch.zeros(0, dtype=torch.int64)
        self._texts: list[tuple[int, int, int]] | None = (
            None  # (slot, first position, tokens) of each text; None: decoding
        )
        self._mask: torch.Tensor | None = None
        self._visible = 0
        self._allocated = 0  # slots that have memory

    def reserve(self, length: int, slots: int) -> None:
        """Grow to at least `length` positions and `slots` slots, so that slots that are never used take no memory."""
        if length <= self.capacity and slots <= self._allocated:
            return
        if length > self.capacity:
            self.capacity = -(-length // CAPACITY_STEP) * CAPACITY_STEP
        before = self._allocated
        if slots > before:
            self._allocated = min(self.slots, max(slots, 2 * before))
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_zeros(self._allocated, old.shape[1], self.capacity, old.shape[3])
                new[:before, :, : old.shape[2]] = old
                tensors[layer] = new

    def begin(self, rows: torch.Tensor | slice, positions: torch.Tensor, counts: list[int] | None = None) -> None:
        """Prepare the next forward pass.

        Args:
            rows: The slots, b of them.
            positions: int64 [b, n] of the new tokens.
            counts: Texts: tokens of each slot, at consecutive positions; the rest of a row is padding. None: n is 1.
        """
        index = torch.arange(self.slots, device=positions.device)[rows]
        self._visible = int(positions.max()) + 1
        self.reserve(self._visible, int(index.max()) + 1)
        self._rows, self._positions, self._mask = rows, positions, None
        self._write_rows = index[:, None].expand_as(positions)
        self._texts = None
        if counts is not None:
            self._texts = list(zip(index.tolist(), positions[:, 0].tolist(), counts, strict=True))

    @torch.inference_mode()
    def copy(self, source: int, targets: torch.Tensor) -> None:
        """Copy the slot `source` into the slots `targets`."""
        self.reserve(self.capacity, int(targets.max()) + 1)
        for tensors in (self.keys, self.values):
            for layer in tensors:
                layer[targets] = layer[source].clone()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Write k, v [b, Hkv, n, D] into the slots, and attend with q [b, Hq, n, D]; returns [b, n, Hq, D]."""
        if torch.is_autocast_enabled(q.device.type):  # norms and rotary embeddings return fp32 under autocast
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        while len(self.keys) <= layer:
            shape = (self._allocated, k.shape[1], self.capacity)
            self.keys.append(k.new_zeros(*shape, k.shape[3]))
            self.values.append(v.new_zeros(*shape, v.shape[3]))
        keys, values = self.keys[layer], self.values[layer]
        keys[self._write_rows, :, self._positions] = k.transpose(1, 2)
        values[self._write_rows, :, self._positions] = v.transpose(1, 2)
        if self._texts is None:
            return self._attend_tokens(q, keys, values, scale)
        out = q.new_zeros(len(q), q.shape[2], q.shape[1], v.shape[3])
        for i, (slot, start, count) in enumerate(self._texts):
            seen = slice(start + count)
            part = causal_attention(
                q[i, None, :, :count], keys[slot, None, :, seen], values[slot, None, :, seen], scale
            )
            out[i, :count] = part[0].transpose(0, 1)
        return out

    def _attend_tokens(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        """One query per slot, [b, Hq, 1, D]."""
        if self._mask is None:
            visible = torch.arange(self._visible, device=q.device) <= self._positions[..., None]  # [b, 1, visible]
            mask = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -torch.inf)
            groups = q.shape[1] // keys.shape[1]
            self._mask = mask.repeat(1, groups, 1)[:, None]
        b, heads, n, d = q.shape
        # grouped queries become extra query rows of their key-value head, so the cache is not repeated
        grouped = q.reshape(b, keys.shape[1], heads * n // keys.shape[1], d)
        seen = slice(self._visible)
        out = torch.nn.functional.scaled_dot_product_attention(
            grouped, keys[self._rows, :, seen], values[self._rows, :, seen], attn_mask=self._mask, scale=scale
        )
        return out.reshape(b, heads, n, -1).transpose(1, 2)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale · q kᵀ) v of the last n of m positions, each of which sees the positions up to its own.

    q [1, Hq, n, D], k [1, Hkv, m, D] and v [1, Hkv, m, Dv]; returns [1, Hq, n, Dv]. Memory is linear in n and in m.
    """
    n, m = q.shape[2], k.shape[2]
    if cpu.serves(q, v, scale):
        return cpu.TreeAttentionCpu.apply(q, k, v, torch.full((m,), m), scale)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    for start in range(0, n, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, n)
        seen = m - n + end
        positions = torch.arange(seen - (end - start), seen, device=q.device)
        mask = torch.arange(seen, device=q.device) <= positions[:, None]
        out[:, :, start:end] = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], attn_mask=mask, scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    return out


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, slot_cache=None, **_):
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return slot_cache.attend(module.layer_idx, query, key, value, scale).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)


def forward(
    model: PreTrainedModel,
    cache: SlotCache,
    rows: torch.Tensor | slice,
    ids: torch.Tensor,
    positions: torch.Tensor,
    counts: list[int] | None = None,
) -> torch.Tensor:
    """Hidden states [b, n, D] of tokens `ids` [b, n]; extends the cache. See `SlotCache.begin` for the other arguments."""
    if model.config._attn_implementation != ATTENTION_NAME:
        model.set_attn_implementation(ATTENTION_NAME)
    cache.begin(rows, positions, counts)
    return decoder_of(model)(input_ids=ids, position_ids=positions, slot_cache=cache, use_cache=False).last_hidden_state
