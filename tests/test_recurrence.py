"""Recurrent rules and convolutions on a tree, in fp64, against every path by itself."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from benchmarks import recurrences
from pact_fast.batch.packing import PackedBatch
from pact_fast.model.recurrence import dispatch, rules, segments
from pact_fast.model.recurrence.plan import RecurrencePlan
from pact_fast.tree import TokenTree, pack

HEADS, GROUPS, KEY, VALUE = 4, 2, 3, 5
SIZES = (0, 1, 1, 2, 3, 5, 9, 17)


def random_pack(seed: int) -> PackedBatch:
    rng = random.Random(seed)
    trees = []
    for nodes in (12, 5, 0):
        tree = TokenTree()
        handles = [tree.add(np.arange(rng.choice(SIZES)))]
        for _ in range(nodes):
            handles.append(tree.add(np.arange(rng.choice(SIZES)), rng.choice(handles)))
        trees.append(tree)
    return pack(trees, max_tokens=1000)[0]


def paths_of(batch: PackedBatch) -> list[np.ndarray]:
    """For every row, the rows of its path up to itself, from the mask alone."""
    rows = np.arange(len(batch))
    return [rows[: row + 1][batch.subtree_end[: row + 1] > row] for row in rows]


def leaves_of(batch: PackedBatch) -> list[np.ndarray]:
    paths = paths_of(batch)
    inner = {int(row) for path in paths for row in path[:-1]}
    return [path for path in paths if int(path[-1]) not in inner]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(1, *shape, dtype=torch.float64)


def delta_inputs(rows: int, *, channels: bool) -> list[torch.Tensor]:
    decay = -torch.rand(1, rows, HEADS, *([KEY] if channels else []), dtype=torch.float64)
    rate = torch.rand(1, rows, HEADS, dtype=torch.float64)
    groups = HEADS if channels else GROUPS
    return [normal(rows, groups, KEY), normal(rows, groups, KEY), normal(rows, HEADS, VALUE), decay, rate]


def scan_inputs(rows: int) -> list[torch.Tensor]:
    return [normal(rows, HEADS, VALUE), normal(rows, HEADS), normal(rows, GROUPS, KEY), normal(rows, GROUPS, KEY)]


SCAN_PARAMETERS = {
    "A": -torch.arange(1.0, 5, dtype=torch.float64) / 3, "D": torch.ones(4, dtype=torch.float64),
    "dt_bias": torch.full((4,), 0.3, dtype=torch.float64),
}  # fmt: skip


def scan(function, *args, **kwargs):
    def run(x, dt, b, c):
        A, D, bias = SCAN_PARAMETERS.values()
        return function(
            *args, x, dt, A, b, c, chunk_size=8, D=D, z=None, dt_bias=bias, dt_softplus=True, dt_limit=(0.1, 2.0),
            initial_states=None, return_final_states=False, **kwargs,
        )  # fmt: skip

    return run


def delta(function, *args):
    return lambda q, k, v, g, beta: function(
        *args, q, k, v, g=g, beta=beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=True,
        cu_seqlens=None,
    )[0]  # fmt: skip


WEIGHT, BIAS = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)


def convolve(function, *args):
    return lambda x: function(*args, x.transpose(1, 2), WEIGHT, BIAS, activation="silu").transpose(1, 2)


def cases(plan: RecurrencePlan, rows: int):
    """(on the tree, on one sequence, inputs [1, T, …])"""
    yield (
        "delta",
        (
            delta(rules.delta_rule, recurrences.delta_rule, plan),
            delta(recurrences.delta_rule),
            delta_inputs(rows, channels=False),
        ),
    )
    yield (
        "kimi",
        (
            delta(rules.delta_rule, recurrences.delta_rule, plan),
            delta(recurrences.delta_rule),
            delta_inputs(rows, channels=True),
        ),
    )
    yield (
        "scan",
        (
            scan(rules.state_space_scan, recurrences.state_space_scan, plan),
            scan(recurrences.state_space_scan),
            scan_inputs(rows),
        ),
    )
    yield (
        "convolution",
        (
            convolve(rules.convolution, recurrences.convolution, plan),
            convolve(recurrences.convolution),
            [normal(rows, 6)],
        ),
    )


def assert_tree_equals_paths(batch, on_tree, on_sequence, inputs) -> None:
    inputs = [x.requires_grad_() for x in inputs]
    out = on_tree(*inputs)
    upstream = torch.randn_like(out)
    expected, total, seen = torch.empty_like(out), 0, set()
    for path in leaves_of(batch):
        alone = on_sequence(*(x[:, path] for x in inputs))
        new = [i for i, row in enumerate(path) if int(row) not in seen]  # rows of shared prefixes count once
        seen.update(int(row) for row in path)
        expected[:, path[new]] = alone[:, new].detach()
        total = total + (alone[:, new] * upstream[:, path[new]]).sum()
    assert len(seen) == len(batch)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(out, inputs, upstream)
    for a, b in zip(ours, torch.autograd.grad(total, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_segments_are_the_paths(seed):
    batch = random_pack(seed)
    parts = segments.segments_of(batch.subtree_end)
    assert [row for part in parts for row in range(part.start, part.end)] == list(range(len(batch)))
    for index, part in enumerate(parts):
        chain, at = [], index
        while at is not None:
            chain.append(np.arange(parts[at].start, parts[at].end))
            at = parts[at].parent
        assert np.array_equal(np.concatenate(chain[::-1]), paths_of(batch)[part.end - 1])


@pytest.mark.parametrize("case", ["delta", "kimi", "scan", "convolution"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_every_path_by_itself(seed, case, monkeypatch):
    monkeypatch.setattr(segments, "CHUNK", 4)  # several groups on a level
    torch.manual_seed(seed)
    batch = random_pack(seed)
    plan = RecurrencePlan(batch.subtree_end)
    assert_tree_equals_paths(batch, *dict(cases(plan, len(batch)))[case])


@pytest.mark.parametrize("channels", [False, True])
def test_segments_one_after_the_other_give_the_same(channels, monkeypatch):
    monkeypatch.setattr(rules, "_takes_variable_length", lambda x: True)
    torch.manual_seed(0)
    batch = random_pack(0)
    function = recurrences.one_after_the_other(recurrences.delta_rule)
    on_tree = delta(rules.delta_rule, function, RecurrencePlan(batch.subtree_end))
    inputs = delta_inputs(len(batch), channels=channels)
    assert_tree_equals_paths(batch, on_tree, delta(recurrences.delta_rule), inputs)


def test_a_level_of_siblings_is_one_call():
    tree = TokenTree()
    stem = tree.add(np.arange(70))
    for n in (64, 50, 10, 33):
        tree.add(np.arange(n), stem)
    (batch,) = pack([tree], max_tokens=1000)
    calls = []

    def rule(*args, **kwargs):
        calls.append(args[0].shape[:2])
        return recurrences.delta_rule(*args, **kwargs)

    delta(rules.delta_rule, rule, RecurrencePlan(batch.subtree_end))(*delta_inputs(len(batch), channels=False))
    assert calls == [(1, 70), (4, 64)]


def test_padding_is_bounded():
    rng = random.Random(0)
    for _ in range(20):
        tree = TokenTree()
        stem = tree.add(np.arange(3))
        for _ in range(20):
            tree.add(np.arange(rng.randint(1, 2000)), stem)
        (batch,) = pack([tree], max_tokens=1 << 30)
        levels = RecurrencePlan(batch.subtree_end).levels(padded=True)
        assert len(levels.order) <= (1 + segments.MAX_PADDING) * (len(batch) + 20 * segments.CHUNK)
        assert torch.equal(levels.order[levels.place], torch.arange(len(batch)))


def test_a_layer_that_does_not_pass_its_arguments_on_is_found():
    def function(x):
        return x

    dispatcher = dispatch.dispatcher(function, lambda original, plan, x: -x)
    assert dispatcher(2) == 2
    with dispatch.inside_tree(), pytest.raises(RuntimeError, match="must pass their keyword arguments on"):
        dispatcher(2)
