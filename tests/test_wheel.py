"""The wheel, not the checkout: it holds the sources of the kernels, and its command works in another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from pact_fast.kernels.runtime import build
from tests.support.processes import ROOT

pytestmark = pytest.mark.slow
SOURCES = ("pact_fast", "csrc", "pyproject.toml", "README.md", "LICENSE")
SUFFIXES = (".cpp", ".h")
USE = """
import pact_fast, torch
from pact_fast.kernels import linear_logprob
from pact_fast.kernels.runtime import build
hidden, weight = torch.randn(3, 16), torch.randn(5, 16)
print(pact_fast.__file__, build.status(), sep="\\n")
if build.status() == "ready":
    found = linear_logprob(hidden, weight, torch.arange(3), backend="cpp").logprob
    torch.testing.assert_close(found, (hidden @ weight.T).log_softmax(-1).diagonal()[:3])
    print(build.build())

from pact_fast.cli.main import main
assert main(["train", "quickstart", "--dry-run"]) == 0
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools writes beside the sources. No network is needed."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", out, copy, cwd=copy)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of an environment with the wheel and this one's dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    options = ["--python", str(python), "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    run(sys.executable, "-m", "pip", *options, cwd=folder)
    [packages] = (folder / "lib").glob("python*/site-packages")
    # Behind its own packages. Files *.pth of that folder, an editable install's among them, are not read
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin"


def test_every_source_of_the_kernels_is_in_the_wheel(wheel):
    folder = ROOT / "csrc"
    expected = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in SUFFIXES}
    prefix = "pact_fast/csrc/"
    names = [name.removeprefix(prefix) for name in zipfile.ZipFile(wheel).namelist() if name.startswith(prefix)]
    assert {name for name in names if name.endswith(SUFFIXES)} == expected and expected


def test_it_trains_and_its_kernels_are_those_of_the_checkout(cpp_library, installed, tmp_path):
    """The name of a compiled library holds a hash of all sources and flags."""
    file, status, *shown = run(installed / "python", "-c", USE, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(installed.parent)
    assert any("max_steps" in line for line in shown)
    if cpp_library != "ready":
        pytest.skip(cpp_library)
    assert status == "ready" and shown[0] == str(build.build())


def test_its_command_works_outside_the_checkout(installed, tmp_path):
    assert "quickstart" in run(installed / "pact-fast", "recipes", cwd=tmp_path)
