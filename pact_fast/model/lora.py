"""Low-rank adapters on the policy: only they train; the weights under them stay as they were loaded.

peft's layers are put into the model in place. So the policy remains the transformers model that it was, with its trunk,
its head and its attention where everything else looks for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pact_fast.config import LoraConfig
from pact_fast.errors import PactError
from pact_fast.model.adapter import NAME, adapted_layers, adapter_tensors, read_adapter, write_adapter


def attach(model: PreTrainedModel, settings: LoraConfig, seed: int) -> None:
    """Put new adapters, which change nothing yet, into the model, and freeze everything else."""
    peft = _import_peft()
    torch.manual_seed(seed)  # the same adapters in every run, whatever was made before
    wanted = peft.LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, target_modules=settings.target_modules, lora_dropout=0.0
    )
    try:
        peft.inject_adapter_in_model(wanted, model)
    except ValueError as error:
        raise PactError(f"model.lora.target_modules: {' '.join(str(error).split())[:200]}") from None
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        if hasattr(part, "base_layer"):  # losses and engines read their weights as they are
            raise PactError("model.lora.target_modules: embedding and head take no adapter; name other layers")


def save(model: PreTrainedModel, adapters: dict[str, torch.Tensor], folder: Path, settings: LoraConfig) -> None:
    """`adapters` alone, as peft does: PeftModel.from_pretrained(base, folder) loads them."""
    write_adapter(folder, adapters, alpha=settings.alpha, base=model.config._name_or_path)


def load(model: PreTrainedModel, folder: Path) -> None:
    """Put saved values into the model's adapters, bit for bit."""
    if not (folder / "adapter_config.json").exists():
        raise PactError(f"{folder} holds no adapters, but model.lora is set; go on with the run's own settings")
    saved, own = read_adapter(folder), adapter_tensors(model)
    odd = [name for name in own.keys() | saved.keys() if own.get(name, _NONE).shape != saved.get(name, _NONE).shape]
    if odd:
        raise PactError(
            f"the adapters in {folder} do not fit model.lora: '{min(odd)}' differs; go on with the run's own settings"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    """Add the adapters to the weights under them, and take their layers out of the model."""
    for name, layer in list(adapted_layers(model)):
        layer.base_layer.weight += layer.get_delta_weight(NAME)
        model.set_submodule(name, layer.base_layer)


@contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[None]:
    """The model as it was before training, while this lasts. Nothing happens to a model without adapters."""
    layers = [layer for _, layer in adapted_layers(model)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


_NONE = torch.empty(0)


def _import_peft():
    try:
        import peft
    except ImportError as error:
        raise PactError(
            f"model.lora needs the peft package ({error}); pip install 'pact-fast[lora]', or leave model.lora out"
        ) from None
    return peft
