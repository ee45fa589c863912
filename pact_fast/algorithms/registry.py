"""The registry of algorithms: `@algorithm("name")` above a subclass of `Algorithm`."""

from __future__ import annotations

from pact_fast.algorithms.base import Algorithm
from pact_fast.config import AlgorithmConfig
from pact_fast.registry import Registry

algorithm: Registry[type[Algorithm]] = Registry("algorithm", "algorithm.name", "pact_fast.algorithms", base=Algorithm)


def make_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that `config.name` names: a registered name, `file.py:Class` or `module:Class`.

    Raises:
        PactError: There is none; the message names the nearest.
    """
    return algorithm.get(config.name)(config)
