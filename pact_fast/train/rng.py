"""The states of the global random number generators, for checkpoints."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]


def rng_state() -> tuple[dict[str, Any], Tensors]:
    """States of the global generators: Python's and numpy's as JSON data, torch's (CPU and each CUDA device) as tensors."""
    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    state = {"python": random.getstate(), "numpy": numpy}
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": device for i, device in enumerate(torch.cuda.get_rng_state_all())}
    return state, tensors


def set_rng_state(state: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore the result of `rng_state`. States of CUDA devices that this machine lacks are ignored."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(tensors["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
