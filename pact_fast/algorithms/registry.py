"""The registry of algorithms."""

from __future__ import annotations

from pact_fast.algorithms.base import Algorithm
from pact_fast.config import AlgorithmConfig
from pact_fast.registry import Registry

algorithm: Registry[type[Algorithm]] = Registry("algorithm", "algorithm.name", "pact_fast.algorithms")


def make_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that `config.name` names. PactError if there is none."""
    return algorithm.get(config.name)(config)
