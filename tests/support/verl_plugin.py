"""Checks of the modules that verl loads with our plugin; run in a forked process that has not imported verl."""

from __future__ import annotations

import os
import sys
from typing import Any


def check_head(variables: dict[str, str]) -> None:
    from_verl(variables)
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    assert FusedLinearForPPO.forward.__module__ == "pact_fast.integrations.verl"


def check_engine(variables: dict[str, str], name: str) -> None:
    from_verl(variables)
    from verl.workers.engine import EngineRegistry

    vendor = variables["VERL_ENGINE_VENDOR"]
    found: Any = EngineRegistry._engines["language_model"]["fsdp2"]["cuda", vendor]
    assert found.__name__ == name


def from_verl(variables: dict[str, str]) -> None:
    """Import verl with these environment variables."""

    assert "verl" not in sys.modules
    os.environ.update(variables)
    import verl  # noqa: F401
