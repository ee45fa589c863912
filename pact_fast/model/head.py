"""What a model class does between its decoder and its logits: `kernels/head/logit_transform.py`, for the trainer's own use."""

from __future__ import annotations

from pact_fast.kernels.head.logit_transform import LogitTransform, head_layer, logit_transform

__all__ = ["LogitTransform", "head_layer", "logit_transform"]
