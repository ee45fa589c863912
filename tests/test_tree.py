"""Packing and tree attention against a dense mask and against every path alone."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pact_fast.batch.flops import work_of_packs, work_of_paths
from pact_fast.model.attention.tree import TreeLayout, tree_mask
from pact_fast.model.flops import decoder_flops
from pact_fast.tree import TokenTree, pack, tree_attention, tree_forward
from tests.support.models import SHAPE
from tests.support.trees import path_ids, random_tree

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("seed", range(12))
def test_attention_equals_a_dense_mask_in_fp64(seed):
    rng = random.Random(seed)
    trees = [random_tree(rng, rng.randint(0, 15)) for _ in range(3)]
    for batch in pack(trees, max_tokens=rng.choice([12, 60, 1000])):
        shape = (1, 4, len(batch), 16)
        q, k, v = (
            torch.randn(shape if i == 0 else (1, 2, *shape[2:]), dtype=torch.float64, requires_grad=True)
            for i in range(3)
        )
        mask = tree_mask(torch.as_tensor(batch.subtree_end))
        scores = (q @ k.repeat_interleave(2, 1).mT * 0.25).masked_fill(~mask, -torch.inf)
        expected = torch.softmax(scores, -1) @ v.repeat_interleave(2, 1)
        out = tree_attention(q, k, v, TreeLayout(batch), scale=0.25)
        upstream = torch.randn_like(out)
        ours, theirs = (torch.autograd.grad(o, (q, k, v), upstream) for o in (out, expected))
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def varlen(function):
    """A variable-length kernel in fp64 from one dense call per sequence; the interface that CudaFlash expects on CUDA."""

    def run(*tensors, plan, causal, scale):
        parts = []
        for i in range(len(plan.cu_q) - 1):
            (q0, q1), (k0, k1) = (tuple(int(c) for c in cu[i : i + 2]) for cu in (plan.cu_q, plan.cu_k))
            assert q1 - q0 <= plan.max_q and k1 - k0 <= plan.max_k
            parts.append(function(*tensors, q0, q1, k0, k1, causal, scale))
        return parts

    return run


def packed(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(0, 1)[None]


@varlen
def forward_parts(q, k, v, q0, q1, k0, k1, causal, scale):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(packed(q[q0:q1]), packed(k[k0:k1]), packed(v[k0:k1]), 0.0, causal, scale=scale)


@varlen
def backward_parts(grad, q, k, v, out, lse, q0, q1, k0, k1, causal, scale):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    rows = [packed(t[q0:q1]) for t in (grad, q)]
    keys = [packed(t[k0:k1]) for t in (k, v)]
    return flash(*rows, *keys, packed(out[q0:q1]), lse[None, :, q0:q1], 0.0, causal, scale=scale)


@pytest.mark.parametrize("seed", range(12))
def test_variable_length_calls_add_up_to_the_tree(seed, monkeypatch):
    """Everything about the CUDA path but the kernel: rows, gathered keys, merging, sums over overlapping key ranges."""
    from pact_fast.model.attention import flash_cuda

    def forward(q, k, v, plan, causal, scale):
        parts = forward_parts(q, k, v, plan=plan, causal=causal, scale=scale)
        return torch.cat([o[0] for o, _ in parts], 1).transpose(0, 1), torch.cat([lse[0] for _, lse in parts], 1)

    def backward(grad, q, k, v, out, lse, plan, causal, scale):
        parts = backward_parts(grad, q, k, v, out, lse, plan=plan, causal=causal, scale=scale)
        return tuple(torch.cat([part[i][0] for part in parts], 1).transpose(0, 1) for i in range(3))

    monkeypatch.setattr(flash_cuda, "varlen_forward", forward)
    monkeypatch.setattr(flash_cuda, "varlen_backward", backward)
    rng = random.Random(seed)
    trees = [random_tree(rng, rng.randint(0, 15)) for _ in range(3)]
    for batch in pack(trees, max_tokens=rng.choice([12, 60, 1000])):
        q, k, v = (torch.randn(1, h, len(batch), 16, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
        expected = tree_attention(q, k, v, TreeLayout(batch), scale=0.25)
        layout, cuda = TreeLayout(batch), flash_cuda.CudaFlash(torch.device("cpu"))
        monkeypatch.setattr(layout, "flash_kernel", lambda _, cuda=cuda: cuda)
        out = tree_attention(q, k, v, layout, scale=0.25)
        upstream = torch.randn_like(out)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        ours, theirs = (torch.autograd.grad(o, (q, k, v), upstream) for o in (out, expected))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", [(Qwen3Config, Qwen3ForCausalLM), (LlamaConfig, LlamaForCausalLM)])
def test_hidden_states_and_parameter_gradients_equal_every_path_alone(kind, share):
    torch.manual_seed(0)
    model = kind[1](kind[0](**SHAPE)).double()
    rng = random.Random(1)
    trees = [random_tree(rng, 8) for _ in range(3)]
    weights = {id(n): torch.randn(len(n.ids), dtype=torch.float64) for t in trees for n in t.nodes}

    def gradients(total: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        total.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    total = torch.zeros((), dtype=torch.float64)
    for batch in pack(trees, max_tokens=40, share=share):
        hidden = tree_forward(model, batch)
        for node in batch.owned:
            rows = batch.rows(node)
            keep = rows >= 0  # the first token of a path is not predicted
            total = total + (hidden[rows[keep]].sum(-1) * weights[id(node)][keep]).sum()
    ours = gradients(total)

    model.set_attn_implementation("sdpa")
    total = torch.zeros((), dtype=torch.float64)
    for node in (n for t in trees for n in t.nodes if len(n.ids)):
        hidden = model.base_model(torch.as_tensor(path_ids(node))[None]).last_hidden_state[0]
        rows = np.arange(node.start, node.end) - 1
        keep = rows >= 0
        total = total + (hidden[rows[keep]].sum(-1) * weights[id(node)][keep]).sum()
    alone = gradients(total)
    assert (ours - alone).norm() <= 2e-6 * alone.norm()


@pytest.mark.parametrize("seed", range(8))
def test_every_node_is_owned_once_and_every_path_is_whole(seed):
    rng = random.Random(seed)
    trees = [random_tree(rng, 12) for _ in range(5)]
    budget = rng.choice([10, 25, 80])
    batches = pack(trees, max_tokens=budget)
    owned = [id(node) for batch in batches for node in batch.owned]
    assert sorted(owned) == sorted(id(node) for tree in trees for node in tree.nodes)
    for batch in batches:
        longest = max(node.end for node in batch.owned)
        assert len(batch) <= max(budget, longest)
        for node in batch.owned:
            rows = batch.rows(node)
            expected = path_ids(node)[node.start - 1 if node.start else 0 : node.end - 1]
            got = batch.input_ids[rows[rows >= 0]]
            np.testing.assert_array_equal(got[-len(expected) :] if len(expected) else got[:0], expected)


def test_siblings_share_the_row_that_predicts_their_first_tokens():
    tree = TokenTree()
    x = tree.add([5, 6, 7])
    a, b = tree.add([1, 2], x), tree.add([3], x)
    (batch,) = pack([tree], max_tokens=100)
    assert batch.rows(a)[0] == batch.rows(b)[0] == 2
    assert len(batch) == 6


def test_work_counts_every_pair_of_the_mask_and_every_path():
    rng = random.Random(3)
    forest = [random_tree(rng, 9), random_tree(rng, 5)]
    batches = pack(forest, max_tokens=25)
    masks = [tree_mask(torch.as_tensor(batch.subtree_end)) for batch in batches]
    work = work_of_packs(batches)
    assert work.tokens == sum(len(batch) for batch in batches)
    assert work.pairs == sum(int(mask.sum()) for mask in masks)
    alone = pack(forest, max_tokens=25, share=False)
    assert work_of_paths(forest) == work_of_packs(alone)


def test_flops_are_those_that_torch_counts():
    """Forward and backward of the decoder by torch's own counter, on one path: no recomputation, no padding."""
    from torch.utils.flop_counter import FlopCounterMode

    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    model.set_attn_implementation("eager")
    tree = TokenTree()
    tree.add(np.arange(40))
    with FlopCounterMode(display=False) as counter:
        model.base_model(torch.arange(40)[None]).last_hidden_state.sum().backward()
    counted = decoder_flops(model, work_of_paths([tree]))
    causal = 12.0 * 2 * 4 * 8 * (40 * 40 - 40 * 41 / 2)  # eager attention computes the upper half, too
    assert counted + causal == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_attention_equals_flex_attention_with_the_trees_mask(seed):
    """An oracle that is not ours: torch's FlexAttention with the mask as a function of two rows."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rng = random.Random(100 + seed)
    (batch,) = pack([random_tree(rng, rng.randint(2, 40)) for _ in range(2)], max_tokens=1000)
    end, n = torch.as_tensor(batch.subtree_end), len(batch)
    block_mask = create_block_mask(lambda b, h, q, k: (k <= q) & (q < end[k]), None, None, n, n, device="cpu")
    q, k, v = (torch.randn(1, h, n, 32) for h in (4, 2, 2))
    expected = flex_attention(q, k, v, block_mask=block_mask, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(tree_attention(q, k, v, TreeLayout(batch), scale=0.2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "flash-cpu", pytest.param("cuda", marks=needs_gpu)])
def test_error_is_at_most_twice_that_of_a_dense_mask_in_the_same_dtype(device, dtype, head_dim, monkeypatch):
    if device == "flash-cpu":  # the fallback if the library cannot be compiled
        monkeypatch.setattr("pact_fast.model.attention.cpu.serves", lambda *_: False)
        device = "cpu"
    rng = random.Random(head_dim)
    (batch,) = pack([random_tree(rng, 20) for _ in range(3)], max_tokens=1000)
    torch.manual_seed(0)
    inputs = [torch.randn(1, h, len(batch), head_dim, dtype=torch.float64, device=device) for h in (6, 2, 2)]
    upstream = torch.randn_like(inputs[0])
    mask = tree_mask(torch.as_tensor(batch.subtree_end, device=device))

    def dense(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.1, enable_gqa=True)

    def results(function, kind):
        tensors = [t.to(kind).requires_grad_() for t in inputs]
        out = function(*tensors)
        return [t.double() for t in (out, *torch.autograd.grad(out, tensors, upstream.to(kind)))]

    exact = [t.to(dtype).double() for t in inputs]
    inputs = exact
    truth = results(dense, torch.float64)
    layout = TreeLayout(batch, device)
    ours = results(lambda q, k, v: tree_attention(q, k, v, layout, scale=0.1), dtype)
    plain = results(dense, dtype)
    for mine, theirs, value in zip(ours, plain, truth, strict=True):
        unit = torch.finfo(dtype).eps / 2 * value.norm()
        assert (mine - value).norm() <= 2 * (theirs - value).norm() + unit


@pytest.mark.slow
def test_batches_and_the_tree_module_import_numpy_alone():
    code = """
import importlib, pkgutil, sys
import pact_fast.batch, pact_fast.tree
for module in pkgutil.walk_packages(pact_fast.batch.__path__, "pact_fast.batch."):
    importlib.import_module(module.name)
found = {"torch", "transformers"} & set(sys.modules)
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)
