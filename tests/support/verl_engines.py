"""verl's FSDP2 engine on the CPU with gloo, and micro-batches for it."""

from __future__ import annotations

import functools
import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM
from verl.plugin.platform import PlatformBase, set_platform


class CpuPlatform(PlatformBase):
    """verl knows accelerators only, and lets anybody register another platform."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = torch.cpu

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CPU_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def nvtx_range(self, msg: str) -> Any:
        return nullcontext()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def _nothing(self, *args: Any) -> None:
        return None

    manual_seed_all = manual_seed
    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing


def use_the_cpu() -> None:
    """Before verl's engines are imported, which ask for the device."""
    set_platform(CpuPlatform())
    name = "trl.experimental.ppo"
    if importlib.util.find_spec("trl") and not _has_module(name):  # verl patches a class that TRL no longer has
        sys.modules[name] = ModuleType(name)
        sys.modules[name].AutoModelForCausalLMWithValueHead = type("AutoModelForCausalLMWithValueHead", (), {})


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def save_model(path: Path, **options: Any) -> str:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, **options,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(path)
    return str(path)


def make_engine(engine_class: Any, model: str, strategy: str = "fsdp2", **options: Any) -> Any:
    """An engine of fp32 parameters. options: of `HFModelConfig`."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

    options = {"use_remove_padding": True, "enable_gradient_checkpointing": False} | options
    settings = HFModelConfig(
        path=model, load_tokenizer=False, override_config={"attn_implementation": "eager"}, **options
    )
    mixed = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    config = FSDPEngineConfig(strategy=strategy, mixed_precision=mixed, use_torch_compile=False)
    optimizer = FSDPOptimizerConfig(lr=0.0, total_training_steps=10)
    engine = engine_class(settings, config, optimizer, CheckpointConfig())
    with mock.patch("verl.workers.engine.fsdp.transformer_impl.FSDP", CpuFSDP):
        engine.initialize()
    return engine


class CpuFSDP(FullyShardedDataParallel):
    """FSDP1 as verl makes it, but for the first broadcast, which torch refuses on the CPU."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options | {"sync_module_states": False})


def batch(*, kl: bool = False, importance: bool = False, entropy: bool = False, seed: int = 1, **settings: Any) -> Any:
    """Four sequences of two prompts, with observations inside the responses."""
    from verl.utils import tensordict_utils as tu

    random = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(1, 300, (n,), generator=random) for n in (5, 3)]
    prompts = [prompts[i] for i in (0, 0, 1, 1)]
    responses = [torch.randint(1, 300, (n,), generator=random) for n in (6, 4, 7, 2)]
    masks = [torch.ones(len(r)) for r in responses]
    masks[0][2:4] = 0
    nested = functools.partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    ids = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]

    def column(scale: float) -> Any:
        return nested([torch.randn(len(r), generator=random) * scale for r in responses])

    old = nested([torch.randn(len(r), generator=random) * 0.3 - 5.7 for r in responses])  # about log 1/300
    columns = {
        "input_ids": nested(ids), "position_ids": nested([torch.arange(len(x)) for x in ids]),
        "prompts": nested(prompts), "responses": nested(responses), "response_mask": nested(masks),
        "loss_mask": nested(masks), "old_log_probs": old, "advantages": column(1.0),
    }  # fmt: skip
    if kl:
        columns["ref_log_prob"] = nested([x + 0.2 for x in old.unbind()])
    if importance:
        columns["rollout_is_weights"] = nested([x.abs() for x in column(1.0).unbind()])
    numbers = {
        "temperature": 0.8, "calculate_entropy": entropy, "global_batch_size": 4, "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": 2, "max_token_len_per_gpu": 100,
    }  # fmt: skip
    settings = numbers | settings
    if isinstance(settings["temperature"], torch.Tensor):  # one per sequence is a column
        columns["temperature"] = settings.pop("temperature")
    return tu.get_tensordict(columns, settings)


def supervised_batch() -> Any:
    from verl.utils import tensordict_utils as tu

    random = torch.Generator().manual_seed(2)
    nested = functools.partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    ids = [torch.randint(1, 300, (n,), generator=random) for n in (9, 6, 8, 5)]
    masks = [(torch.arange(len(x)) >= 3).long() for x in ids]
    columns = {
        "input_ids": nested(ids), "position_ids": nested([torch.arange(len(x)) for x in ids]),
        "loss_mask": nested(masks),
    }  # fmt: skip
    numbers = {"temperature": 1.0, "use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2, "global_batch_size": 4}
    return tu.get_tensordict(columns, numbers)


def policy_loss(mode: str = "vanilla", **options: Any) -> Any:
    from verl.workers.config import ActorConfig
    from verl.workers.config.actor import PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    config = ActorConfig(
        strategy="fsdp2", rollout_n=2, ppo_micro_batch_size_per_gpu=2, ppo_mini_batch_size=4,
        policy_loss=PolicyLossConfig(loss_mode=mode), **options,
    )  # fmt: skip
    return functools.partial(ppo_loss, config=config)


def step(engine: Any, data: Any, loss: Any) -> dict[str, torch.Tensor]:
    """Gradients of all parameters, loss and metrics of a step of two micro-batches."""
    with engine.train_mode():
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(data, loss)
        gradients = {name: p.grad for name, p in engine.module.named_parameters() if p.grad is not None}
        found = {n: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for n, g in gradients.items()}
    metrics = {name: torch.tensor(_number(values)) for name, values in output["metrics"].items()}
    return found | metrics | {"loss": torch.tensor(output["loss"])}


def _number(metric: Any) -> Any:
    return metric.aggregate() if hasattr(metric, "aggregate") else metric
