"""Kernels with one line broken on purpose, to test that checks detect it."""

from __future__ import annotations

from typing import Any

import pytest

from pact_fast.kernels.head.chunked import ChunkedHead


def break_kernels(patch: pytest.MonkeyPatch, where: str) -> None:
    """where: "forward" (log-probs 1 % off) or "backward" (gradients of hidden states 1 % off)."""
    own = getattr(ChunkedHead, where)

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        stats = own(self, *args, **options)
        return stats._replace(logprob=stats.logprob * 1.01)

    def backward(self: Any, *args: Any, **options: Any) -> Any:
        source, dx = own(self, *args, **options)
        return source, None if dx is None else dx * 1.01

    patch.setattr(ChunkedHead, where, {"forward": forward, "backward": backward}[where])
