"""Rollouts by vLLM, in the trainer's process or as a server, with weights that are verified after every update."""

from pact_fast.rollout.vllm.builder import VllmBuilder

__all__ = ["VllmBuilder"]
