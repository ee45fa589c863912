"""TRL's real trainers on several ranks under DeepSpeed's ZeRO-3; each rank checks its own results (test_trl.py)."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.host_ranks import join
from tests.support.processes import deepspeed_on_gloo, end_rank

ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "zero_optimization": {  # weights are released as early as those of a large model
        "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0,
    },
    "optimizer": {"type": "Adam", "params": {"torch_adam": True, "lr": 0.0}},
}  # fmt: skip
# The mode of each optimizer step; None: TRL's own code. The first mode is installed before DeepSpeed's engine is made.
GRPO = ("tree", "tree", None, "loss", "head")
SFT = ("loss", "loss", None, "head")


def steps(folder: Path) -> None:
    """Gradients with the adapter, in all of its modes, are those without, for GRPO and SFT. `folder` has the model.

    The learning rate is 0, and a step has all of the data: every step of a trainer has the same gradients.
    """
    join()
    deepspeed_on_gloo()
    accelerate_on_gloo()
    from tests.support.trl_trainers import grpo_trainer, sft_trainer

    options = {"deepspeed": ZERO3, "use_cpu": False, "learning_rate": 0.0, "gradient_accumulation_steps": 2}
    trainer = grpo_trainer(folder, max_steps=len(GRPO), shuffle_dataset=False, **options)
    generate_once(trainer)
    check("GRPO", GRPO, trainer)
    check("SFT", SFT, sft_trainer(folder, model=str(folder / "model"), max_steps=len(SFT), **options))
    end_rank()


def accelerate_on_gloo() -> None:
    """Accelerate takes DeepSpeed for a sign of accelerators, and one process for all where there is none."""
    from accelerate.state import DistributedType, PartialState

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.NO)


def generate_once(trainer: Any) -> None:
    """All steps of a GRPO trainer get the completions of the first."""
    generate, found = trainer._generate, []

    def first(*given: Any) -> Any:
        if not found:
            found.append(generate(*given))
        return copy.deepcopy(found[0])

    trainer._generate = first


def check(name: str, modes: tuple[str | None, ...], trainer: Any) -> None:
    found = train(trainer, modes)
    assert len(found) == len(modes)
    theirs = found[modes.index(None)]
    for step, (mode, ours) in enumerate(zip(modes, found, strict=True)):
        compare(ours, theirs, f"{name}, step {step}, {mode}")


def train(trainer: Any, modes: tuple[str | None, ...]) -> list[dict[str, torch.Tensor]]:
    """Gradients of all parameters in each optimizer step, which has the mode of the adapter that is given."""
    from transformers import TrainerCallback

    from pact_fast.integrations.trl import install

    class Install(TrainerCallback):
        installed: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.switch(modes[state.global_step], modes[max(0, state.global_step - 1)])

        def switch(self, mode: str | None, before: str | None) -> None:
            if mode == before:
                return
            if self.installed is not None:
                self.installed.remove()
            self.installed = None if mode is None else install(trainer, mode)
            assert mode is None or (mode in self.installed.served and not self.installed.reasons)

    callback = Install()
    callback.switch(modes[0], None)
    trainer.add_callback(callback)
    with gradients() as found:
        trainer.train()
    return found


@contextmanager
def gradients() -> Iterator[list[dict[str, torch.Tensor]]]:
    """Filled at every optimizer step, in which no weight may be left gathered."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.utils import safe_get_full_grad

    found: list[dict[str, torch.Tensor]] = []
    own = DeepSpeedEngine.step

    def step(self: Any, *args: Any, **options: Any) -> Any:
        if self.is_gradient_accumulation_boundary():
            parameters = dict(self.module.named_parameters())
            gathered = [name for name, p in parameters.items() if p.numel()]
            assert not gathered, f"step {len(found)}: {gathered} are not released"
            found.append({name: safe_get_full_grad(p).clone() for name, p in parameters.items()})
        return own(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepSpeedEngine, "step", step)
        yield found


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], what: str) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 10
    scale = max(float(b.norm()) for b in theirs.values())
    assert scale > 0
    for name, b in theirs.items():
        difference = float((ours[name] - b).norm()) / max(float(b.norm()), 1e-3 * scale)
        assert difference < 1e-5, f"{what}: {name} differs by {difference:.1e}"
