"""head_of: weight, bias, logit scale and soft-cap of the language-model head of a Hugging Face model, adapters included.

Models and adapters are recognised by their methods and attributes: nothing but torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from pact_fast.errors import PactError
from pact_fast.kernels.head.logit_transform import LogitTransform, causal_lm_of, head_layer, logit_transform

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_transforms: WeakKeyDictionary[torch.nn.Module, LogitTransform] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Head:
    """A language-model head as the functions of `pact_fast.kernels` take it: `head.input(hidden)`, `head.weight`,
    `**head.options`.

    weight       [V, D]  connected to the model's parameters; [V, D + r] with LoRA of rank r on the head
    bias         [V] or None
    logit_scale  factor of hWᵀ + b
    softcap      bound of the logits, or None
    input_scale  factor of the hidden states, which `input` applies
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    input_scale: float = 1.0
    _lora: tuple[tuple[Any, Any, float], ...] = ()  # (A, dropout, scaling) of each active adapter

    def input(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the factor of `weight` for hidden states [..., D] of the decoder: [..., D + r] with LoRA.

        h·(W + s·B·A)ᵀ = [h, s·h·Aᵀ]·[W, B]ᵀ: exact, and the base weight is neither changed nor copied in fp32.
        """
        x = hidden if self.input_scale == 1.0 else hidden * self.input_scale
        if not self._lora:
            return x
        low_rank = [scaling * a(dropout(x.to(a.weight.dtype))) for a, dropout, scaling in self._lora]
        return torch.cat([x, *(part.to(x.dtype) for part in low_rank)], -1)

    @property
    def options(self) -> dict[str, Any]:
        """bias, logit_scale and softcap, the keyword arguments of the same names."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def head_of(model: Any) -> Head:
    """The head that makes the logits of a causal LM of transformers, also of one wrapped by peft, DDP or DeepSpeed.

        head = head_of(model)
        linear_logprob(head.input(hidden), head.weight, targets, **head.options)

    Scale and soft-cap are found by running the model class's own code between decoder and logits on known values, once
    per model. The tensors are those of the moment: call it in every forward pass. Gradients reach the parameters:
    those of an FSDP2 shard (DTensor) are averaged over the ranks as FSDP2 does. Under ZeRO-3, call it inside the forward
    of the model, where DeepSpeed gathers what is read. LoRA on the head and `modules_to_save` of peft are included, as far
    as they are active.

    Raises:
        PactError: The model has no such head, or it has an unsupported feature, which the message names.
    """
    causal_lm = causal_lm_of(model)
    layer = head_layer(causal_lm)
    if causal_lm not in _transforms:
        _transforms[causal_lm] = logit_transform(causal_lm)
    transform, family = _transforms[causal_lm], causal_lm.config.model_type
    layer = _saved_module(layer)
    weight, bias, lora = _plain(layer, family)
    return Head(weight, bias, transform.logit_scale, transform.softcap, transform.input_scale, lora)


def _saved_module(layer: Any) -> Any:
    """The active copy of a module that peft trains as a whole (`modules_to_save`)."""
    if not hasattr(layer, "modules_to_save"):
        return layer
    active = [name for name in layer.active_adapters if name in layer.modules_to_save]
    return layer.original_module if layer.disable_adapters or not active else layer.modules_to_save[active[0]]


def _plain(layer: Any, family: str) -> tuple[torch.Tensor, torch.Tensor | None, tuple[tuple[Any, Any, float], ...]]:
    """(weight, bias, LoRA) of a linear layer, perhaps with adapters."""
    if not hasattr(layer, "base_layer"):
        return *_parameters(layer, family), ()
    if not hasattr(layer, "lora_A"):
        raise PactError(
            f"{family}: the head has an adapter of type {type(layer).__name__}; use LoRA, or none on the head"
        )
    weight, bias = _parameters(layer.base_layer, family)
    adapters = () if layer.disable_adapters or layer.merged else tuple(_active_adapters(layer))
    weights, lora = [weight], []
    for name in adapters:
        if name in getattr(layer, "lora_variant", {}):
            raise PactError(f"{family}: the head's adapter '{name}' is a variant of LoRA, such as DoRA; use plain LoRA")
        b, b_bias = _parameters(layer.lora_B[name], family)
        if b_bias is not None:
            raise PactError(f"{family}: the head's adapter '{name}' has a bias; set lora_bias=False")
        weights.append(b.to(weight.dtype))
        lora.append((layer.lora_A[name], layer.lora_dropout[name], layer.scaling[name]))
    return (torch.cat(weights, 1) if adapters else weight), bias, tuple(lora)


def _active_adapters(layer: Any) -> Iterator[str]:
    return (name for name in layer.active_adapters if name in layer.lora_A)


def _parameters(layer: Any, family: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a layer as whole tensors."""
    return tuple(
        None if parameter is None else _whole(parameter, family)
        for parameter in (layer.weight, getattr(layer, "bias", None))
    )  # type: ignore[return-value]


def _whole(parameter: torch.Tensor, family: str) -> torch.Tensor:
    if parameter.dtype not in DTYPES:
        dtype = str(parameter.dtype).removeprefix("torch.")
        raise PactError(f"{family}: the head's weight is {dtype}, quantized; leave the head out of quantization")
    if hasattr(parameter, "full_tensor"):
        return _full_tensor(parameter)
    if hasattr(parameter, "ds_shape") and tuple(parameter.shape) != tuple(parameter.ds_shape):
        raise PactError(
            f"{family}: ZeRO-3 has partitioned the head; call head_of inside the model's forward, or gather it"
        )
    if parameter.ndim == 1 and not parameter.numel():
        raise PactError(f"{family}: FSDP has sharded the head; call head_of inside the model's forward, or use FSDP2")
    return parameter


def _full_tensor(parameter: Any) -> torch.Tensor:
    """All rows of a sharded parameter. Ranks of data parallelism have gradients of their own, whose mean is its gradient.

    Without placements of the gradient, full_tensor takes it for the same on all ranks and keeps that of this rank's rows.
    """
    from torch.distributed.tensor import Partial, Replicate  # takes a second, and not every build of torch has it

    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    same = [name.startswith(("tp", "tensor")) for name in names]  # ranks of tensor parallelism see the same tokens
    ranks = 1
    for dim, replicated in enumerate(same):
        ranks *= 1 if replicated else mesh.size(dim)
    whole = parameter.full_tensor(grad_placements=[Replicate() if r else Partial() for r in same])
    if whole.requires_grad and ranks > 1:
        whole.register_hook(lambda gradient: gradient / ranks)
    return whole
