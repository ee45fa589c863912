"""DeepSpeed's configuration for a run, and its lazy import."""

from __future__ import annotations

import os
from typing import Any

import torch

from pact_fast.config import TrainerConfig
from pact_fast.errors import PactError

REFUSED = {  # settings of zero_optimization, and the assumptions of trainer and checkpoints that they break
    "round_robin_gradients": "a checkpoint takes the parts of the optimizer state in the order of the parameters",
    "mics_shard_size": "each rank saves its own part of the training state, over all ranks",
    "zenflow": "weights and moments must change in the optimizer step alone",
    "super_offload": "weights and moments must change in the optimizer step alone",
}


def deepspeed_config(trainer: TrainerConfig, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration. `trainer.deepspeed.args` is merged into it and takes precedence.

    Only for runs with `trainer.deepspeed`. `dtype` is `model.dtype`; with "bfloat16", gradients accumulate in fp32.
    PactError: `args` has an unsupported setting.
    """
    settings = trainer.deepspeed
    assert settings is not None
    zero: dict[str, Any] = {
        "stage": settings.stage,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
    }
    for name, device in (("optimizer", settings.offload_optimizer), ("param", settings.offload_param)):
        if device != "none":
            zero[f"offload_{name}"] = {"device": device, "pin_memory": torch.cuda.is_available()}
            if device == "nvme":
                zero[f"offload_{name}"]["nvme_path"] = settings.nvme_path
    bf16 = dtype == "bfloat16"
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": trainer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "steps_per_print": None,
    }
    if bf16:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    merged = _deep_merge(config, settings.args)
    _check_supported(merged["zero_optimization"], bf16)
    return merged


def _check_supported(zero: dict[str, Any], bf16: bool) -> None:
    """PactError for settings that would not start, or would train, save or resume something else."""
    offload = zero.get("offload_optimizer") or {}
    if bf16 and zero.get("stage") == 1 and not offload:
        raise PactError(
            "trainer.deepspeed.stage=1 with model.dtype=bfloat16: DeepSpeed takes an optimizer for it that the trainer does "
            "not know; set trainer.deepspeed.stage=2, which shards gradients, too"
        )
    found = [key for key in REFUSED if zero.get(key) or (isinstance(offload, dict) and offload.get(key))]
    if found:
        raise PactError(
            f"trainer.deepspeed.args: zero_optimization.{found[0]} is not supported: {REFUSED[found[0]]}; leave it out"
        )


def import_deepspeed(device: torch.device) -> Any:
    """The deepspeed module, set up for `device` before it is imported. Raises PactError if it is not installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # no op is compiled, so the CUDA toolkit need not match torch's
    try:
        import deepspeed
    except ImportError as error:
        raise PactError(
            f"trainer.deepspeed needs the deepspeed package ({error}); pip install 'pact-fast[deepspeed]', or leave "
            "trainer.deepspeed out"
        ) from None
    return deepspeed


def _deep_merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        both_dicts = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _deep_merge(base[key], value) if both_dicts else value
    return merged
