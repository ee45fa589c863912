"""Key-value cache with one slot per session, each with its own length, for any Hugging Face decoder.

It plugs into the attention registry of transformers, not into the model's cache class: the attention function gets the
new tokens' keys and values (after the rotary embedding), writes them into their slots, and attends over the slots.
The tokens of a forward pass, of any number of sessions, are one row [1, T], without padding. One token per slot is
attended by one kernel that reads each slot up to its own length, or else in one padded batch; texts are attended one by
one, with the kernel of tree attention where there is one, else in blocks of queries, so that memory is linear in the
length of a text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from pact_fast.kernels.runtime import build
from pact_fast.model.attention import cpu
from pact_fast.model.attention.scores import ScoreRule
from pact_fast.model.forward import decoder_of
from pact_fast.model.inference import InferenceKernels

ATTENTION_NAME = "pact_slots"
QUERY_BLOCK = 256  # queries that share a dense mask
CAPACITY_STEP = 128  # slots grow by a multiple of this many positions
GROWTH = 1.25  # and by at least this factor, since growing copies the cache


class Text(NamedTuple):
    """`tokens` new tokens of a slot, at consecutive positions from `start` on."""

    slot: int
    start: int
    tokens: int


class SlotCache:
    """keys, values: one tensor [allocated slots, heads, capacity, head_dim] per layer, made at its first use."""

    def __init__(self, slots: int):
        self.slots = slots
        self.capacity = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.any_slots = False  # whether decoding some of the slots takes no longer than their share
        self._slots = torch.zeros(0, dtype=torch.int64)
        self._positions = torch.zeros(0, dtype=torch.int64)
        self._texts: list[Text] | None = None  # None: one token of each slot
        self._padded: _PaddedBatch | None = None
        self._visible = 0
        self._allocated = 0  # slots that have memory

    def clear(self) -> None:
        """Give up all slots and their memory."""
        self.capacity = self._allocated = 0
        self.keys, self.values, self._padded = [], [], None

    def reserve(self, length: int, slots: int) -> None:
        """Grow to at least `length` positions and `slots` slots, so that slots that are never used take no memory."""
        if length <= self.capacity and slots <= self._allocated:
            return
        if length > self.capacity:
            length = max(length, int(GROWTH * self.capacity))
            self.capacity = -(-length // CAPACITY_STEP) * CAPACITY_STEP
        before = self._allocated
        if slots > before:
            self._allocated = min(self.slots, max(slots, 2 * before))
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = self._new(old, old.shape[1], old.shape[3])
                new[:before, :, : old.shape[2]] = old
                tensors[layer] = new

    def _new(self, like: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
        shape = (self._allocated, heads, self.capacity, head_dim)
        # the kernel reads no position that was not written, so memory beyond the sessions' lengths is never touched; a
        # padded batch multiplies such values by 0, and they must be numbers
        return like.new_empty(shape) if self.any_slots else like.new_zeros(shape)

    def begin(self, slots: torch.Tensor, positions: torch.Tensor, texts: list[Text] | None = None) -> None:
        """Prepare the next forward pass.

        Args:
            slots: int64 [T] of the new tokens.
            positions: int64 [T].
            texts: The tokens, as consecutive pieces of them; None: every slot has one token.
        """
        self._visible = int(positions.max()) + 1
        self.reserve(self._visible, int(slots.max()) + 1)
        self._slots, self._positions, self._texts, self._padded = slots, positions, texts, None

    @torch.inference_mode()
    def copy(self, source: int, targets: list[int], length: int) -> None:
        """Copy `length` positions of the slot `source` into the slots `targets`."""
        self.reserve(self.capacity, max(targets) + 1)
        for tensors in (self.keys, self.values):
            for layer in tensors:
                for target in targets:
                    layer[target, :, :length] = layer[source, :, :length]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Write k, v [1, Hkv, T, D] into the slots, and attend with q [1, Hq, T, D]; returns [1, T, Hq, D]."""
        if torch.is_autocast_enabled(q.device.type):  # norms and rotary embeddings return fp32 under autocast
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        while len(self.keys) <= layer:
            self.any_slots = _kernel_serves(q, k, v, scale)
            self.keys.append(self._new(k, k.shape[1], k.shape[3]))
            self.values.append(self._new(v, v.shape[1], v.shape[3]))
        keys, values = self.keys[layer], self.values[layer]
        if self._texts is not None:
            return self._attend_texts(q, k, v, keys, values, scale)
        if self.any_slots:
            out = q.new_empty(1, q.shape[2], q.shape[1], q.shape[3])
            torch.ops.pact_fast.decode_attention.default(
                q, k, v, self._slots, self._positions, scale, keys, values, out
            )
            return out
        keys[self._slots, :, self._positions] = k[0].transpose(0, 1)
        values[self._slots, :, self._positions] = v[0].transpose(0, 1)
        if self._padded is None:
            self._padded = _PaddedBatch(self._slots, self._positions, self._visible, q.dtype)
        return self._padded.attend(q, keys, values, scale)

    def _attend_texts(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        assert self._texts is not None
        out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])
        at = 0
        for slot, start, count in self._texts:
            new, end = slice(at, at + count), start + count
            keys[slot, :, start:end] = k[0, :, new]
            values[slot, :, start:end] = v[0, :, new]
            part = causal_attention(q[:, :, new], keys[slot, None, :, :end], values[slot, None, :, :end], scale)
            out[:, new] = part.transpose(1, 2)
            at += count
        return out


class _PaddedBatch:
    """Attention of one token per slot by torch: all slots padded to the longest, with a dense mask."""

    def __init__(self, slots: torch.Tensor, positions: torch.Tensor, visible: int, dtype: torch.dtype):
        count = len(slots)
        first = torch.equal(slots, torch.arange(count, device=slots.device))
        self._rows = slice(0, count) if first else slots  # a slice copies nothing
        self._seen = slice(visible)
        hidden = torch.arange(visible, device=slots.device) > positions[:, None]
        self._mask = torch.zeros(hidden.shape, dtype=dtype, device=slots.device).masked_fill_(hidden, -torch.inf)

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        """As `SlotCache.attend`."""
        _, heads, count, d = q.shape
        # grouped queries become extra query rows of their key-value head, so the cache is not repeated
        grouped = q[0].transpose(0, 1).reshape(count, keys.shape[1], heads // keys.shape[1], d)
        mask = self._mask[:, None, None].expand(-1, 1, grouped.shape[2], -1)
        out = torch.nn.functional.scaled_dot_product_attention(
            grouped, keys[self._rows, :, self._seen], values[self._rows, :, self._seen], attn_mask=mask, scale=scale
        )
        return out.reshape(1, count, heads, -1)


def _kernel_serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> bool:
    """Whether csrc/decode_attention.cpp attends tensors like these. Compiles the C++ kernels at first use."""
    if q.device.type != "cpu" or q.dtype not in (torch.float32, torch.bfloat16) or scale <= 0:
        return False
    fits = q.shape[3] % 16 == 0 and v.shape[3] == q.shape[3] and k.dtype == v.dtype == q.dtype
    return fits and build.status() == "ready" and torch.ops.pact_fast.decode_attention_ready(q.dtype)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale · q kᵀ) v of the last n of m positions, each of which sees the positions up to its own.

    q [1, Hq, n, D], k [1, Hkv, m, D] and v [1, Hkv, m, Dv]; returns [1, Hq, n, Dv]. Memory is linear in n and in m.
    """
    n, m = q.shape[2], k.shape[2]
    if cpu.serves(q, v, scale):
        return cpu.TreeAttentionCpu.apply(q, k, v, None, torch.full((m,), m), None, ScoreRule(scale))
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
    return slot_cache.attend(module.layer_idx, query, key, value, scale), None


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)


def forward_with(
    model: PreTrainedModel,
) -> Callable[[SlotCache, torch.Tensor, torch.Tensor, torch.Tensor, list[Text] | None], torch.Tensor]:
    """The decoder of a model as a function (cache, slots, ids, positions, texts) → hidden states [T, D].

    It extends the cache by the tokens `ids` [T]; see `SlotCache.begin` for the other arguments.
    """
    decoder = decoder_of(model)
    kernels = InferenceKernels(decoder)

    def forward(
        cache: SlotCache, slots: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor, texts: list[Text] | None
    ) -> torch.Tensor:
        if model.config._attn_implementation != ATTENTION_NAME:
            model.set_attn_implementation(ATTENTION_NAME)
        cache.begin(slots, positions, texts)
        with kernels:
            output = decoder(
                input_ids=ids[None], position_ids=positions[None], slot_cache=cache, use_cache=False
            ).last_hidden_state
        return output[0]

    return forward
