"""Runs a benchmark that was started as a file as a module of its package, so that both forms are the same program.

`python -m benchmarks.head` has benchmarks/ on the import path instead of the checkout. Each command begins with

    if not __package__:  # started as a file
        from as_module import run_as_module

        run_as_module(__file__)
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import NoReturn


def run_as_module(file: str) -> NoReturn:
    """Run benchmarks/NAME.py as `python -m benchmarks.NAME`, from any working directory; does not return."""
    path = Path(file).resolve()
    sys.path[0] = str(path.parent.parent)
    runpy.run_module(f"{path.parent.name}.{path.stem}", run_name="__main__", alter_sys=True)
    sys.exit()
