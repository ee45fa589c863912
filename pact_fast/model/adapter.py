"""LoRA adapters of a model as tensors, and as the two files that peft reads and writes.

Adapted layers are recognised by the attributes that peft gives them, so peft is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pact_fast.model.weights import gathered

ADAPTER_NAME = "default"  # peft's name for the first adapter of a model
PEFT_PREFIX = "base_model.model."  # of the names of the tensors in peft's files


def adapted_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer that computes W·x + scaling·B·A·x, with the names of a model without adapters."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name.removeprefix(PEFT_PREFIX), module


def adapter_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A [r, in] and B [out, r] of every adapted layer; {} without adapters.

    Names are those of peft's files without PEFT_PREFIX. Under ZeRO-3 they are copies, and all ranks have to call.
    """
    tensors = {}
    for name, layer in adapted_layers(model):
        tensors[f"{name}.lora_A.weight"] = layer.lora_A[ADAPTER_NAME].weight
        tensors[f"{name}.lora_B.weight"] = layer.lora_B[ADAPTER_NAME].weight
    with gathered(tensors.values()) as partitioned:
        return {name: tensor.detach().clone() for name, tensor in tensors.items()} if partitioned else tensors


def engine_adapter(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The adapter tensors for an engine that computes in `dtype`, with the scaling multiplied into B.

    An engine may or may not fold the scaling into B, and rounds where it does. With a scaling of 1 the values that it
    holds can be compared bit for bit with those that were sent.
    """
    tensors = adapter_tensors(model)
    scaling = {f"{name}.lora_B.weight": layer.scaling[ADAPTER_NAME] for name, layer in adapted_layers(model)}
    return {name: (tensor.detach() * scaling.get(name, 1.0)).to(dtype) for name, tensor in tensors.items()}


def write_adapter(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, alpha: float | None = None, base: str = ""
) -> None:
    """Write adapter_model.safetensors and adapter_config.json to a new folder.

    Args:
        folder: The folder; it must not exist.
        tensors: A and B of every layer, see `adapter_tensors`.
        alpha: The scaling is alpha / r. None: the scaling is 1.
        base: Name or path of the base model.
    """
    folder.mkdir(parents=True)
    layers = {name.rpartition(".lora_")[0]: tensor for name, tensor in tensors.items() if ".lora_A." in name}
    rank = len(next(iter(layers.values())))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": rank if alpha is None else alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": list(layers), "inference_mode": True,
    }  # fmt: skip
    entries = {PEFT_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(entries, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of adapter_model.safetensors, with the names of `adapter_tensors`."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
