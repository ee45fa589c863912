"""LoRA: low-rank adapters on the policy. Only they are trained; the base weights stay as they were loaded.

peft's layers are injected into the model in place, so the policy remains a plain transformers model, whose decoder,
head and attention are found where they are without LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from pact_fast.config import LoraConfig
from pact_fast.errors import PactError, error_line
from pact_fast.model.adapter import ADAPTER_NAME, adapted_layers, adapter_tensors, read_adapter, write_adapter


def attach(model: PreTrainedModel, settings: LoraConfig, seed: int) -> None:
    """Inject new adapters into the model, with B = 0, and freeze all other parameters.

    Raises PactError if peft is missing, or if `settings.target_modules` matches no layer, the embedding or the head.
    """
    peft = _import_peft()
    torch.manual_seed(seed)  # A depends on the seed alone, not on what was drawn before
    lora_config = peft.LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, target_modules=settings.target_modules, lora_dropout=0.0
    )
    try:
        peft.inject_adapter_in_model(lora_config, model)
    except ValueError as error:
        raise PactError(f"model.lora.target_modules: {' '.join(str(error).split())[:200]}") from None
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        if hasattr(part, "base_layer"):  # the fused head and the engines read these weights directly
            raise PactError("model.lora.target_modules: embedding and head cannot have adapters; name other layers")


def save(model: PreTrainedModel, adapters: dict[str, torch.Tensor], folder: Path, settings: LoraConfig) -> None:
    """Write the adapters in peft's format: PeftModel.from_pretrained(base, folder) loads them."""
    write_adapter(folder, adapters, alpha=settings.alpha, base=model.config._name_or_path)


def load(model: PreTrainedModel, folder: Path) -> None:
    """Copy saved values into the model's adapters.

    Raises PactError if the folder has none, or if their names or shapes differ from the model's.
    """
    if not (folder / "adapter_config.json").exists():
        raise PactError(
            f"{folder} holds no adapters, but model.lora is set; resume with the settings that the run began with"
        )
    saved, current = read_adapter(folder), adapter_tensors(model)
    mismatched = [
        name
        for name in current.keys() | saved.keys()
        if current.get(name, _MISSING).shape != saved.get(name, _MISSING).shape
    ]
    if mismatched:
        raise PactError(
            f"the adapters in {folder} do not fit model.lora: '{min(mismatched)}' differs; resume with the settings "
            "that the run began with"
        )
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(saved[name])


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    """Add the adapters to the base weights, W + scaling·B·A, and replace the adapted layers by plain ones."""
    for name, layer in list(adapted_layers(model)):
        layer.base_layer.weight += layer.get_delta_weight(ADAPTER_NAME)
        model.set_submodule(name, layer.base_layer)


@torch.no_grad()
def merge_saved(model: PreTrainedModel, folder: Path) -> None:
    """Add adapters in peft's format to the weights of a model without any, W + alpha/r·B·A.

    Raises PactError if they are not plain LoRA, or not for this model.
    """
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        scaling = float(settings["lora_alpha"]) / int(settings["r"])
        saved = read_adapter(folder)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise PactError(f"the adapters in {folder} cannot be read: {error_line(error)}") from None
    if extra := [key for key in _OTHER_ADAPTERS if settings.get(key)]:
        raise PactError(f"the adapters in {folder} use {extra[0]}; only plain LoRA of linear layers can be merged here")
    layers = dict(model.named_modules())
    for name in sorted({name.rpartition(".lora_")[0] for name in saved}):
        down, up = (saved.get(f"{name}.lora_{part}.weight", _MISSING) for part in "AB")
        layer = layers.get(name)
        shape = up.shape[:1] + down.shape[1:]
        if not isinstance(layer, torch.nn.Linear) or up.shape[1:] != down.shape[:1] or shape != layer.weight.shape:
            raise PactError(f"the adapters in {folder} do not fit the model: '{name}' differs; name its own base model")
        layer.weight += scaling * (up.to(layer.weight) @ down.to(layer.weight))


@contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[None]:
    """Disable the adapters, if there are any, while the context lasts: the model before training."""
    layers = [layer for _, layer in adapted_layers(model)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


_MISSING = torch.empty(0)
_OTHER_ADAPTERS = (
    "use_dora",
    "use_rslora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "fan_in_fan_out",
)


def _import_peft():
    try:
        import peft
    except ImportError as error:
        raise PactError(
            f"model.lora needs the peft package ({error}); pip install 'pact-fast[lora]', or leave model.lora out"
        ) from None
    return peft
