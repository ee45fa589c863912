"""Comparison of the kernels with the host's slow path, on its first batch; a difference is an error, not a warning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from pact_fast.errors import PactError
from pact_fast.kernels import Head, head_of, linear_logprob
from pact_fast.kernels.head.logit_transform import head_layer

ROWS = 16  # of the first batch, for which full logits are made
# largest difference relative to the largest value; 16-bit hosts round their logits, which costs up to 0.1 nats
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def check_close(
    what: str, ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype, host: str, scale: float = 1e-9
) -> None:
    """Raise PactError if two tensors differ by more than the rounding of a host that computes in `dtype`.

    scale: of the values; at least the largest of `theirs` is taken.
    """
    ours, theirs = ours.detach().double(), theirs.detach().double()
    difference = float((ours - theirs).abs().max()) if ours.numel() else 0.0
    largest = float(theirs.abs().max()) if theirs.numel() else 0.0
    bound = TOLERANCE[dtype] * max(scale, largest)
    if not difference <= bound:
        raise PactError(
            f"{host}: {what} of the kernels and of the host's own code differ by {difference:.2g} on the first batch; "
            "remove the adapter, and report model and versions"
        )


def check_head_of(causal_lm: Any, *rest: Any) -> None:
    """`check_head` for the head of a model. Take `head_of` after it: ZeRO-3 has released the weight of an earlier one."""
    check_head(head_layer(causal_lm), head_of(causal_lm), *rest)


def check_head(
    layer: Callable[[torch.Tensor], torch.Tensor],
    head: Head,
    hidden: torch.Tensor,
    row: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    host: str,
) -> None:
    """Log-probs, and gradients of hidden states and head, against full logits of the model's own `layer`, for a few tokens.

    hidden [T, D]; row, targets [N]. With no token the layer runs, too: other ranks may have some, and gather its weight.
    The layer runs last, because ZeRO-3 releases its weight with it: `head` is then no longer of use in a forward pass.
    Raises PactError.
    """
    at = torch.linspace(0, len(targets) - 1, min(ROWS, len(targets)), device=targets.device).long().unique()
    rows, target = hidden.detach()[row[at]].requires_grad_(), targets[at]
    upstream = torch.linspace(0.5, 1.5, len(at), device=hidden.device)

    def logprob(z: torch.Tensor) -> torch.Tensor:
        z = z.double() * head.logit_scale
        z = head.softcap * torch.tanh(z / head.softcap) if head.softcap else z
        return (z / temperature).log_softmax(-1).gather(-1, target[:, None])[:, 0]

    dtype = z_dtype(hidden, head)  # 16-bit logits decide how well the slow path knows them
    gradients: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    with _without_dropout(layer), torch.enable_grad():
        x = head.input(rows)
        plain = logprob(torch.nn.functional.linear(x, head.weight, head.bias))
        ours = linear_logprob(x, head.weight, target, temperature=temperature, **head.options).logprob
        for name, tensor in (("hidden states", rows), ("the head", head.weight)):
            if tensor.requires_grad:
                a, b = (torch.autograd.grad((z * upstream).sum(), tensor, retain_graph=True)[0] for z in (ours, plain))
                gradients.append((f"gradients of {name}", a, b))
    # a call of the host's module, which may have hooks for a backward pass that does not come
    with _without_dropout(layer), torch.no_grad():
        theirs = logprob(layer(rows if head.input_scale == 1.0 else rows * head.input_scale))
    check_close("log-probs", ours, theirs, dtype, host, scale=1.0)
    for what, a, b in gradients:
        check_close(what, a, b, dtype, host)


class RandomState:
    """The random numbers that come next; `replayed` runs the host's code on the same ones, so that dropout is the same."""

    def __init__(self, device: torch.device):
        self._cuda = device if device.type == "cuda" else None
        self._states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if self._cuda else None

    @contextmanager
    def replayed(self) -> Iterator[None]:
        with torch.random.fork_rng([self._cuda] if self._cuda else []):
            torch.set_rng_state(self._states[0])
            if self._cuda and self._states[1] is not None:
                torch.cuda.set_rng_state(self._states[1], self._cuda)
            yield


@contextmanager
def _without_dropout(layer: Any) -> Iterator[None]:
    """Evaluation mode for a module that perhaps has an adapter with dropout."""
    modules = [m for m in layer.modules() if m.training] if isinstance(layer, torch.nn.Module) else []
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def due(checked: bool, tokens: int) -> bool:
    """Whether this batch is to be checked: the first one that has tokens; with several ranks the first, on all of them."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return not checked and (tokens > 0 or several)


def z_dtype(hidden: torch.Tensor, head: Head) -> torch.dtype:
    """The dtype in which the host multiplies hidden states and head."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return min((hidden.dtype, head.weight.dtype), key=lambda dtype: dtype.itemsize)
