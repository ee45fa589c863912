"""Algorithms, one file each: rollouts and traces in, weighted tokens out."""

from __future__ import annotations

from pact_fast.algorithms.base import Algorithm
from pact_fast.config import AlgorithmConfig


def make_algorithm(config: AlgorithmConfig) -> Algorithm:
    from pact_fast.algorithms.grpo import GRPO
    from pact_fast.algorithms.matchtir import MatchTIR
    from pact_fast.algorithms.pact import Pact
    from pact_fast.algorithms.sft import SFT

    return {"pact": Pact, "grpo": GRPO, "matchtir": MatchTIR, "sft": SFT}[config.name](config)
