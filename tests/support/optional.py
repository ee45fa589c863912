"""Packages that a whole test file needs: looked for without importing them, which may take seconds in every process."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def needs(*packages: str, reason: str) -> None:
    """Skip the file that calls this unless all of `packages` are installed."""
    if any(find_spec(package) is None for package in packages):
        pytest.skip(reason, allow_module_level=True)
