"""What several test files share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the fault drills, undisturbed."""
    from tests.support.runs import STEPS, Life, metrics

    run = tmp_path_factory.mktemp("steady") / "run"
    Life(run).ends_well()
    assert [record["step"] for record in metrics(run)] == STEPS
    return run


@pytest.fixture(autouse=True)
def no_launcher_is_left_behind() -> Iterator[None]:
    """A test that leaves a launcher's variables behind makes later ones wait for processes that never come."""
    yield
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & os.environ.keys()


@pytest.fixture(scope="session")
def bf16_ops():
    """torch.ops.pact_fast where its bf16 products run; the test is skipped elsewhere."""
    import torch

    from pact_fast.kernels.runtime import build

    if (status := build.status()) != "ready":
        pytest.skip(f"no C++ library: {status}")
    if not torch.ops.pact_fast.bf16_gemm_ready():
        pytest.skip("no bf16 products: no AVX512-BF16, or a torch without brgemm")
    return torch.ops.pact_fast
