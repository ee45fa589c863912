"""Seeds of the global random number generators, which dropout and user code draw from."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, numpy and torch (CPU and CUDA), the same on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # numpy's old generator takes 32 bits
    torch.manual_seed(seed)
