"""The Triton kernel that folds partial attention results together, against the plain torch version in fp64.

On the GPU where there is one, else interpreted in a process of its own.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from pact_fast.model.attention.tree import merge_partial
from tests.support.triton_interpreter import interpreter

pytest.importorskip("triton", reason="needs triton: pip install triton")

pytestmark = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(*args):
    importlib.import_module("pact_fast.model.attention.merge_triton").merge(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize("gathered", [False, True])
def test_merge_is_that_of_plain_torch(gathered, width, dtype):
    torch.manual_seed(0)
    heads, rows, n = 3, 40, 19
    total, lse = torch.randn(1, rows, heads, width).transpose(1, 2), 5 * torch.randn(1, heads, rows)
    part, part_lse = torch.randn(1, n, heads, width).transpose(1, 2).to(dtype), 5 * torch.randn(1, heads, n)
    lse[..., 13] = 60.0  # one side alone
    where = torch.randperm(rows)[:n] if gathered else slice(7, 7 + n)
    exact = [t.double() for t in (total, lse)]
    merge_partial(*exact, where, part.double(), part_lse.double())
    given = [t.to(DEVICE) for t in (total, lse)]
    arguments = [*given, where.to(DEVICE) if gathered else where, part.to(DEVICE), part_lse.to(DEVICE)]
    if DEVICE == "cuda":
        run(*arguments)
    else:
        interpreter().submit(run, *arguments).result()
    for mine, value in zip(given, exact, strict=True):
        torch.testing.assert_close(mine.cpu().double(), value, rtol=2e-6, atol=2e-6)
