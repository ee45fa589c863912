"""Operations of a model class between decoder and logits, found by running its code on known values.

Models are those of transformers, recognised by their methods, so that only torch is imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from pact_fast.errors import PactError, error_line

SMALL = 2.0**-12  # logits here: the slope at 0
LARGE = 2.0**20  # a logit here: the bound of a soft-cap


@dataclass(frozen=True)
class LogitTransform:
    """Logits of a model from the hidden states h of its decoder, with the head's weight W and bias b.

        z = softcap · tanh(logit_scale · (input_scale · h Wᵀ + b) / softcap)

    input_scale  factor of the hidden states (MiniCPM)
    logit_scale  factor of the head's output (Granite, Cohere, HyperCLOVA X)
    softcap      bound of the logits (Gemma 2 to 4, nanochat); None: no bound
    """

    input_scale: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's input of hidden states [..., D]."""
        return hidden if self.input_scale == 1.0 else hidden * self.input_scale

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """The model's logits, in the dtype given, of the head's output [..., V]."""
        z = output if self.logit_scale == 1.0 else output * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def causal_lm_of(model: Any) -> Any:
    """The transformers model itself: without DDP, FSDP1, DeepSpeed's engine, torch.compile and peft around it."""
    wrappers = ("module", "_orig_mod", "_fsdp_wrapped_module")
    while (inner := next((m for name in wrappers if (m := model._modules.get(name)) is not None), None)) is not None:
        model = inner
    get_base_model = getattr(model, "get_base_model", None)  # peft
    return get_base_model() if get_base_model else model


def decoder_of(model: Any) -> torch.nn.Module:
    """The decoder below the language-model head: embedding, layers, final norm. Also of a wrapped model."""
    causal_lm = causal_lm_of(model)
    base = causal_lm.base_model
    # the model itself where its class names no attribute of its own as the base model (Llama 4)
    return causal_lm.get_decoder() if base is causal_lm else base


def head_layer(model: Any) -> Any:
    """The linear layer that makes the logits. Raises PactError if the model has none."""
    head: Any = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None or len(full_shape(head.weight)) != 2:
        raise PactError(f"{model.config.model_type}: no linear head makes its logits; use another model")
    return head


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of a parameter, also of one that ZeRO-3 has partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@torch.no_grad()
def logit_transform(model: Any) -> LogitTransform:
    """The transform that the model's own forward code applies around its head.

    Decoder and head are replaced by functions that return known values, so only the code between them and the logits
    runs. No weight is read: it works for models on the meta device and for models that ZeRO-3 has partitioned, and
    takes milliseconds.

    Raises:
        PactError: The code is not a scaling, soft-cap or bias, or does not call decoder and head as modules.
    """
    causal_lm = causal_lm_of(model)
    head, family = head_layer(causal_lm), causal_lm.config.model_type
    on_meta = head.weight.device.type == "meta"
    vocabulary, width = full_shape(head.weight)
    with unset_fake_temporarily(), torch.device("cpu" if on_meta else head.weight.device):
        grid = SMALL * 2.0 ** torch.arange(13, dtype=torch.float64)  # to 1
        grid = torch.cat([grid, torch.arange(2, 101, 14, dtype=torch.float64)])
        outputs = torch.cat([grid, -grid, grid.new_tensor([0.0, LARGE])])
        # every entry of the vocabulary gets all values, so that entries that are treated differently show
        output = outputs[:, None].expand(-1, vocabulary).float()[None]
        hidden = torch.sin(torch.arange(len(outputs) * width, dtype=torch.float32))
        hidden = hidden.view(1, len(outputs), -1)
        seen: list[torch.Tensor] = []

        def give_hidden(*_: Any, **__: Any) -> _DecoderOutput:
            return _DecoderOutput(last_hidden_state=hidden)

        def give_output(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            seen.append(x)
            return output

        ids = torch.zeros(1, len(outputs), dtype=torch.long)
        reason = "its code between decoder and logits cannot be run by itself"
        try:
            with torch.autocast(hidden.device.type, enabled=False), ExitStack() as stack:
                for decoder in {decoder_of(model), causal_lm.get_decoder()}:  # some classes call the inner one (OPT)
                    stack.enter_context(_replaced(decoder, give_hidden))
                stack.enter_context(_replaced(head, give_output))
                # without hooks of trainers, and without the replaced forward of `inside_forward`
                forward = getattr(causal_lm.forward, "own", causal_lm.forward)
                logits = forward(input_ids=ids, use_cache=False).logits
        except Exception as error:
            raise PactError(
                f"{family}: {reason} ({type(error).__name__}: {_line(error)}); use another model"
            ) from error
        if len(seen) != 1 or seen[0].device != hidden.device or logits.shape != output.shape:
            raise PactError(f"{family}: {reason}; use another model")
        return _fit(family, hidden.double(), seen[0].double(), outputs, logits[0].double())


def _fit(
    family: str, hidden: torch.Tensor, head_input: torch.Tensor, outputs: torch.Tensor, logits: torch.Tensor
) -> LogitTransform:
    """The transform with these values: hidden, head_input [1, n, D]; outputs [n] of the head; logits [n, V]."""
    refusal = f"{family}: its logits are no scaling or soft-cap of the head's output; use another model"
    z = logits[:, 0]
    if head_input.shape != hidden.shape or not torch.equal(logits, z[:, None].expand_as(logits)):
        raise PactError(refusal)
    input_scale = _rounded(float((head_input * hidden).sum() / (hidden * hidden).sum()))
    scale = _rounded(float(z[0] / outputs[0]))
    softcap = None
    if not torch.allclose(z, scale * outputs, rtol=1e-6, atol=0.0):
        softcap = _rounded(float(z[-1]))
    found = LogitTransform(input_scale, scale, softcap)
    same_input = torch.allclose(found.hidden(hidden), head_input, rtol=1e-6, atol=1e-7)
    if not (0 < scale < math.inf and same_input and (softcap is None or 0 < softcap < LARGE / 2)):
        raise PactError(refusal)
    if not torch.allclose(found.logits(outputs), z, rtol=1e-5, atol=0.0):
        raise PactError(refusal)
    return found


def _rounded(value: float) -> float:
    """The shortest decimal number or fraction within fp32 rounding: 0.0625, 30 or 1/13 rather than 0.0769230797."""
    if value == 0 or not math.isfinite(value):
        return value
    for candidate in (float(f"{value:.4g}"), 1.0 / float(f"{1.0 / value:.4g}")):
        if abs(candidate - value) <= 2e-7 * abs(value):
            return candidate
    return value


class _DecoderOutput(SimpleNamespace):
    """The output of a decoder, with None for all that model code may pass on beside the hidden states."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


@contextmanager
def _replaced(module: Any, forward: Any) -> Iterator[None]:
    """Give the module another `forward` while the context lasts; hooks and compiled code are left out.

    Hooks of FSDP2 and ZeRO-3 would gather the module's weights, and take these calls for steps of training.
    """
    before = vars(module).get("forward")
    compiled, module._compiled_call_impl = module._compiled_call_impl, forward  # runs in place of forward and hooks
    module.forward = forward
    try:
        yield
    finally:
        module._compiled_call_impl = compiled
        if before is None:
            del module.forward
        else:
            module.forward = before


def _line(error: Exception) -> str:
    return error_line(error, 160)
