"""OpenRLHF's training step on several ranks under DeepSpeed's ZeRO; each rank checks its own results (test_openrlhf.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pact_fast.integrations.openrlhf import install
from pact_fast.kernels import head_of
from tests.support.host_ranks import join
from tests.support.openrlhf_actors import host, make_actor, make_trainer, training_step
from tests.support.processes import deepspeed_on_gloo, end_rank
from tests.support.small_chunks import make_small_chunks

LOSSES = {
    "ppo": ({"is_correction_level": "token"}, {"use_loss": True, "entropy_coef": 0.01}),
    "gspo": ({"policy_loss_type": "gspo"}, {}),
}


def training_steps(*stages: int) -> None:
    """Gradients and metrics with the adapter, in two steps each, are those without. stages: of ZeRO."""
    rank, _ = join()
    deepspeed_on_gloo()
    for stage in stages:
        check_stage(rank, stage)
    end_rank()


def check_stage(rank: int, stage: int) -> None:
    actor = make_actor(temperature=0.8)
    under_zero(actor, stage)
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        make_small_chunks(patch)
        for name, (loss, settings) in LOSSES.items():
            trainer = make_trainer(actor, host.PolicyLoss(**loss), **settings)
            theirs = step(trainer, rank)
            remove = install()
            try:
                for _ in range(2):
                    compare(step(trainer, rank), theirs, f"ZeRO-{stage}, {name}")
            finally:
                remove()


def under_zero(actor: Any, stage: int) -> None:
    """The actor's model becomes DeepSpeed's engine, as OpenRLHF's strategy does it, with a step that changes nothing."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam", "params": {"torch_adam": True, "lr": 0.0}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    head_of(actor.model)  # the transform of its logits, before the parameters are split
    actor.model, *_ = deepspeed.initialize(model=actor.model, config=config)


def step(trainer: Any, rank: int) -> dict[str, torch.Tensor]:
    """Metrics, and gradients between OpenRLHF's own backward pass and its optimizer step."""
    from deepspeed.utils import safe_get_full_grad
    from openrlhf.utils.deepspeed import DeepspeedStrategy

    own, found = DeepspeedStrategy.__new__(DeepspeedStrategy), {}

    def optimizer_step(optimizer: Any, actor: Any, *more: Any, **options: Any) -> None:
        found.update((n, safe_get_full_grad(p).clone()) for n, p in actor.model.module.named_parameters())
        own.optimizer_step(optimizer, actor, *more, **options)

    trainer.strategy.backward, trainer.strategy.optimizer_step = own.backward, optimizer_step
    trainer.strategy.get_grad_norm = own.get_grad_norm
    metrics = training_step(trainer, seed=1 + rank)
    assert len(found) > 10
    return found | metrics


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], what: str) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() <= 1e-5 * max(1e-3, expected.abs().max()), f"{what}: {name}"
