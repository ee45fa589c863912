"""Working memory on CPU is reused between calls, and never shared by two at a time."""

import threading

import pytest
import torch

from pact_fast.kernels import linear_logprob, release_memory
from pact_fast.kernels.runtime import scratch as memory
from pact_fast.kernels.runtime.scratch import Scratch, padded_nbytes


@pytest.fixture(autouse=True)
def nothing_kept():
    release_memory()
    yield
    release_memory()


def scratch(size: int) -> Scratch:
    return Scratch(size, torch.device("cpu"))


def test_pieces_lie_apart_and_are_as_large_as_asked():
    shapes = [(3, 5), (7,), (2, 1000)]
    made = scratch(sum(padded_nbytes(shape, torch.float32) for shape in shapes))
    pieces = [made.empty(shape, torch.float32).fill_(i) for i, shape in enumerate(shapes)]
    assert [piece.shape for piece in pieces] == [torch.Size(shape) for shape in shapes]
    assert all(bool((piece == i).all()) for i, piece in enumerate(pieces))


def test_the_next_pass_gets_the_memory_of_the_last_and_a_larger_one_replaces_it():
    def place(size: int) -> int:
        made = scratch(size)
        return made.empty((size,), torch.uint8).data_ptr()

    first = place(100_000)
    assert place(50_000) == first == place(100_000)
    place(200_000)
    (kept,) = memory._kept
    assert len(kept) == 200_000
    release_memory()
    assert not memory._kept


def test_two_passes_at_once_never_share():
    one, other = scratch(10_000), scratch(10_000)
    assert one.empty((10,), torch.uint8).data_ptr() != other.empty((10,), torch.uint8).data_ptr()
    del one, other
    assert len(memory._kept) == 1


def test_a_pass_in_inference_mode_leaves_memory_that_gradients_can_use():
    hidden, weight, target = torch.randn(6, 16), torch.randn(50, 16), torch.randint(50, (6,))
    with torch.inference_mode():
        linear_logprob(hidden, weight, target)
    weight.requires_grad_()
    linear_logprob(hidden, weight, target).logprob.sum().backward()
    assert weight.grad is not None


def test_threads_get_the_results_of_one():
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(300, 64), torch.randn(1003, 64), torch.randint(1003, (300,))

    def gradient() -> torch.Tensor:
        own = weight.clone().requires_grad_()
        linear_logprob(hidden, own, target).logprob.sum().backward()
        assert own.grad is not None
        return own.grad

    expected, wrong = gradient(), []

    def repeat() -> None:
        for _ in range(20):
            if not torch.equal(gradient(), expected):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=repeat) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
