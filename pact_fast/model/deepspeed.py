"""DeepSpeed: its lazy import, and its configuration for a run."""

from __future__ import annotations

import os
from typing import Any

import torch

from pact_fast.config import TrainerConfig
from pact_fast.errors import PactError


def deepspeed_config(trainer: TrainerConfig, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration for a run. `trainer.deepspeed.args` is laid over it, section by section."""
    own = trainer.deepspeed
    assert own is not None
    zero: dict[str, Any] = {"stage": own.stage, "overlap_comm": torch.cuda.is_available(), "contiguous_gradients": True}
    for what, where in (("optimizer", own.offload_optimizer), ("param", own.offload_param)):
        if where != "none":
            zero[f"offload_{what}"] = {"device": where, "pin_memory": torch.cuda.is_available()}
            if where == "nvme":
                zero[f"offload_{what}"]["nvme_path"] = own.nvme_path
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
    return _deep_merge(config, own.args)


def import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # it compares the toolkit's version, of which nothing is compiled
    try:
        import deepspeed
    except ImportError as error:
        raise PactError(
            f"trainer.deepspeed needs the deepspeed package ({error}); pip install 'pact-fast[deepspeed]', or leave it out"
        ) from None
    return deepspeed


def _deep_merge(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in more.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _deep_merge(base[key], value) if both else value
    return merged
