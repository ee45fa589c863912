"""Comparison of the kernels with the host's slow path, on its first batch; a difference is an error, not a warning."""

from __future__ import annotations

from typing import Any

import torch

from pact_fast.errors import PactError
from pact_fast.kernels import Head, linear_logprob
from pact_fast.kernels.head.logit_transform import head_layer

ROWS = 16  # of the first batch, for which full logits are made
# largest difference relative to the largest value; 16-bit hosts round their logits, which costs up to 0.1 nats
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def agree(
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


def check_head(
    causal_lm: Any,
    head: Head,
    hidden: torch.Tensor,
    row: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    host: str,
) -> None:
    """Log-probs, and gradients of hidden states and head, against the model's own head with full logits.

    hidden [T, D]; row, targets [N]. A few tokens are enough to notice a wrong kernel. Raises PactError.
    """
    at = torch.linspace(0, len(targets) - 1, min(ROWS, len(targets)), device=targets.device).long().unique()
    rows, target = hidden.detach()[row[at]].requires_grad_(), targets[at]
    if not len(at):
        return
    upstream = torch.linspace(0.5, 1.5, len(at), device=hidden.device)
    with torch.enable_grad():
        x = rows if head.input_scale == 1.0 else rows * head.input_scale
        z = head_layer(causal_lm)(x)
        z = z.double() * head.logit_scale
        z = head.softcap * torch.tanh(z / head.softcap) if head.softcap else z
        theirs = (z / temperature).log_softmax(-1).gather(-1, target[:, None])[:, 0]
        plain = torch.nn.functional.linear(head.input(rows), head.weight, head.bias).double() * head.logit_scale
        plain = head.softcap * torch.tanh(plain / head.softcap) if head.softcap else plain
        weight_path = (plain / temperature).log_softmax(-1).gather(-1, target[:, None])[:, 0]
        ours = linear_logprob(head.input(rows), head.weight, target, temperature=temperature, **head.options).logprob
        # 16-bit logits decide how well the slow path knows them
        dtype = z_dtype(hidden, head)
        agree("log-probs", ours, theirs, dtype, host, scale=1.0)
        (a,), (b,) = (torch.autograd.grad((z * upstream).sum(), rows, retain_graph=True) for z in (ours, theirs))
        agree("gradients of hidden states", a, b, dtype, host)
        if head.weight.requires_grad:
            (a,), (b,) = (torch.autograd.grad((z * upstream).sum(), head.weight) for z in (ours, weight_path))
            agree("gradients of the head", a, b, dtype, host)


def z_dtype(hidden: torch.Tensor, head: Head) -> torch.dtype:
    """The dtype in which the host multiplies hidden states and head."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return min((hidden.dtype, head.weight.dtype), key=lambda dtype: dtype.itemsize)
