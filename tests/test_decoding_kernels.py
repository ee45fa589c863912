"""Kernels of the embedded engine on CPU: GEMMs of few rows, and attention to a cache of slots; against fp64."""

from __future__ import annotations

import pytest
import torch

from pact_fast.kernels.decoder import skinny
from pact_fast.kernels.runtime import build

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # of the largest element, as the result is rounded


@pytest.fixture(autouse=True)
def library():
    if (status := build.status()) != "ready":
        pytest.skip(f"no C++ library: {status}")


def needs(name: str, dtype: torch.dtype) -> None:
    if not getattr(torch.ops.pact_fast, name)(dtype):
        pytest.skip(f"no kernel of {dtype} on this CPU")


def assert_near(given: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    assert (given.double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("result", DTYPES)
def test_few_rows_times_a_matrix_of_any_size(dtype, result):
    needs("skinny_gemm_ready", dtype)
    if dtype == torch.float32 and result != dtype:
        pytest.skip("fp32 sums are not rounded")
    torch.manual_seed(0)
    sizes = [(1, 2, 1), (2, 16, 64), (3, 40, 70), (5, 34, 15), (8, 576, 192), (16, 98, 65)]
    for n, depth, columns in sizes + [(17, 36, 130), (64, 64, 64), (65, 96, 100)] * (dtype == torch.bfloat16):
        x, w, b = (torch.randn(*size, dtype=dtype) for size in ((n, depth), (columns, depth), (columns,)))
        assert skinny.serves(x, w)
        for bias in (b, None):
            exact = x.double() @ w.double().t() + (0 if bias is None else bias.double())
            out = skinny.linear(x, w, bias, result)
            assert out.dtype == result
            assert_near(out, exact, TOLERANCE[result])


@pytest.mark.parametrize("result", DTYPES)
def test_fp32_weights_are_rounded_beside_bf16_rows(result):
    needs("skinny_gemm_ready", torch.bfloat16)
    x, w, b = torch.randn(9, 70, dtype=torch.bfloat16), torch.randn(130, 70), torch.randn(130)
    rounded = skinny.linear(x, w.bfloat16(), None, result)
    assert torch.equal(skinny.linear(x, w, None, result), rounded)
    assert_near(skinny.linear(x, w, b, result), x.double() @ w.bfloat16().double().t() + b.double(), TOLERANCE[result])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_bits_whatever_rows_are_beside_it_and_with_any_number_of_threads(dtype):
    needs("skinny_gemm_ready", dtype)
    x, w = torch.randn(16, 96, dtype=dtype), torch.randn(200, 96, dtype=dtype)
    whole, threads = skinny.linear(x, w), torch.get_num_threads()
    for row in range(16):
        assert torch.equal(skinny.linear(x[row : row + 1], w)[0], whole[row])
    torch.set_num_threads(3)
    try:
        assert torch.equal(skinny.linear(x, w), whole)
    finally:
        torch.set_num_threads(threads)


def test_rows_may_be_part_of_a_larger_matrix():
    x, w = torch.randn(4, 64), torch.randn(5, 32)
    assert_near(skinny.linear(x[:, :32], w), x[:, :32].double() @ w.double().t(), 2e-6)


def test_inputs_that_the_gemm_does_not_support():
    x, w = torch.randn(2, 8), torch.randn(3, 8)
    assert skinny.serves(x, w)
    assert not skinny.serves(x.double(), w.double())
    assert not skinny.serves(x, w.bfloat16())
    assert not skinny.serves(torch.randn(17, 8), w)
    assert not skinny.serves(x, torch.randn(8, 3).t())
    op = torch.ops.pact_fast.skinny_gemm
    for args in ((x, w[:, :7], None), (x, w, torch.randn(4)), (x.t(), w, None)):
        with pytest.raises(RuntimeError, match="pact_fast"):
            op(*args, torch.empty(2, 3))
    with pytest.raises(RuntimeError, match="out"):
        op(x, w, None, torch.empty(2, 4))


def attention_case(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, lengths: list[int], slots: list[int]):
    torch.manual_seed(1)
    n, capacity = len(lengths), max(lengths) + 5
    q, k, v = (torch.randn(1, n, h, dim, dtype=dtype).transpose(1, 2) for h in (heads, kv_heads, kv_heads))
    cache = torch.full((2, max(slots) + 1, kv_heads, capacity, dim), torch.nan, dtype=dtype)  # unwritten: not read
    for slot, length in zip(slots, lengths, strict=True):
        cache[:, slot, :, : length - 1] = torch.randn(2, kv_heads, length - 1, dim, dtype=dtype)
    return q, k, v, cache[0].contiguous(), cache[1].contiguous(), torch.tensor(slots), torch.tensor(lengths) - 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(9, 3, 64), (4, 4, 16), (6, 1, 80), (5, 1, 96), (8, 1, 128)])
def test_one_token_per_slot_attends_to_its_own_slot(dtype, heads, kv_heads, dim):
    needs("decode_attention_ready", dtype)
    lengths, slots = [1, 15, 16, 17, 300, 700], [3, 0, 6, 1, 5, 2]
    q, k, v, keys, values, at, positions = attention_case(dtype, heads, kv_heads, dim, lengths, slots)
    out = torch.empty(1, len(lengths), heads, dim, dtype=dtype)
    torch.ops.pact_fast.decode_attention(q, k, v, at, positions, 0.3, keys, values, out)
    for i, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        assert torch.equal(keys[slot, :, length - 1], k[0, :, i]) and torch.equal(
            values[slot, :, length - 1], v[0, :, i]
        )
        seen_keys, seen_values = (
            t[slot, :, :length].double().repeat_interleave(heads // kv_heads, 0) for t in (keys, values)
        )
        p = torch.softmax(0.3 * torch.einsum("hd,hkd->hk", q[0, :, i].double(), seen_keys), -1)
        assert_near(out[0, i], torch.einsum("hk,hkd->hd", p, seen_values), TOLERANCE[dtype])


def test_decode_attention_refuses_what_it_cannot_read_or_write():
    def call(**changes):
        q, k, v, keys, values, slots, positions = attention_case(torch.float32, 4, 2, 16, [3, 5], [0, 1])
        given = dict(q=q, k=k, v=v, slots=slots, positions=positions, scale=1.0, keys=keys, values=values)
        given["out"] = torch.empty(1, 2, 4, 16)
        torch.ops.pact_fast.decode_attention(**given | changes)

    call()
    wrong = {
        "more than one token": {"slots": torch.tensor([1, 1])},
        "slots": {"slots": torch.tensor([0, 2])},
        "positions": {"positions": torch.tensor([0, 10])},
        "out": {"out": torch.empty(1, 2, 4, 8)},
        "scale": {"scale": 0.0},
        "k must": {"k": torch.randn(1, 2, 3, 16)},
        "keys and values": {"values": torch.empty(2, 2, 10, 16).transpose(0, 1)},
    }
    for message, change in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            call(**change)
