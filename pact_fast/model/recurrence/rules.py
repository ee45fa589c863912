"""The functions that transformers' recurrent layers call, on a packed tree.

Each takes the model's own function, of one batch of sequences, and its arguments, and calls it once per group of
segments, so that no rule is written again here and a faster implementation of transformers (packages `fla`, `mamba_ssm`
and `causal_conv1d`) stays in use.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import softplus

from pact_fast.model.recurrence.convolution import with_tails
from pact_fast.model.recurrence.levels import over_levels
from pact_fast.model.recurrence.plan import RecurrencePlan
from pact_fast.model.recurrence.segments import SegmentBatch

Function = Callable[..., Any]


def convolution(
    function: Function,
    plan: RecurrencePlan,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """A causal depthwise convolution: hidden_states [1, C, T], weight [C, K]; returns [1, C, T]."""
    inputs = plan.convolution(weight.shape[-1])
    return function(with_tails(hidden_states, inputs), weight, *args, **kwargs).index_select(2, inputs.place)


def delta_rule(
    function: Function,
    plan: RecurrencePlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Gated delta rule, and that of Kimi: query, key, value [1, T, H, D], beta [1, T, H], g [1, T, H] or [1, T, H, D]."""
    for name in ("initial_state", "output_final_state", "cu_seqlens"):
        kwargs.pop(name, None)
    levels = plan.levels(padded=not _takes_variable_length(query))

    def step(inputs: list[torch.Tensor], state: torch.Tensor | None, group: SegmentBatch) -> tuple[torch.Tensor, Any]:
        q, k, v, decay, rate = inputs
        lengths = {} if group.boundaries is None else {"cu_seqlens": group.boundaries}
        return function(
            q, k, v, g=neutral(decay, group), beta=neutral(rate, group), initial_state=state,
            output_final_state=group.keeps, **lengths, **kwargs,
        )  # fmt: skip

    return over_levels(step, [query, key, value, g, beta], levels), None


def state_space_scan(
    function: Function,
    plan: RecurrencePlan,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    *,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **kwargs: Any,
) -> torch.Tensor:
    """Mamba-2: hidden_states [1, T, H, P], dt [1, T, H], A [H], B and C [1, T, G, N]; returns [1, T, H, P].

    Steps of size 0 leave the state as it is, so their sizes are computed here, and padding gets 0.
    """
    for name in ("initial_states", "return_final_states", "cu_seqlens", "seq_idx"):
        kwargs.pop(name, None)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    size = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)

    def step(inputs: list[torch.Tensor], state: torch.Tensor | None, group: SegmentBatch) -> tuple[torch.Tensor, Any]:
        x, sizes, b, c = inputs
        result = function(
            x, neutral(sizes, group), A, b, c, chunk_size, initial_states=state, return_final_states=group.keeps,
            **kwargs,
        )  # fmt: skip
        return result if group.keeps else (result, None)

    return over_levels(step, [hidden_states, size, B, C], plan.levels(padded=True))


def no_fusion(function: Function, plan: RecurrencePlan, *args: Any, **kwargs: Any) -> None:
    """In place of a kernel that fuses a whole Mamba-2 layer: None makes the layer call its parts."""


RULES: dict[str, Function] = {  # by the names that the modules of transformers give the functions
    "causal_conv1d_fn": convolution,
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": state_space_scan,
    "mamba2_split_conv1d_scan_combined": no_fusion,
}


def neutral(gate: torch.Tensor, group: SegmentBatch) -> torch.Tensor:
    """gate [B, L, …] with zeros at padding, where it then leaves the state as it is."""
    if group.padding is None:
        return gate
    return gate.masked_fill(group.padding.view(*group.padding.shape, *[1] * (gate.ndim - 2)), 0.0)


@functools.cache
def _has_fla() -> bool:
    return importlib.util.find_spec("fla") is not None


def _takes_variable_length(x: torch.Tensor) -> bool:
    """Whether transformers runs the delta rule by fla's kernels, which take segments one after the other."""
    return x.is_cuda and _has_fla()
