"""The worker extension of a test's server: pact-fast's, with gloo in place of NCCL (gloo_transfer.py)."""

from pact_fast.rollout.vllm.worker import WeightReport
from tests.support.gloo_transfer import install

__all__ = ["WeightReport"]
install()
