"""The worker extension of a test's server: pact-fast's, with gloo in place of NCCL (gloo_transfer.py)."""

from gloo_transfer import install

from pact_fast.rollout.vllm.worker import WeightReport

__all__ = ["WeightReport"]
install()
