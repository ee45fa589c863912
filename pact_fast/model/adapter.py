"""A model's low-rank adapters as tensors, and as the two files that peft reads and writes.

The layers are recognised by what peft gives them; peft itself is not needed to read them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pact_fast.model.weights import gathered

NAME = "default"  # peft's own name of a model's first adapter
PREFIX = "base_model.model."  # of the tensors in peft's files


def adapted_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer that computes W·x + scaling·B·A·x; names as in a model without adapters."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name.removeprefix(PREFIX), module


def adapter_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained A [r, in] and B [out, r] under the names of peft's files, without their prefix; {} without adapters.

    Under ZeRO-3 they are copies, and all processes have to call.
    """
    tensors = {}
    for name, layer in adapted_layers(model):
        tensors[f"{name}.lora_A.weight"] = layer.lora_A[NAME].weight
        tensors[f"{name}.lora_B.weight"] = layer.lora_B[NAME].weight
    with gathered(tensors.values()) as split:
        return {name: tensor.detach().clone() for name, tensor in tensors.items()} if split else tensors


def engine_adapter(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same for an engine that computes in `dtype`, with the scaling in B.

    An engine may keep the scaling apart or fold it in, and round in between; with scaling 1 it has nothing to choose,
    and what it holds can be compared bit for bit with what was sent.
    """
    tensors = adapter_tensors(model)
    scaling = {f"{name}.lora_B.weight": layer.scaling[NAME] for name, layer in adapted_layers(model)}
    return {name: (tensor.detach() * scaling.get(name, 1.0)).to(dtype) for name, tensor in tensors.items()}


def write_adapter(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, alpha: float | None = None, base: str = ""
) -> None:
    """adapter_model.safetensors and adapter_config.json. Without `alpha`, the scaling is 1."""
    folder.mkdir(parents=True)
    layers = {name.rpartition(".lora_")[0]: tensor for name, tensor in tensors.items() if ".lora_A." in name}
    rank = len(next(iter(layers.values())))
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": rank if alpha is None else alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": list(layers), "inference_mode": True,
    }  # fmt: skip
    entries = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(entries, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
