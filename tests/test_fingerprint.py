"""Fingerprints of weights against Python's integers, for every backend, dtype, cut and layout; and every fault changes them."""

from __future__ import annotations

import pytest
import torch

from pact_fast.kernels import fingerprint as module
from pact_fast.kernels.fingerprint import MASK, coefficients, fingerprint
from pact_fast.kernels.runtime import build
from tests.support.triton_interpreter import interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int32, torch.int64]
BACKENDS = ["torch", "cpp"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp" and (status := build.status()) != "ready":
        pytest.skip(f"no C++ library: {status}")
    return request.param


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (50 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def splitmix64(index: int, salt: int) -> int:
    """The definition, in integers that do not overflow; odd."""
    x = (index + 1) * (0x9E3779B97F4A7C15 * salt) & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31 | 1


def by_hand(tensor: torch.Tensor) -> int:
    """Σ bits_ij·a_i·b_j of a matrix whose elements have at most 4 bytes."""
    bits = tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]).tolist()
    salt = module.dtype_salt(tensor.dtype)
    terms = (x * splitmix64(i, 1) * splitmix64(j, salt) for i, row in enumerate(bits) for j, x in enumerate(row))
    return sum(terms) & MASK


@pytest.mark.parametrize("dtype", [t for t in DTYPES if t.itemsize <= 4])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (1, 70), (70, 1), (37, 53)])
def test_it_is_the_sum_of_its_definition(backend, dtype, shape):
    tensor = values(*shape, dtype=dtype)
    assert fingerprint(tensor, backend=backend) == by_hand(tensor)


def test_the_default_backend_gives_the_same(monkeypatch):
    tensor = values(301, 129, dtype=torch.bfloat16)
    assert fingerprint(tensor) == fingerprint(tensor, backend="torch") == by_hand(tensor)
    monkeypatch.setattr(module, "CPU_BLOCK", 1)  # a row at a time
    assert fingerprint(tensor, backend="torch") == by_hand(tensor)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_gives_the_same(dtype):
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    for shape in ((19, 1030), (3, 5), (2000,)):
        tensor = values(*shape, dtype=dtype)
        assert interpreter().submit(interpreted, tensor).result() == fingerprint(tensor, backend="torch")


def interpreted(tensor: torch.Tensor) -> int:
    return fingerprint(tensor, backend="triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_gives_the_same(dtype):
    tensor = values(1500, 1030, dtype=dtype)
    assert fingerprint(tensor.cuda()) == fingerprint(tensor.cuda(), backend="torch") == fingerprint(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_add_up_in_any_cut(backend, dtype):
    whole = values(37, 53, dtype=dtype)
    cuts = [((0, 5), (5, 36), (36, 37)), ((0, 20), (20, 53))]
    parts = [fingerprint(whole[a:b, c:d], a, c, backend=backend) for a, b in cuts[0] for c, d in cuts[1]]
    assert sum(parts) & MASK == fingerprint(whole, backend=backend)
    vector = values(7, dtype=dtype)
    assert (fingerprint(vector[:3]) + fingerprint(vector[3:], 3)) & MASK == fingerprint(vector)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_single_bit_shows(backend, dtype):
    whole = values(9, 11, dtype=dtype)
    before = fingerprint(whole, backend=backend)
    size = whole.element_size()
    for bit in range(8 * size):
        changed = whole.clone()
        place = (bit * 7) % 99 * size  # another element for each bit
        changed.view(-1).view(torch.uint8)[place + bit // 8] ^= 1 << bit % 8
        assert fingerprint(changed, backend=backend) != before


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_single_element_shows(dtype):
    whole = values(9, 11, dtype=dtype)
    found = {fingerprint(whole)}
    for place in range(99):
        changed = whole.clone()
        changed.view(-1).view(torch.uint8)[place * whole.element_size()] ^= 1
        found.add(fingerprint(changed))
    assert len(found) == 100


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_of_two_elements_do_not_cancel(dtype):
    """Highest bits: the sum must have room above them."""
    whole = values(9, 11, dtype=dtype)
    before, size = fingerprint(whole), whole.element_size()
    changed = whole.clone()
    for place in (13, 40):
        changed.view(-1).view(torch.uint8)[place * size + size - 1] ^= 0x80
    assert fingerprint(changed) != before


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_other_order_shows(backend, dtype):
    whole = values(19, 23, dtype=dtype)
    orders = {
        "two rows": whole[[1, 0, *range(2, 19)]],
        "first and last row": whole[[18, *range(1, 18), 0]],
        "two columns": whole[:, [*range(21), 22, 21]],
        "halves": torch.cat([whole[10:], whole[:10]]),
        "transposed": whole.t().contiguous(),
        "transposed, of the same shape": whole.t().reshape(19, 23),
        "interleaved rows": torch.cat([whole[::2], whole[1::2]]),
        "negated": -whole,
        "zeros": torch.zeros_like(whole),
    }
    found = {name: fingerprint(tensor, backend=backend) for name, tensor in orders.items()}
    assert fingerprint(whole, backend=backend) not in found.values()
    assert len(set(found.values())) == len(orders)


def test_another_dtype_shows():
    whole = values(19, 24)
    cast = [fingerprint(whole.to(dtype)) for dtype in DTYPES]
    assert len(set(cast)) == len(DTYPES)
    half = whole.to(torch.bfloat16)
    assert fingerprint(half) != fingerprint(half.view(torch.float16))  # the same bits
    assert fingerprint(-torch.zeros(3)) != fingerprint(torch.zeros(3))  # bits, not values


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(backend, dtype):
    base = values(40, 60, dtype=dtype)
    layouts = {
        "transposed": base.t(),
        "columns": base[:, 7:30],
        "every other row": base[::2],
        "every other column": base[:, ::2],
        "transposed columns": base[:, 7:30].t(),
        "three dimensions": base.view(40, 5, 12),
        "three dimensions, permuted": base.view(40, 5, 12).permute(1, 0, 2),
        "one row for all": base[:1].expand(8, 60),
        "a column": base[:, 3],
        "an odd offset": base.view(-1)[1:2380].view(61, 39),
    }
    for name, tensor in layouts.items():
        same = fingerprint(tensor.contiguous(), backend="torch")
        assert fingerprint(tensor, backend=backend) == same != 0, name


def test_tensors_without_elements_are_zero(backend):
    for shape in ((0,), (0, 5), (5, 0), (0, 0), (3, 0, 2)):
        assert fingerprint(torch.empty(shape), backend=backend) == 0
    assert fingerprint(torch.tensor(3.0), backend=backend) == by_hand(torch.tensor([[3.0]]))


def test_coefficients_are_odd_and_those_of_a_place_do_not_depend_on_the_block():
    whole = coefficients(0, 1000, torch.device("cpu"), 1)
    assert (whole & 1).all() and len(whole.unique()) == 1000
    assert torch.equal(coefficients(300, 20, torch.device("cpu"), 1), whole[300:320])


@pytest.mark.skipif(build.status() != "ready", reason="needs the C++ library")
def test_the_operator_checks_its_inputs():
    bits, a, b = torch.ones(4, 6, dtype=torch.int16), torch.ones(4, dtype=torch.int64), torch.ones(6, dtype=torch.int64)
    op = torch.ops.pact_fast.fingerprint
    op(bits, a, b, out := torch.empty_like(a))
    assert out.tolist() == [6] * 4
    wrong = [(bits.t(), b, a, b.clone()), (bits, a[:3], b, out), (bits, a, a, out), (bits, a, b, b.clone())]
    for inputs in [*wrong, (bits.float(), a, b, out), (bits.view(-1), a, b, out)]:
        with pytest.raises(RuntimeError, match="pact_fast: "):
            op(*inputs)
