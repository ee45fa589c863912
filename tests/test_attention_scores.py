"""Windows, soft-caps and attention sinks on a tree, against a dense formula in fp64 that knows nothing of blocks."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from pact_fast.batch.packing import PackedBatch
from pact_fast.model.attention import blocks
from pact_fast.model.attention.tree import TreeLayout
from pact_fast.tree import TokenTree, pack, tree_attention
from tests.support.trees import random_tree

RULES = [
    {"window": 3},
    {"window": 1},
    {"window": 7, "softcap": 0.8},
    {"softcap": 0.5},
    {"sinks": True},
    {"window": 4, "softcap": 1.5, "sinks": True},
]


def random_pack(seed: int) -> PackedBatch:
    rng = random.Random(seed)
    return pack([random_tree(rng, rng.randint(0, 15)) for _ in range(3)], max_tokens=1000)[0]


def dense(q, k, v, batch, *, scale, window=None, softcap=None, sinks=None, prefix=0):
    """The formula, row by row of the mask: a key is on the row's path, and not too far back on it."""
    end = np.concatenate([np.full(prefix, prefix + len(batch)), batch.subtree_end + prefix])
    position = np.concatenate([np.arange(prefix), batch.position_ids])
    mask = torch.zeros(len(batch), len(end), dtype=torch.bool)
    for row in range(len(batch)):
        for key in range(prefix + row + 1):
            near = window is None or position[prefix + row] - position[key] < window
            mask[row, key] = bool(prefix + row < end[key] and near)
    shared = q.shape[1] // k.shape[1]
    scores = scale * (q @ k.repeat_interleave(shared, 1).mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(1, -1, len(batch), 1)], -1)
    return torch.softmax(scores, -1)[..., : len(end)] @ v.repeat_interleave(shared, 1)


def inputs_of(rows: int, keys: int, sinks: bool, width: int = 16, dtype=torch.float64) -> list[torch.Tensor]:
    shapes = [(1, 4, rows, width), (1, 2, keys, width), (1, 2, keys, width), *([(4,)] if sinks else [])]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def with_gradients(function, tensors, upstream):
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, upstream)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_dense_formula_in_fp64(seed, rule, monkeypatch):
    monkeypatch.setattr(blocks, "ROWS", 7)  # many blocks of a small tree
    torch.manual_seed(seed)
    batch, settings = random_pack(seed), {"scale": 0.4, **rule}
    tensors = inputs_of(len(batch), len(batch), settings.pop("sinks", False))
    upstream = torch.randn(1, 4, len(batch), 16, dtype=torch.float64)

    def run(function, layout):
        return with_gradients(
            lambda q, k, v, *s: function(q, k, v, layout, **settings, sinks=s[0] if s else None), tensors, upstream
        )

    for ours, theirs in zip(run(tree_attention, TreeLayout(batch)), run(dense, batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [2, 9])
def test_keys_of_a_kept_path_leave_the_window_by_their_positions(window):
    torch.manual_seed(0)
    tree = TokenTree(start=6)
    stem = tree.add(np.arange(3))
    for n in (4, 2):
        tree.add(np.arange(n), stem)
    (batch,) = pack([tree], max_tokens=100)
    tensors = inputs_of(len(batch), 6 + len(batch), sinks=False)
    layout = TreeLayout(batch, prefix_length=6)
    out = tree_attention(*tensors, layout, scale=0.3, window=window)
    torch.testing.assert_close(out, dense(*tensors, batch, scale=0.3, window=window, prefix=6), rtol=1e-10, atol=1e-10)


def test_a_window_as_long_as_the_longest_path_is_none(monkeypatch):
    batch = random_pack(1)
    layout = TreeLayout(batch)
    tensors = inputs_of(len(batch), len(batch), sinks=False)
    expected = tree_attention(*tensors, layout, scale=0.3)
    monkeypatch.setattr("pact_fast.model.attention.tree.BlockAttention", None)  # the plain kernels serve
    longest = int(batch.position_ids.max()) + 1
    assert torch.equal(tree_attention(*tensors, layout, scale=0.3, window=longest), expected)


@pytest.mark.parametrize("width", [4, 24])
def test_heads_of_values_may_have_another_width(width):
    torch.manual_seed(0)
    batch = random_pack(2)
    q, k, _ = inputs_of(len(batch), len(batch), sinks=False)
    v = torch.randn(1, 2, len(batch), width, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(1, 4, len(batch), width, dtype=torch.float64)
    ours = with_gradients(lambda *t: tree_attention(*t, TreeLayout(batch), scale=0.3), [q, k, v], upstream)
    theirs = with_gradients(lambda *t: dense(*t, batch, scale=0.3), [q, k, v], upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def sequences(plan):
    """(queries, keys) of each sequence of a variable-length call."""
    q, k = plan.cu_q.tolist(), plan.cu_k.tolist()
    for i in range(len(q) - 1):
        assert q[i + 1] - q[i] <= plan.max_q and k[i + 1] - k[i] <= plan.max_k
        yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


def windowed(q, k, scale, window) -> torch.Tensor:
    """Scores [H, n, m] of one sequence whose last query stands at its last key."""
    behind = torch.arange(len(k)) - (torch.arange(len(q)) + len(k) - len(q))[:, None]
    scores = scale * torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
    return scores.masked_fill((behind > 0) | (behind <= -window), -torch.inf)


def varlen_forward(q, k, v, plan, causal, scale, window):
    outs, lses = [], []
    for a, b in sequences(plan):
        scores = windowed(q[a], k[b], scale, window)
        lses.append(scores.logsumexp(-1))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[b].repeat_interleave(2, 1)))
    return torch.cat(outs), torch.cat(lses, 1)


def varlen_backward(grad, q, k, v, out, lse, plan, causal, scale, window):
    grads = [torch.zeros_like(t) for t in (q, k, v)]
    for a, b in sequences(plan):
        keys, values = (t[b].repeat_interleave(2, 1) for t in (k, v))
        p = (windowed(q[a], k[b], scale, window) - lse[:, a, None]).exp()
        ds = p * (torch.einsum("qhd,khd->hqk", grad[a], values) - (grad[a] * out[a]).sum(-1).T[..., None]) * scale
        grads[0][a] += torch.einsum("hqk,khd->qhd", ds, keys)
        grads[1][b] += torch.einsum("hqk,qhd->khd", ds, q[a]).unflatten(1, (-1, 2)).sum(2)
        grads[2][b] += torch.einsum("hqk,qhd->khd", p, grad[a]).unflatten(1, (-1, 2)).sum(2)
    return grads


@pytest.mark.parametrize("window, sinks", [(1, False), (3, False), (6, True)])
@pytest.mark.parametrize("seed", range(3))
def test_one_variable_length_call_per_layer_on_cuda(seed, window, sinks, monkeypatch):
    """Everything about the CUDA path but the kernel: keys before a run, their order, and the sums of their gradients."""
    from pact_fast.model.attention import flash_cuda

    monkeypatch.setattr(flash_cuda, "varlen_forward", varlen_forward)
    monkeypatch.setattr(flash_cuda, "varlen_backward", varlen_backward)
    torch.manual_seed(seed)
    batch = random_pack(seed)
    tensors = inputs_of(len(batch), len(batch), sinks)
    upstream = torch.randn(1, 4, len(batch), 16, dtype=torch.float64)
    layout = TreeLayout(batch)
    monkeypatch.setattr(layout, "flash_kernel", lambda q: flash_cuda.CudaFlash(torch.device("cpu")))

    def run(function, where):
        return with_gradients(
            lambda q, k, v, *s: function(q, k, v, where, scale=0.4, window=window, sinks=s[0] if s else None),
            tensors,
            upstream,
        )

    monkeypatch.setattr("pact_fast.model.attention.tree.BlockAttention", None)
    for ours, theirs in zip(run(tree_attention, layout), run(dense, batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
