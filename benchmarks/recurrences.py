"""Recurrent rules token by token in the dtype of their inputs, with the arguments of transformers' functions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.nn.functional import silu, softplus

from pact_fast.model.recurrence.dispatch import called_by, recurrent_layers


def delta_rule(
    query, key, value, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, **_
):
    """S ← e^g S; S ← S + k ⊗ β(v − Sᵀk); o = Sᵀq. g has one value per head or one per channel of the keys."""
    heads = value.shape[2]
    query, key = (x.repeat_interleave(heads // x.shape[2], 2) for x in (query, key))
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    query, g = query * query.shape[-1] ** -0.5, g if g.ndim == 4 else g[..., None]
    state = key.new_zeros(len(key), heads, key.shape[-1], value.shape[-1])
    if initial_state is not None:
        state = initial_state.to(key.dtype)
    outputs = []
    for t in range(query.shape[1]):
        state = state * g[:, t, :, :, None].to(key.dtype).exp()
        recalled = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], beta[:, t, :, None] * (value[:, t] - recalled))
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return torch.stack(outputs, 1), state if output_final_state else None


def state_space_scan(
    hidden_states, dt, A, B, C, chunk_size, D=None, dt_bias=None, initial_states=None, dt_softplus=False,
    dt_limit=(0.0, float("inf")), return_final_states=False, **_,
):  # fmt: skip
    """S ← e^(dt A) S + dt x ⊗ B; y = S C + D x."""
    x, heads = hidden_states, hidden_states.shape[2]
    B, C = (m.repeat_interleave(heads // m.shape[2], 2) for m in (B, C))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    state = x.new_zeros(len(x), heads, x.shape[3], B.shape[3]) if initial_states is None else initial_states
    outputs = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None, None]
        state = state * (step * A[:, None, None].to(x.dtype)).exp()
        state = state + step * x[:, t, :, :, None] * B[:, t, :, None]
        y = (state * C[:, t, :, None]).sum(-1)
        outputs.append(y if D is None else y + D[:, None] * x[:, t])
    out = torch.stack(outputs, 1)
    return (out, state) if return_final_states else out


def convolution(hidden_states, weight, bias=None, activation=None, **_):
    """A sum over the last taps, written out."""
    taps = weight.shape[1]
    x = torch.nn.functional.pad(hidden_states, (taps - 1, 0))
    length = hidden_states.shape[2]
    out = sum(weight[:, j, None] * x[..., j : j + length] for j in range(taps))
    out = out if bias is None else out + bias[:, None]
    return silu(out) if activation == "silu" else out


def one_after_the_other(rule):
    """The rule for sequences that lie one after the other, as variable-length kernels take them."""

    def run(query, key, value, *, g, beta, initial_state=None, cu_seqlens, **settings):
        outputs, states = [], []
        for i in range(len(cu_seqlens) - 1):
            part = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
            initial = None if initial_state is None else initial_state[i : i + 1]
            tensors = [x[:, part] for x in (query, key, value)]
            out, state = rule(*tensors, g=g[:, part], beta=beta[:, part], initial_state=initial, **settings)
            outputs.append(out)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states) if settings["output_final_state"] else None

    return run


RULES = {
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": state_space_scan,
    "causal_conv1d_fn": convolution,
}


@contextmanager
def token_by_token(model: torch.nn.Module) -> Iterator[None]:
    """Recurrences of the model's own code as these loops, which compute in fp64 where transformers casts to fp32."""
    with ExitStack() as stack:
        for layer in recurrent_layers(model):
            namespace = inspect.unwrap(type(layer).forward).__globals__
            for name in called_by(layer) & RULES.keys():
                stack.enter_context(mock.patch.dict(namespace, {name: RULES[name]}))
        yield
