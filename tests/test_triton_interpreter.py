"""The Triton backend end to end without a GPU: the precision and loss tests of small cases under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="here the same tests run on the GPU itself")
def test_small_cases_hold_under_the_interpreter():
    """In a process of its own: Triton reads the switch when it is imported."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_head_precision.py"]
    done = subprocess.run(
        [*command, "-k", "triton and not torch-"],
        cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 18, done.stdout[-500:]
