"""Re-export of `kernels/head/logit_transform.py` for the trainer: a model's operations between decoder and logits."""

from __future__ import annotations

from pact_fast.kernels.head.logit_transform import LogitTransform, head_layer, logit_transform

__all__ = ["LogitTransform", "head_layer", "logit_transform"]
