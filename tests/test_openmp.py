"""OpenMP's threads spin for a bounded time: set before torch is loaded, unless the user has chosen."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from pact_fast.openmp import SPIN_COUNT, USERS_CHOICE, limit_spinning
from tests.support.processes import environment


def test_what_the_user_has_set_stays():
    for given in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": ""}):
        chosen = dict(given)
        limit_spinning(chosen)
        assert chosen == given
    empty: dict[str, str] = {}
    limit_spinning(empty)
    assert empty == {"GOMP_SPINCOUNT": str(SPIN_COUNT)}


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    plain = {key: value for key, value in environment().items() if key not in USERS_CHOICE}
    return subprocess.run(
        [sys.executable, "-c", code], env=plain | variables, capture_output=True, text=True, check=True
    )


@pytest.mark.slow
def test_importing_the_package_sets_it_and_loads_no_torch():
    code = "import os, sys, pact_fast; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    assert run(code).stdout.split() == [str(SPIN_COUNT), "False"]


AT_TORCH = """
import os, sys
class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            os._exit(0)
sys.meta_path.insert(0, Torch())
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["pact_fast.cli.main", "pact_fast.kernels", "benchmarks.measure"])
def test_it_is_set_when_torch_is_looked_for(first):
    """Whatever is imported first."""
    assert run(f"{AT_TORCH}import {first}, torch").stdout.split() == [str(SPIN_COUNT)]


@pytest.mark.slow
def test_torchs_openmp_has_read_it():
    """GNU's runtime prints its settings as it is loaded."""
    shown = run("import pact_fast.kernels, torch", OMP_DISPLAY_ENV="verbose").stderr
    if "GOMP_SPINCOUNT" not in shown:
        pytest.skip("this torch has another OpenMP than GNU's")
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", shown) == [str(SPIN_COUNT)]
