"""verl's FSDP2 engine on several ranks; each rank checks its own results (test_verl_engine.py)."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from pact_fast.integrations.verl import register_engines
from tests.support import verl_engines
from tests.support.host_ranks import join
from tests.support.processes import end_rank
from tests.support.small_chunks import make_small_chunks

SETTINGS = {"loss_agg_mode": "token-mean", "entropy_coeff": 0.01, "use_kl_loss": True, "kl_loss_coef": 0.1}


def steps(path: str) -> None:
    """Gradients, loss and metrics of two steps with our engines are those of verl's own. `path`: of the model."""
    verl_engines.use_the_cpu()
    rank, ranks = join()
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    register_engines()
    with pytest.MonkeyPatch.context() as patch:
        make_small_chunks(patch)
        own = verl_engines.make_engine(FSDPEngineWithLMHead, path)
        assert own.get_data_parallel_size() == ranks
        loss = verl_engines.policy_loss("vanilla", **SETTINGS)
        theirs = [verl_engines.step(own, part(rank, empty), loss) for empty in (True, False)]
        for vendor in ("pact", "pact_tree"):
            os.environ["VERL_ENGINE_VENDOR"] = vendor
            engine = verl_engines.make_engine(EngineRegistry.get_engine_cls("language_model", "fsdp2"), path)
            assert type(engine).__name__ == f"Engine_{vendor}"
            for empty, expected in zip((True, False), theirs, strict=True):
                compare(verl_engines.step(engine, part(rank, empty), loss), expected, f"{vendor}, empty: {empty}")
    end_rank()


def part(rank: int, empty: bool) -> Any:
    """A rank's two micro-batches. empty: the second rank's first one, the one that is checked, has no token with a loss."""
    temperature = torch.tensor([0.5, 0.7, 0.9, 1.1])
    data = verl_engines.batch(entropy=True, kl=True, seed=1 + rank, temperature=temperature)
    if empty and rank == 1:
        for name in ("response_mask", "loss_mask"):
            data[name].values()[: int(data[name].offsets()[2])] = 0
    return data


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], what: str) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 6
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() <= 1e-5 * max(1e-6, expected.abs().max()), f"{what}: {name}"
