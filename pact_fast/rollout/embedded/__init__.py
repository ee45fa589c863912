"""The embedded engine: the training model itself generates, one token of every session per step."""

from pact_fast.rollout.embedded.builder import EmbeddedBuilder

__all__ = ["EmbeddedBuilder"]
