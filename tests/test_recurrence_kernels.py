"""The functions that recurrent layers of transformers call, on a tree, on the device that has their kernels.

On a GPU they are those of the packages `fla`, `mamba_ssm` and `causal_conv1d`, where these are installed; on the CPU, and
without the packages, transformers' own torch code. Errors are against plain loops over tokens in fp64, and at most twice
those of the same function on every path by itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.nemotron_h import modeling_nemotron_h
from transformers.models.qwen3_5 import modeling_qwen3_5

from benchmarks import recurrences
from pact_fast.batch.packing import PackedBatch
from pact_fast.model.recurrence import rules
from pact_fast.model.recurrence.plan import RecurrencePlan
from pact_fast.tree import TokenTree, pack

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HEADS, GROUPS, KEY, VALUE, TAPS = 4, 2, 32, 32, 4
FLOOR = 1e-6  # of the norm
Rule = Callable[..., torch.Tensor]


def random_pack(sizes: tuple[int, ...]) -> PackedBatch:
    rng = random.Random(0)
    tree = TokenTree()
    nodes = [tree.add(np.arange(sizes[-1]))]
    for _ in range(9):
        nodes.append(tree.add(np.arange(rng.choice(sizes)), rng.choice(nodes)))
    return pack([tree], max_tokens=10_000)[0]


def leaf_paths(batch: PackedBatch) -> list[np.ndarray]:
    """The rows of every path from the root to a leaf, from the mask alone."""
    rows = np.arange(len(batch))
    paths = [rows[: row + 1][batch.subtree_end[: row + 1] > row] for row in rows]
    inner = {int(row) for path in paths for row in path[:-1]}
    return [path for path in paths if int(path[-1]) not in inner]


def delta(function, *plan) -> Rule:
    return lambda q, k, v, g, beta: function(
        *plan, q, k, v, g=-g.sigmoid(), beta=beta.sigmoid(), initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=True,
    )[0]  # fmt: skip


def scan(function, *plan) -> Rule:
    def run(x, dt, b, c):
        A = -torch.arange(1.0, HEADS + 1, device=x.device, dtype=dt.dtype) / HEADS
        return function(
            *plan, x, dt, A, b, c, chunk_size=64, D=None, z=None, dt_bias=None, dt_softplus=True, dt_limit=(0.0, 2.0),
            initial_states=None, return_final_states=False,
        )  # fmt: skip

    return run


def convolution(function, *plan) -> Rule:
    return lambda x, weight: function(*plan, x.transpose(1, 2), weight[0], None, activation="silu").transpose(1, 2)


# name → (how it is called, rule on trees, function of transformers, plain loop, shapes of its inputs but for [1, T])
CASES = {
    "delta rule": (delta, rules.delta_rule, modeling_qwen3_5.torch_chunk_gated_delta_rule, recurrences.delta_rule,
                   [(GROUPS, KEY), (GROUPS, KEY), (HEADS, VALUE), (HEADS,), (HEADS,)]),
    "Kimi's delta rule": (delta, rules.delta_rule, modeling_kimi_linear.chunk_kimi_delta_attention, recurrences.delta_rule,
                          [(HEADS, KEY), (HEADS, KEY), (HEADS, VALUE), (HEADS, KEY), (HEADS,)]),
    "Mamba-2": (scan, rules.state_space_scan, modeling_nemotron_h.mamba2_chunk_scan, recurrences.state_space_scan,
                [(HEADS, VALUE), (HEADS,), (GROUPS, KEY), (GROUPS, KEY)]),
    "convolution": (convolution, rules.convolution, modeling_qwen3_5.causal_conv1d_fn, recurrences.convolution,
                    [(HEADS * VALUE,)]),
}  # fmt: skip


def result(rule: Rule, inputs: list[torch.Tensor], shared: list[torch.Tensor], paths, upstream) -> list[torch.Tensor]:
    """Outputs of all rows and the gradients of all inputs, in fp64. paths: None for one call on the whole tree."""
    leaves = [x.detach().requires_grad_() for x in (*inputs, *shared)]
    rows, parameters = leaves[: len(inputs)], leaves[len(inputs) :]
    if paths is None:
        out = rule(*rows, *parameters)
    else:
        parts, places, seen = [], [], set()
        for path in paths:
            new = [i for i, row in enumerate(path) if int(row) not in seen]  # rows of shared prefixes count once
            seen.update(int(row) for row in path)
            parts.append(rule(*(x[:, path] for x in rows), *parameters)[:, new])
            places.append(path[new])
        order = np.argsort(np.concatenate(places))
        out = torch.cat(parts, 1)[:, torch.as_tensor(order, device=upstream.device)]
    gradients = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    return [x.detach().double() for x in (out, *gradients)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_errors_are_at_most_twice_those_of_every_path_by_itself(device, case, dtype):
    call, on_tree, function, loop, shapes = CASES[case]
    batch = random_pack((1, 5, 64, 130) if device == "cuda" else (1, 3, 9, 20))
    torch.manual_seed(0)
    inputs = [torch.randn(1, len(batch), *shape, device=device).to(dtype) for shape in shapes]
    shared = [torch.randn(1, HEADS * VALUE, TAPS, device=device).to(dtype)] if case == "convolution" else []
    out_shape = (HEADS * VALUE,) if case == "convolution" else (HEADS, VALUE)
    upstream = torch.randn(1, len(batch), *out_shape, device=device).to(dtype)
    paths = leaf_paths(batch)
    truth = result(call(loop), [x.double() for x in inputs], [x.double() for x in shared], paths, upstream)
    theirs = result(call(function), inputs, shared, paths, upstream)
    plan = RecurrencePlan(batch.subtree_end, device)
    ours = result(call(on_tree, function, plan), inputs, shared, None, upstream)
    for a, b, exact in zip(ours, theirs, truth, strict=True):
        assert (a - exact).norm() <= 2 * (b - exact).norm() + FLOOR * exact.norm()
        assert exact.norm() > 0
