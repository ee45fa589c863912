"""Tree attention in one pass on CPU (csrc/tree_attention.cpp): errors against fp64, odd sizes, layouts, threads, limits."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from pact_fast.batch.packing import PackedBatch
from pact_fast.kernels.runtime import build
from pact_fast.model.attention.blocks import BlockAttention
from pact_fast.model.attention.cpu import TreeAttentionCpu, serves
from pact_fast.model.attention.flash import CpuFlash
from pact_fast.model.attention.scores import ScoreRule
from pact_fast.model.attention.tree import TreeLayout, _TreeAttention
from pact_fast.tree import TokenTree, pack, tree_attention

SIZES = (0, 1, 2, 5, 30, 63, 64, 65, 130, 300)  # of nodes: within a tile of 64 rows, exactly one, over several


@pytest.fixture(autouse=True)
def kernel():
    if (status := build.status()) != "ready":
        pytest.skip(f"no C++ library: {status}")


def needs(dtype: torch.dtype) -> None:
    if not torch.ops.pact_fast.tree_attention_ready(dtype):
        pytest.skip(f"no BRGEMM of {dtype} on this CPU")


def batch_of(seed: int, nodes: int = 10) -> PackedBatch:
    rng = random.Random(seed)
    trees = []
    for _ in range(2):
        tree = TokenTree()
        handles = [tree.add(np.arange(rng.choice(SIZES[1:])))]
        for _ in range(nodes):
            handles.append(tree.add(np.arange(rng.choice(SIZES)), rng.choice(handles)))
        trees.append(tree)
    return pack(trees, max_tokens=1 << 40)[0]


def rows(heads: int, count: int, width: int) -> torch.Tensor:
    """[1, heads, count, width] as models make it: rows outermost in memory."""
    return torch.randn(1, count, heads, width).transpose(1, 2)


def dense(q, k, v, end, scale):
    """The formula, in the dtype of q; row i stands where key S + i does."""
    key = torch.arange(len(end))
    row = key[len(end) - q.shape[2] :, None]
    shared = q.shape[1] // k.shape[1]
    scores = scale * (q @ k.repeat_interleave(shared, 1).mT)
    p = torch.softmax(scores.masked_fill(~((key <= row) & (row < end)), -torch.inf), -1)
    return p @ v.repeat_interleave(shared, 1)


def results(function, inputs, upstream):
    tensors = [t.detach().requires_grad_() for t in inputs]
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]


def assert_as_good(inputs, upstream, end, scale, ours, theirs):
    """Errors of `ours` are at most twice those of `theirs`, for out, dq, dk and dv."""
    dtype = inputs[0].dtype
    exact = results(lambda q, k, v: dense(q, k, v, end, scale), [t.double() for t in inputs], upstream.double())
    pairs = zip(results(ours, inputs, upstream), results(theirs, inputs, upstream), exact, strict=True)
    for mine, other, truth in pairs:
        unit = torch.finfo(dtype).eps / 2 * truth.norm()
        assert (mine.double() - truth).norm() <= 2 * (other.double() - truth).norm() + unit


WIDE = [(128, 2, 1), (256, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "width, heads, groups",
    [(16, 2, 2), (32, 4, 1), (64, 4, 2), (80, 3, 3), *(pytest.param(*wide, marks=pytest.mark.slow) for wide in WIDE)],
)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_errors_are_at_most_twice_those_of_torchs_flash_kernel(dtype, width, heads, groups, seed):
    needs(dtype)
    torch.manual_seed(seed)
    batch, scale = batch_of(100 * width + seed), 1.5 * width**-0.5
    layout = TreeLayout(batch)
    inputs = [rows(h, len(batch), width).to(dtype) for h in (heads, groups, groups)]
    upstream = rows(heads, len(batch), width).to(dtype)
    assert serves(inputs[0], inputs[2], scale)
    assert_as_good(
        inputs, upstream, layout.end, scale,
        lambda q, k, v: tree_attention(q, k, v, layout, scale=scale),
        lambda q, k, v: _TreeAttention.apply(q, k, v, None, layout.calls, scale, CpuFlash()),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("after", [1, 64, 100])
def test_keys_of_a_kept_path_come_first_and_all_rows_see_them(dtype, after):
    needs(dtype)
    torch.manual_seed(after)
    batch = batch_of(after, nodes=4)
    layout = TreeLayout(batch, prefix_length=after)
    inputs = [rows(4, len(batch), 32).to(dtype), *(rows(2, after + len(batch), 32).to(dtype) for _ in range(2))]
    assert_as_good(
        inputs, rows(4, len(batch), 32).to(dtype), layout.end, 0.2,
        lambda q, k, v: tree_attention(q, k, v, layout, scale=0.2),
        lambda q, k, v: dense(q, k, v, layout.end, 0.2),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_of_late_keys_and_scores_that_vanish_beside_them(dtype):
    """The running maximum jumps by hundreds from tile to tile, and most of the terms underflow."""
    needs(dtype)
    torch.manual_seed(0)
    batch = batch_of(7)
    layout = TreeLayout(batch)
    q, k, v = (rows(2, len(batch), 32) for _ in range(3))
    k = k * torch.linspace(0.1, 60, len(batch))[:, None]
    inputs = [t.to(dtype) for t in (q, k, v)]
    assert_as_good(
        inputs, rows(2, len(batch), 32).to(dtype), layout.end, 1.0,
        lambda q, k, v: tree_attention(q, k, v, layout, scale=1.0),
        lambda q, k, v: _TreeAttention.apply(q, k, v, None, layout.calls, 1.0, CpuFlash()),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 4])
def test_results_do_not_depend_on_the_number_of_threads(dtype, groups):
    needs(dtype)
    torch.manual_seed(0)
    batch = batch_of(11, nodes=14)
    layout = TreeLayout(batch)
    inputs = [rows(h, len(batch), 64).to(dtype) for h in (4, groups, groups)]
    upstream = rows(4, len(batch), 64).to(dtype)
    before = torch.get_num_threads()

    def run(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        return results(lambda q, k, v: tree_attention(q, k, v, layout, scale=0.125), inputs, upstream)

    try:
        one = run(1)
        for threads in (2, 5, 5):
            assert all(torch.equal(a, b) for a, b in zip(one, run(threads), strict=True))
    finally:
        torch.set_num_threads(before)


def test_strided_inputs_and_an_expanded_gradient():
    needs(torch.float32)
    torch.manual_seed(0)
    batch = batch_of(3)
    layout = TreeLayout(batch)
    q, k, v = (rows(2, len(batch), 32) for _ in range(3))
    twice = torch.stack([k, torch.full_like(k, torch.nan)], -1).flatten(-2)
    upstream = torch.ones(()).expand(q.shape)
    plain = results(lambda q, k, v: tree_attention(q, k, v, layout, scale=0.2), [q, k, v], upstream.contiguous())
    other = results(
        lambda q, k, v: tree_attention(q, k[..., ::2], v, layout, scale=0.2), [q.contiguous(), twice, v], upstream
    )
    other[2] = other[2][..., ::2]
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_a_nan_reaches_exactly_the_rows_that_see_it():
    needs(torch.float32)
    tree = TokenTree()
    x = tree.add(np.arange(70))
    a, b = tree.add(np.arange(70), x), tree.add(np.arange(70), x)
    (batch,) = pack([tree], max_tokens=1000)
    layout = TreeLayout(batch)
    q, k, v = (rows(1, len(batch), 16) for _ in range(3))
    spoilt = batch.rows(a)[10] + 1  # the key of a's token 10
    k[:, :, spoilt] = torch.nan
    out = tree_attention(q, k, v, layout, scale=0.25)[0, 0]
    end = layout.end[spoilt]
    assert out[spoilt:end].isnan().all()
    assert not out[:spoilt].isnan().any() and not out[end:].isnan().any()
    assert set(batch.rows(b)[1:]).isdisjoint(range(int(spoilt), int(end)))


def test_unsupported_inputs_are_left_to_other_kernels():
    def takes(dtype=torch.float32, width=32, value_width=None, scale=1.0):
        q, v = torch.zeros(1, 1, 4, width, dtype=dtype), torch.zeros(1, 1, 4, value_width or width, dtype=dtype)
        return serves(q, v, scale)

    needs(torch.float32)
    assert takes()
    assert not any([takes(torch.float64), takes(torch.float16), takes(width=24), takes(width=272)])
    assert not takes(value_width=16) and not takes(scale=0.0)


def test_tensors_that_do_not_fit_together_are_refused_by_name():
    needs(torch.float32)
    q, k, v = (rows(2, 5, 16) for _ in range(3))
    end = torch.full((5,), 5)
    for args, named in [
        ((q, k, rows(2, 4, 16), end), "v must be"),
        ((q, rows(2, 4, 16), v, end), "a key for each row"),
        ((q, k, v, end[:4]), "end must be contiguous int64"),
        ((q, k, v, torch.tensor([5, 5, 2, 5, 5])), r"end\[2\] = 2 is outside \[3, 5\]"),
        ((q, k, v, torch.tensor([5, 5, 5, 6, 5])), r"end\[3\] = 6 is outside \[4, 5\]"),
        ((q, k, v.bfloat16(), end), "v must be"),
        ((rows(3, 5, 16), k, v, end), "divide"),
    ]:
        with pytest.raises(RuntimeError, match=named):
            TreeAttentionCpu.apply(*args[:3], None, args[3], None, ScoreRule(0.25))


def test_outputs_that_do_not_fit_are_refused():
    needs(torch.float32)
    ops, end = torch.ops.pact_fast, torch.full((5,), 5)
    q, k, v, out = (rows(2, 5, 16) for _ in range(4))
    lse = torch.empty(2, 2, 5)
    for wrong in (rows(2, 4, 16), out.bfloat16(), rows(2, 16, 5).mT):
        with pytest.raises(RuntimeError, match="out must be fp32"):
            ops.tree_attention_forward(q, k, v, end, 0.25, wrong, lse)
    for wrong in (lse[:1], lse.double(), torch.empty(2, 5, 2).mT, lse.flatten()):
        with pytest.raises(RuntimeError, match="lse must be contiguous fp32"):
            ops.tree_attention_forward(q, k, v, end, 0.25, out, wrong)
    ops.tree_attention_forward(q, k, v, end, 0.25, out, lse)
    given = dict(work=torch.empty(2, 64, 19), dq=rows(2, 5, 16), dk=rows(2, 5, 16), dv=rows(2, 5, 16))
    for name, wrong, named in [
        ("work", torch.empty(2, 64, 18), "work has 9216 bytes, 9728 are needed"),
        ("work", torch.empty(2, 64, 19).double(), "work must be contiguous fp32"),
        ("dq", rows(2, 4, 16), "dq must be fp32"),
        ("dk", rows(1, 5, 16), "dk must be fp32"),
        ("dv", rows(2, 5, 16).bfloat16(), "dv must be fp32"),
    ]:
        with pytest.raises(RuntimeError, match=named):
            outputs = {**given, name: wrong}.values()
            ops.tree_attention_backward(torch.ones_like(out), q, k, v, end, 0.25, out, lse, *outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "window, softcap, sinks, after",
    [(70, None, False, 0), (3, 1.0, True, 0), (None, 0.7, False, 0), (None, None, True, 0), (130, 2.0, True, 100)],
)
def test_windows_soft_caps_and_sinks_are_as_good_as_in_torch(dtype, window, softcap, sinks, after):
    """Against the same in fp64; the window leaves out whole tiles, cuts others, and some rows see little but the sink."""
    needs(dtype)
    torch.manual_seed(0)
    batch = batch_of(5, nodes=8)
    layout = TreeLayout(batch, prefix_length=after)
    tensors = [rows(4, len(batch), 32), *(rows(2, after + len(batch), 32) for _ in range(2))]
    inputs = [*(t.to(dtype) for t in tensors), *([torch.tensor([-9.0, 0.0, 2.0, 9.0])] if sinks else [])]
    upstream, rule = rows(4, len(batch), 32).to(dtype), ScoreRule(0.3, window, softcap)

    def kernel(q, k, v, *s):
        assert serves(q, v, 0.3)
        return tree_attention(q, k, v, layout, scale=0.3, window=window, softcap=softcap, sinks=s[0] if s else None)

    def in_torch(q, k, v, *s):
        return BlockAttention.apply(q, k, v, s[0] if s else None, rule, layout.blocks(window))

    exact = results(in_torch, [t.double() for t in inputs], upstream.double())
    pairs = zip(results(kernel, inputs, upstream), results(in_torch, inputs, upstream), exact, strict=True)
    for mine, other, truth in pairs:
        unit = torch.finfo(dtype).eps / 2 * truth.norm()
        assert (mine.double() - truth).norm() <= 2 * (other.double() - truth).norm() + unit


def test_rules_that_do_not_fit_are_refused_by_name():
    needs(torch.float32)
    ops, end = torch.ops.pact_fast, torch.full((5,), 5)
    q, k, v, out = (rows(2, 5, 16) for _ in range(4))
    for rule, named in [
        ((None, 3, 0.0, None), "a window needs the positions"),
        ((torch.arange(4), 3, 0.0, None), "position must be contiguous int64"),
        ((None, 0, 0.0, torch.zeros(3)), "sinks must be contiguous fp32"),
        ((None, -1, 0.0, None), "must not be negative"),
    ]:
        with pytest.raises(RuntimeError, match=named):
            ops.tree_attention_forward(q, k, v, end, 0.25, out, torch.empty(2, 2, 5), *rule)
