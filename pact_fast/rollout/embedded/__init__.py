"""The embedded engine: the training model itself generates, one token of every session per step.

For small models, tests, and runs that repeat bit for bit. There are no weights to send.
"""

from pact_fast.rollout.embedded.builder import EmbeddedBuilder

__all__ = ["EmbeddedBuilder"]
