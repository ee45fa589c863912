"""Methods of the head benchmark: the GEMMs that no head can avoid, plain torch, other projects' code, ours.

Task: for hidden states [N, D] and head weight [V, D], a policy-gradient loss on the active tokens with its gradients,
and the log-prob of every token. Heads that know only cross entropy (kind "ce") compute that instead, with inactive
tokens as ignore_index. Other projects are called through their own public code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from benchmarks.harness import Method
from benchmarks.head_problem import IGNORE, SEQUENCES, HeadProblem
from benchmarks.objective import CLIP, clipped_loss
from pact_fast.kernels import backends, linear_logprob, pact_loss

Tensor = torch.Tensor


def policy_loss(problem: HeadProblem, logprob: Tensor) -> Tensor:
    """The clipped policy loss at ratio 1."""
    return clipped_loss(logprob, None, problem.advantage, problem.token_weight)


@dataclass(frozen=True, kw_only=True)
class HeadMethod(Method):
    """A head. The calls take (problem, **setting).

    kind        "floor" (GEMMs only), "rl" (policy loss) or "ce" (cross entropy)
    forward     → log-probs [N], or the loss (kind "ce"); called without grad
    step        forward and backward, leaves .grad → log-probs [N], None or a scalar
    settings    problem → settings; the fastest is used
    reason      problem → why the method cannot run, or None
    logprob     → log-probs [N] for the error, where `forward` gives none
    compiled    uses torch.compile
    """

    kind: str
    forward: Callable[..., Tensor | None]
    step: Callable[..., Tensor | None]
    settings: Callable[[HeadProblem], list[dict[str, Any]]] = lambda problem: [{}]
    reason: Callable[[HeadProblem], str | None] = lambda problem: None
    logprob: Callable[..., Tensor] | None = None
    compiled: bool = False

    def missing(self, problem: HeadProblem) -> str | None:
        """Why the method cannot run on a problem; None: it can."""
        return self.not_installed() or self.reason(problem)


def rl(logprob: Callable[..., Tensor], **options: Any) -> HeadMethod:
    """A method from a differentiable log-prob, with policy_loss on top."""

    def step(problem: HeadProblem, **setting: Any) -> Tensor:
        value = logprob(problem, **setting)
        policy_loss(problem, value).backward()
        return value.detach()

    return HeadMethod(kind="rl", forward=logprob, step=step, **options)


def ce(loss: Callable[..., Tensor], **options: Any) -> HeadMethod:
    """A method from loss(problem, labels, reduction); reduction "mean" (over labels that are not IGNORE) or "none" [N]."""

    def mean(problem: HeadProblem, **setting: Any) -> Tensor:
        return loss(problem, problem.labels, "mean", **setting)

    def step(problem: HeadProblem, **setting: Any) -> None:
        mean(problem, **setting).backward()

    def logprob(problem: HeadProblem, **setting: Any) -> Tensor:
        return -loss(problem, problem.target, "none", **setting)

    return HeadMethod(kind="ce", forward=mean, step=step, logprob=logprob, **options)


def cuda_only(problem: HeadProblem) -> str | None:
    """Why a Triton kernel cannot run on a problem; None: it can."""
    return None if problem.hidden.is_cuda else "Triton kernels: CUDA only"


# Lower bound: the GEMMs z = XWᵀ, dX = dZ·W, dW = dZᵀX in the dtype of the inputs


def _gemms(backward_rows: Callable[[HeadProblem], int]) -> HeadMethod:
    def forward(problem: HeadProblem, rows: int, **_: Any) -> None:
        z = _logits(rows, problem)
        with torch.no_grad():
            for x in problem.hidden.split(rows):
                torch.mm(x, problem.weight.t(), out=z[: len(x)])

    def step(problem: HeadProblem, rows: int, transposed: bool) -> None:
        z, count = _logits(rows, problem), backward_rows(problem)
        hidden, weight = problem.hidden.detach(), problem.weight.detach()
        dx = torch.empty_like(hidden)
        dw: Tensor | None = None
        for start in range(0, len(hidden), rows):
            x = hidden[start : start + rows]
            torch.mm(x, weight.t(), out=z[: len(x)])
            here = min(start + rows, count) - start  # active rows, packed to the front
            if here <= 0:
                continue
            dz, x = z[:here], x[:here]
            torch.mm(dz, weight, out=dx[start : start + here])
            left, right = (x.t(), dz) if transposed else (dz.t(), x)
            dw = torch.mm(left, right) if dw is None else dw.addmm_(left, right)

    def settings(problem: HeadProblem) -> list[dict[str, Any]]:
        sizes = sorted({min(rows, len(problem.target)) for rows in (512, 2048, 8192, len(problem.target))})
        return [{"rows": rows, "transposed": turned} for rows in sizes for turned in (False, True)]

    return HeadMethod(kind="floor", forward=forward, step=step, settings=settings)


@functools.lru_cache(maxsize=2)
def buffer(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Scratch for the logits of `gemms`, allocated once so that allocation is not timed."""
    return torch.empty(rows, vocab, dtype=dtype, device=device)


def _logits(rows: int, problem: HeadProblem) -> Tensor:
    return buffer(rows, len(problem.weight), problem.weight.dtype, problem.weight.device)


# torch: full logits in the dtype of the inputs, softmax in fp32


def eager(problem: HeadProblem) -> Tensor:
    """Log-probs [N] from fp32 logits of all rows, in plain torch."""
    return _eager(problem.hidden, problem.weight, problem.target)


def _eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)


def eager_entropy(problem: HeadProblem) -> Tensor:
    """Log-probs, and the entropy that trainers log, without gradient."""
    log_p = (problem.hidden @ problem.weight.t()).float().log_softmax(-1)
    with torch.no_grad():
        -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(1, problem.target[:, None]).squeeze(1)


def split_inactive(logprob: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Split a head into two calls: active rows with grad, inactive rows without."""

    def split(problem: HeadProblem, **setting: Any) -> Tensor:
        parts = []
        for mask in (problem.active, ~problem.active):
            part = replace(problem, hidden=problem.hidden[mask], target=problem.target[mask])
            with torch.set_grad_enabled(torch.is_grad_enabled() and mask is problem.active):
                parts.append(logprob(part, **setting))
        return torch.zeros_like(problem.token_weight).masked_scatter(problem.active, parts[0]).masked_scatter(
            ~problem.active, parts[1].detach()
        )  # fmt: skip

    return split


def some_inactive(problem: HeadProblem) -> str | None:
    """Why a method that leaves inactive rows out would do the same work; None: some rows are inactive."""
    return "all rows are active" if bool(problem.active.all()) else None


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_eager, dynamic=False)


def compiled(problem: HeadProblem) -> Tensor:
    """`eager` under torch.compile."""
    return _compiled()(problem.hidden, problem.weight, problem.target)


def torch_linear_ce(problem: HeadProblem, labels: Tensor, reduction: str, **options: Any) -> Tensor:
    """Cross entropy by torch's `linear_cross_entropy`; labels [N]."""
    return F.linear_cross_entropy(
        problem.hidden,
        problem.weight,
        labels,
        reduction=reduction,
        ignore_index=IGNORE,
        options=torch.nn.LinearCrossEntropyOptions(**options),
    )


def _torch_linear_ce_settings(problem: HeadProblem) -> list[dict[str, Any]]:
    sizes = [size for size in (512, 1024, 4096) if size <= len(problem.target)]
    return [{}, *({"batch_chunk_size": size} for size in sizes)]


def _no_torch_linear_ce(problem: HeadProblem) -> str | None:
    there = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    return None if there else f"not in torch {torch.__version__}; 2.13 has it"


# Other projects


def liger_ce(problem: HeadProblem, labels: Tensor, reduction: str, accum_dtype: Any, chunk_mem_const: int) -> Tensor:
    """Cross entropy by Liger's fused linear cross entropy; labels [N]."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    # positional: bias, class weights, ignore_index, z-loss, smoothing, reduction, softcap, three outputs not needed here
    return LigerFusedLinearCrossEntropyFunction.apply(
        problem.hidden, problem.weight, labels, None, None, IGNORE, 0.0, 0.0, reduction, None, False, accum_dtype,
        False, False, False, None, None, chunk_mem_const,
    )[0]  # fmt: skip


def _liger_ce_settings(problem: HeadProblem) -> list[dict[str, Any]]:
    return [{"accum_dtype": dtype, "chunk_mem_const": c} for dtype in (None, torch.float32) for c in (1, 16)]


def liger_logprob(problem: HeadProblem, **_: Any) -> Tensor:
    """Log-probs [N] by the chunks of Liger's PPO losses."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    hidden = problem.hidden.view(SEQUENCES, -1, problem.hidden.shape[1])
    ids = problem.target.view(SEQUENCES, -1)
    return LigerFusedLinearPPOBase.chunk_forward(hidden, problem.weight, ids).flatten()


def liger_grpo(problem: HeadProblem, **setting: Any) -> None:
    """Liger's GRPO loss and its gradients, which it forms in the forward pass."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP, **setting)
    view = (SEQUENCES, -1)
    value, _ = loss(
        problem.hidden.view(*view, problem.hidden.shape[1]),
        problem.weight,
        problem.target.view(view),
        problem.active.view(view).float(),
        problem.sequence_advantage,
    )
    value.backward()


def cut_cross_entropy(problem: HeadProblem, labels: Tensor, reduction: str) -> Tensor:
    """Cross entropy by Apple's cut cross entropy; labels [N]."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if problem.hidden.is_cuda else "torch_compile"
    return linear_cross_entropy(problem.hidden, problem.weight, labels, reduction=reduction, impl=impl)


def trl_chunked(problem: HeadProblem, chunk_size: int, outputs: tuple[str, ...] = ()) -> Tensor:
    """Log-probs [N] by TRL's chunks of `chunk_size` rows."""
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(
        problem.hidden, problem.weight, None, problem.target, 1.0, chunk_size, None, 1.0, outputs
    )[0]


def _trl_settings(problem: HeadProblem) -> list[dict[str, Any]]:
    return [{"chunk_size": size} for size in sorted({min(size, len(problem.weight)) for size in (8192, 32768)})]


def verl_formula(problem: HeadProblem, rows: int) -> Tensor:
    """verl's log-prob and entropy in torch: chunks of rows, recomputed in the backward pass."""

    def chunk(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = (x @ weight.t()).float()
        log_p = logits.log_softmax(-1)
        entropy = logits.logsumexp(-1) - (log_p.exp() * logits).sum(-1)
        return log_p.gather(1, target[:, None]).squeeze(1), entropy

    parts = [
        torch.utils.checkpoint.checkpoint(chunk, x, problem.weight, target, use_reentrant=False)
        for x, target in zip(problem.hidden.split(rows), problem.target.split(rows), strict=True)
    ]
    return torch.cat([logprob for logprob, _ in parts])


def _verl_settings(problem: HeadProblem) -> list[dict[str, Any]]:
    return [{"rows": rows} for rows in sorted({min(rows, len(problem.target)) for rows in (512, 2048)})]


# Ours; with entropy in both columns, since it comes with the log-prob


def pact(backend: str, function: bool = False) -> HeadMethod:
    """function: the same loss as a function that autograd differentiates, in place of the built-in rule."""

    def forward(problem: HeadProblem) -> Tensor:
        return linear_logprob(problem.hidden, problem.weight, problem.target, entropy=True, backend=backend).logprob

    def step(problem: HeadProblem) -> Tensor:
        loss = _clipped(problem.advantage) if function else "ppo"
        output = pact_loss(
            problem.hidden, problem.weight, problem.tokens, policy_loss=loss, clip=(CLIP, CLIP), backend=backend
        )
        output.loss.backward()
        return output.logprob

    def reason(problem: HeadProblem) -> str | None:
        device = {"cpp": "cpu", "triton": "cuda"}.get(backend)
        if device not in (None, problem.hidden.device.type):
            return f"for {device} only"
        state = backends().get(backend, "no such backend in this version")
        return None if state == "ready" else state

    return HeadMethod(kind="rl", forward=forward, step=step, reason=reason, ours=True)


def _clipped(advantage: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """PPO's rule for π_old = π, as a user writes it."""

    def loss(logprob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
        a, ratio = advantage[index], (logprob - logprob.detach()).exp()
        return -torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a)

    return loss


METHODS: dict[str, HeadMethod] = {
    "gemms": _gemms(lambda problem: len(problem.target)),
    "gemms, active rows": replace(_gemms(lambda problem: int(problem.active.sum())), reason=some_inactive),
    "eager": rl(eager),
    "eager, inactive rows without grad": rl(split_inactive(eager), reason=some_inactive),
    "eager + entropy": rl(eager_entropy),
    "compile": rl(compiled, compiled=True),
    "torch linear_cross_entropy": ce(torch_linear_ce, settings=_torch_linear_ce_settings, reason=_no_torch_linear_ce),
    "liger CE": ce(liger_ce, settings=_liger_ce_settings, package="liger-kernel", reason=cuda_only),
    "liger GRPO": HeadMethod(
        kind="rl",
        forward=liger_logprob,
        step=liger_grpo,
        # one chunk of all sequences: the weight gradient is then formed once; the log-probs are chunked within
        settings=lambda problem: [{"chunk_size": SEQUENCES, "compiled": on} for on in (False, True)],
        package="liger-kernel",
        compiled=True,
    ),
    "cut-cross-entropy": ce(cut_cross_entropy, package="cut-cross-entropy", compiled=True),
    "trl chunked": rl(trl_chunked, settings=_trl_settings, package="trl"),
    "trl chunked, inactive rows without grad": rl(
        split_inactive(trl_chunked), settings=_trl_settings, package="trl", reason=some_inactive
    ),
    "trl chunked + entropy": rl(
        functools.partial(trl_chunked, outputs=("entropy",)), settings=_trl_settings, package="trl"
    ),
    "verl's formula": rl(verl_formula, settings=_verl_settings),
    "pact torch": pact("torch"),
    "pact cpp": pact("cpp"),
    "pact cpp, loss as a function": pact("cpp", function=True),
    "pact triton": pact("triton"),
}
