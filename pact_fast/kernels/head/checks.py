"""Checks of the arguments of the head's functions: shapes, types and ranges, one line per error.

Those of values run inside the custom ops, so that compiled graphs check them too. On CUDA they are device-side
assertions, which need no synchronisation.
"""

from __future__ import annotations

import torch

from pact_fast.components import Component, LossContext
from pact_fast.errors import PactError
from pact_fast.kernels.head.tokens import LossTokens


def check_head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise PactError unless hidden is [·, D], weight [V, D] and bias [V] or None."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise PactError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [N, D] and [V, D]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise PactError(f"bias {list(bias.shape)} must have one entry per row of weight {list(weight.shape)}")


def check_present(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise PactError in a backward pass whose weight or bias was released (ZeRO-3, FSDP) after the forward pass."""
    shapes = weight.ndim == 2 and weight.shape[1] == hidden.shape[1]
    shapes = shapes and (bias is None or bias.shape == weight.shape[:1])
    stored = all(p is None or not p.numel() or p.untyped_storage().nbytes() for p in (weight, bias))
    if not shapes or not stored:
        raise PactError(
            f"the weight {list(weight.shape)} or bias was released between the forward and the backward pass; call "
            "linear_logprob in the forward of the module that owns them, or use pact_loss, which needs them only once"
        )


def check_devices(tokens: LossTokens, hidden: torch.Tensor) -> None:
    """Raise PactError unless every column is on the device of hidden."""
    for name, column in tokens.named_columns():
        if column.device != hidden.device:
            raise PactError(
                f"tokens.{name} is on {column.device}, hidden on {hidden.device}; use tokens.to(hidden.device)"
            )


def check_targets(targets: torch.Tensor, vocab: int, ignored: int | None = None) -> None:
    """Raise PactError unless all targets are int64 in [0, vocab), or `ignored`: the kernels index logits with them."""
    if targets.dtype != torch.int64:
        raise PactError(f"token ids are {str(targets.dtype).removeprefix('torch.')}; convert them with .long()")
    outside = (targets < 0) | (targets >= vocab)
    if ignored is None:
        cure = "leave out tokens without a loss instead of marking them with an id like -100"
    else:
        outside &= targets != ignored
        cure = f"mark tokens without a loss with ignore_index={ignored}"
    _refuse(outside, targets, "target", f"is outside the vocabulary of {vocab} (rows of weight); {cure}")


def check_temperature(temperature: torch.Tensor) -> None:
    """Raise PactError unless every temperature [N] is positive."""
    _refuse(~(temperature > 0), temperature, "temperature", "must be positive; greedy decoding has no log-probs")


def check_table(tokens: LossTokens, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise PactError unless all ids are in range. Lengths and types are checked where a table is made, in the op, too."""
    check_targets(tokens.target, len(weight))
    _check_ids("row", tokens.row, len(hidden), f"is outside the {len(hidden)} rows of hidden")
    _check_ids("context", tokens.context, len(LossContext), "is no LossContext, an id below 3")
    _check_ids("component", tokens.component, len(Component), f"is no Component, an id below {len(Component)}")


def per_token(temperature: float | torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[N] temperature of every token, fp64 if a number is given. Raises PactError if a tensor has another shape."""
    if not isinstance(temperature, torch.Tensor):
        return torch.full(targets.shape, temperature, dtype=torch.float64, device=targets.device)
    if temperature.ndim == 0:
        return temperature.expand(targets.shape)
    if temperature.shape != targets.shape:
        raise PactError(
            f"temperature {list(temperature.shape)} must be a number or one entry per token [{len(targets)}]"
        )
    return temperature


def _check_ids(name: str, ids: torch.Tensor, stop: int, problem: str) -> None:
    _refuse((ids < 0) | (ids >= stop), ids, name, problem)


def _refuse(wrong: torch.Tensor, values: torch.Tensor, name: str, problem: str) -> None:
    """Raise PactError for the first token of which `wrong` [N] is true."""
    if wrong.is_cuda:
        torch._assert_async(~wrong.any(), f"pact_fast: a {name} {problem}")
    elif wrong.any():
        token = int(wrong.nonzero()[0])
        raise PactError(f"{name} {values[token].item()} of token {token} {problem}")
