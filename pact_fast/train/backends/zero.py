"""`Zero`: DeepSpeed ZeRO shards optimizer states (stage 1), gradients (2) and parameters (3) over ranks.

How DeepSpeed is used, and why:

- DeepSpeed averages gradients over ranks; ours must be summed, so every loss is multiplied by the number of ranks.
- An optimizer step has a variable number of packs: we mark the last backward pass as the accumulation boundary.
- AdamW is torch's own, also for offloaded state, so nothing has to be compiled on the user's machine.
- A gradient that is not finite skips the step, in every precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import ValidationError

from pact_fast.batch.packing import PackedBatch
from pact_fast.config import TrainerConfig
from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.kernels.head.tokens import LossTokens
from pact_fast.model.deepspeed import deepspeed_config, import_deepspeed
from pact_fast.model.policy import Policy
from pact_fast.model.sharded_weights import own_range
from pact_fast.model.tensor_files import TensorFiles, fragment_key
from pact_fast.train.backends.base import Forward
from pact_fast.train.backends.replicated import check_fits, make_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's per-parameter states; its step counter is shared by all parameters
MASTER = "master"  # state name of the fp32 weights that bf16 weights are rounded from


class Zero:
    """DeepSpeed ZeRO stages 1 to 3; a `Backend`. It cannot discard gradients: DeepSpeed drops them only in a step."""

    lockstep = sharded = True

    def __init__(self, policy: Policy, trainer: TrainerConfig, dtype: str, world: World):
        assert trainer.deepspeed is not None
        deepspeed = import_deepspeed(policy.model.device)
        self._world, self._model, self._stage = world, policy.model, trainer.deepspeed.stage
        self._kinds = (MASTER, *MOMENTS) if dtype == "bfloat16" else MOMENTS
        optimizer = make_optimizer(policy.model, trainer)
        with _translate_errors():
            self.engine, *_ = deepspeed.initialize(
                model=policy, optimizer=optimizer, config=deepspeed_config(trainer, dtype), dist_init_required=False
            )
        self._make_states()

    def forward(
        self,
        batch: PackedBatch,
        tokens: LossTokens,
        temperature: float | torch.Tensor,
        loss: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        with self._world.peer_errors("parameters"):
            return self.engine(batch, tokens, temperature, loss)

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

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._trained().items():
            start, stop = self._own_range(parameter)
            for kind in self._kinds if start < stop else ():
                yield fragment_key(f"{name}/{kind}", _whole_shape(parameter), start), self._own_part(parameter, kind)
            if self._world.is_main:  # the same in all
                yield f"{name}/step", self._steps()

    def changed_by_step(self) -> Iterator[torch.Tensor]:
        optimizer = self.engine.optimizer
        if self._stage < 3:
            yield from self._trained().values()
            parts = optimizer.single_partition_of_fp32_groups
        else:  # DeepSpeed gathers and releases whole weights, and swaps what is on a disk, whenever it wants
            yield from (parameter.ds_tensor for parameter in self._model.parameters())
            groups = enumerate(optimizer.fp32_partitioned_groups_flat)
            parts = [part for index, part in groups if not optimizer._swappable_optimizer_subgroup(index)]
        for part in parts:
            yield part
            yield from (self._adamw().state[part][kind] for kind in MOMENTS)

    def load_state(self, saved: Mapping[str, torch.Tensor]) -> None:
        assert isinstance(saved, TensorFiles)
        parameters = self._trained()
        steps = torch.zeros(())
        for key in saved:
            name, _, kind = key.rpartition("/")
            check_fits(name, kind, saved.shape(key), parameters)
            if kind == "step":
                steps = saved[key]
            elif kind in self._kinds:
                start, stop = self._own_range(parameters[name])
                if start < stop:
                    self._set_part(parameters[name], kind, saved.part(key, start, stop))
        for state in self._adamw().state.values():
            if "step" in state:
                state["step"].copy_(steps)

    def _own_range(self, parameter: Any) -> tuple[int, int]:
        """(start, stop) of this rank's part of the flat state; empty if it has none."""
        if self._stage == 3:
            return own_range(parameter, self._world.rank)
        if parameter._hp_mapping is None:
            return 0, 0
        place = parameter._hp_mapping.lp_fragment_address
        return place.start, place.start + place.numel

    def _own_part(self, parameter: Any, kind: str) -> torch.Tensor:
        """This rank's part, which is not empty."""
        key = None if kind == MASTER else kind
        if self._stage < 3:
            return parameter._hp_mapping.get_hp_fragment(key).detach()
        optimizer = self.engine.optimizer
        # the public function's result before it is copied to the GPU
        part, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=True, optim_state_key=key)
        start, stop = self._own_range(parameter)
        return part.detach()[: stop - start]

    def _set_part(self, parameter: Any, kind: str, value: torch.Tensor) -> None:
        """Set the tensors that `_own_part` returns."""
        if self._stage < 3:
            self._own_part(parameter, kind).copy_(value)
            return
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        value = torch.nn.functional.pad(value, (0, parameter.ds_tensor.numel() - len(value)))
        if kind == MASTER:
            safe_set_local_fp32_param(parameter, value)
        else:
            safe_set_local_optimizer_state(parameter, value, kind)

    def _make_states(self) -> None:
        """Create AdamW's states before the first step.

        A checkpoint may be loaded before the first step, and DeepSpeed 0.19 expects the states of all groups once the
        first group has stepped.
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
        moments = {kind: torch.zeros_like(part, requires_grad=False) for kind in MOMENTS}
        self._adamw().state[part] = {"step": part.new_zeros((), dtype=torch.float32), **moments}

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}

    def _adamw(self) -> torch.optim.Optimizer:
        """torch's AdamW, inside DeepSpeed's wrapper."""
        return getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)

    def _steps(self) -> torch.Tensor:
        steps = [state["step"].cpu() for state in self._adamw().state.values() if "step" in state]
        return steps[0] if steps else torch.zeros(())


def _whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty shape


def sharded_forward(policy: Policy, trainer: TrainerConfig, dtype: str, world: World) -> Forward:
    """Forward pass of a frozen policy (the reference) whose weights ZeRO-3 shards over ranks.

    Args:
        policy: The frozen policy.
        trainer: DeepSpeed settings.
        dtype: "float32" or "bfloat16".
        world: All ranks.
    """
    deepspeed = import_deepspeed(policy.model.device)
    config = deepspeed_config(trainer, dtype)
    config["zero_optimization"].pop("offload_optimizer", None)
    with _translate_errors():
        engine, *_ = deepspeed.initialize(model=policy, config=config, dist_init_required=False)

    def forward(
        batch: PackedBatch,
        tokens: LossTokens,
        temperature: float | torch.Tensor,
        loss: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        with world.peer_errors("parameters"):
            return engine(batch, tokens, temperature, loss)

    return forward


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Turn DeepSpeed's configuration errors into PactErrors that name our keys."""
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
