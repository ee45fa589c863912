"""DeepSpeed ZeRO: optimizer states (stage 1), gradients (2) and parameters (3) split over the processes.

What DeepSpeed is told, and why
- gradients are averaged over processes; ours add up, so every loss is multiplied by their number
- an optimizer step has as many packs as it needs: we say which backward is its last
- AdamW is torch's own, also on an offloaded state: nothing has to be compiled on the user's machine
- a gradient that is not finite skips the step, in every precision
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import ValidationError

from pact_fast.config import TrainerConfig
from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.model.deepspeed import deepspeed_config, import_deepspeed
from pact_fast.model.policy import Policy
from pact_fast.train.backends.replicated import check_fits, make_optimizer

KINDS = ("exp_avg", "exp_avg_sq")  # of AdamW's states; its step counter is one for all parameters
MASTER = "master"  # kind of the fp32 weights that bf16 ones are rounded from


class Zero:
    """See Backend."""

    lockstep = True

    def __init__(self, policy: Policy, trainer: TrainerConfig, dtype: str, world: World):
        assert trainer.deepspeed is not None
        deepspeed = import_deepspeed(policy.model.device)
        self._world, self._model, self._stage = world, policy.model, trainer.deepspeed.stage
        self._bf16 = dtype == "bfloat16"
        optimizer = make_optimizer(policy.model, trainer)
        with _explained():
            self.engine, *_ = deepspeed.initialize(
                model=policy, optimizer=optimizer, config=deepspeed_config(trainer, dtype), dist_init_required=False
            )
        self._make_states()

    def forward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        with self._world.peer_errors("parameters"):
            return self.engine(*args)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        with self._world.peer_errors("gradients"):
            self.engine.backward(loss * self._world.size)

    def step(self, learning_rate: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        with self._world.peer_errors("gradients"):
            self.engine.step()
        norm = self.engine.get_global_grad_norm()
        if not self.engine.was_step_applied():
            return float("nan")
        return float(norm)

    def discard(self) -> None:
        """DeepSpeed forgets gradients in a step that it skips."""
        raise NotImplementedError("ZeRO cannot take gradients back")

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self._trained().items():
            if self._bf16:
                yield f"{name}/{MASTER}", safe_get_full_fp32_param(parameter)
            for kind in KINDS:
                yield f"{name}/{kind}", safe_get_full_optimizer_state(parameter, kind)
            yield f"{name}/step", self._steps()

    def load_state(self, saved: Mapping[str, torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameters = self._trained()
        steps = torch.zeros(())
        for key, value in saved.items():
            name, _, kind = key.rpartition("/")
            check_fits(name, kind, value.shape, parameters)
            if kind == MASTER:
                safe_set_full_fp32_param(parameters[name], value)
            elif kind in KINDS:
                safe_set_full_optimizer_state(parameters[name], value, kind)
            else:
                steps = value
        for state in self._base().state.values():
            if "step" in state:
                state["step"].copy_(steps)

    def _make_states(self) -> None:
        """AdamW's states before its first step: a checkpoint has them by then, and DeepSpeed 0.19 looks for those of all groups
        when the first one has stepped.
        """
        optimizer = self.engine.optimizer
        if self._stage < 3:
            for part in optimizer.single_partition_of_fp32_groups:
                self._make_state(part)
            optimizer._lazy_init_hp_params_optimizer_state()
            return
        for index, part in enumerate(optimizer.fp32_partitioned_groups_flat):
            on_disk = optimizer._swappable_optimizer_subgroup(index)
            if on_disk:
                optimizer._optimizer_states_and_gradient_swap_in(index)
            self._make_state(part)
            if on_disk:
                optimizer._optimizer_states_and_gradient_swap_out(index)

    def _make_state(self, part: torch.Tensor) -> None:
        moments = {kind: torch.zeros_like(part, requires_grad=False) for kind in KINDS}
        self._base().state[part] = {"step": part.new_zeros((), dtype=torch.float32), **moments}

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}

    def _base(self) -> torch.optim.Optimizer:
        """torch's AdamW under DeepSpeed's wrapper."""
        return getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)

    def _steps(self) -> torch.Tensor:
        known = [state["step"].cpu() for state in self._base().state.values() if "step" in state]
        return known[0] if known else torch.zeros(())


def split_frozen(
    policy: Policy, trainer: TrainerConfig, dtype: str, world: World
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The forward pass of a policy that is not trained, whose weights are split over the processes as those of stage 3 are."""
    deepspeed = import_deepspeed(policy.model.device)
    config = deepspeed_config(trainer, dtype)
    config["zero_optimization"].pop("offload_optimizer", None)
    with _explained():
        engine, *_ = deepspeed.initialize(model=policy, config=config, dist_init_required=False)

    def forward(*args: Any) -> tuple[torch.Tensor, ...]:
        with world.peer_errors("parameters"):
            return engine(*args)

    return forward


@contextmanager
def _explained() -> Iterator[None]:
    """DeepSpeed's complaints about settings, as errors that name ours."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise PactError(f"trainer.deepspeed.args: DeepSpeed does not take '{key}': {first['msg']}") from error
    except RuntimeError as error:
        if "async_io" not in str(error):
            raise
        raise PactError(
            "trainer.deepspeed: offloading to nvme needs DeepSpeed's async_io, which is compiled at first use and needs a C++ "
            "compiler and libaio (apt install libaio-dev)"
        ) from error
