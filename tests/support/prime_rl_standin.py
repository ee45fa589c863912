"""prime-rl's heads as this project knows them, by names and signatures, in plain torch: it is not on PyPI."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

PACKAGE = "prime_rl.trainer.models.layers"


class _Scoring(torch.nn.Linear):
    softcap: float | None = None

    def __init__(self, in_features: int, out_features: int, chunk_size: int, softcap: float | None = None):
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size
        if softcap is not None:
            self.softcap = softcap

    def forward(
        self, hidden_states: Any, labels: Any = None, temperature: Any = None, sampling_mask: Any = None
    ) -> Any:
        assert labels is not None and temperature is not None
        z = super().forward(hidden_states).float()
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        logs = (z / temperature[..., None]).log_softmax(-1)
        if sampling_mask is not None:
            return {"logprobs": torch.zeros_like(temperature), "entropy": torch.zeros_like(temperature)}
        entropy = -(logs.exp() * logs).sum(-1).detach()
        return {"logprobs": logs.gather(-1, labels[..., None])[..., 0], "entropy": entropy}


class FusedOutputLinear(_Scoring):
    pass


class GemmaFusedOutputLinear(_Scoring):
    pass


class FusedCrossEntropyOutputLinear(torch.nn.Linear):
    def __init__(self, in_features: int, out_features: int, softcap: float | None = None):
        super().__init__(in_features, out_features, bias=False)
        self.fused_ce = torch.nn.Module()
        self.fused_ce.softcap = softcap

    def forward(self, hidden_states: Any, labels: Any = None, temperature: Any = None) -> Any:
        z = super().forward(hidden_states)
        if labels is None:
            return {"logits": z}
        cap = self.fused_ce.softcap
        z = z if cap is None else cap * torch.tanh(z / cap)
        return {"loss": torch.nn.functional.cross_entropy(z.float().flatten(0, 1), labels.flatten())}


def put_in_place(patch: pytest.MonkeyPatch) -> None:
    """Make the heads importable as prime-rl's."""
    parts = PACKAGE.split(".")
    for i in range(1, len(parts) + 1):
        package = ModuleType(".".join(parts[:i]))
        package.__path__ = []
        patch.setitem(sys.modules, package.__name__, package)
    contents = {
        "lm_head": (FusedOutputLinear, FusedCrossEntropyOutputLinear),
        "lm_head_gemma": (GemmaFusedOutputLinear,),
    }
    for name, heads in contents.items():
        module = ModuleType(f"{PACKAGE}.{name}")
        vars(module).update({head.__name__: head for head in heads})
        patch.setitem(sys.modules, module.__name__, module)
