"""One task for every head, and an adapter for each: the GEMMs it cannot avoid, torch, the peers' own code, ours.

The task: N tokens, hidden rows [N, D] and head weight [V, D]; a policy-gradient loss whose coefficient is zero for all
but a share of the rows, its gradients, and the log-prob of every token. Heads that know only cross entropy (kind "ce")
do that instead, with the inactive rows as ignore_index. Each peer is called through its own public code.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from pact_fast.kernels import LossTokens, backends, linear_logprob, pact_loss

Tensor = torch.Tensor
IGNORE = -100
SEQUENCES = 8
LOGIT_STD = 3.0  # of the logits of a row; over 10⁵ of them, max − min is about 26
TARGET_LIFT = 20.0  # a target's logit is raised by up to this: probabilities from 1e-8 to nearly 1
CLIP = 0.2
WIDTHS = {  # name: (D, V)
    "qwen3-0.6b": (1024, 151_936),
    "qwen3-1.7b": (2048, 151_936),
    "qwen3-4b": (2560, 151_936),
    "qwen3-8b": (4096, 151_936),
    "llama3-8b": (4096, 128_256),
    "cpu": (1024, 32_768),
}


@dataclass(frozen=True)
class Problem:
    """hidden [N, D] and weight [V, D] are leaves; N tokens in SEQUENCES sequences, one advantage each."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    active: Tensor  # bool [N]
    sequence_advantage: Tensor  # [SEQUENCES]

    @functools.cached_property
    def labels(self) -> Tensor:
        return self.target.masked_fill(~self.active, IGNORE)

    @functools.cached_property
    def advantage(self) -> Tensor:
        return self.sequence_advantage.repeat_interleave(len(self.target) // SEQUENCES) * self.active

    @functools.cached_property
    def token_weight(self) -> Tensor:
        return self.active / self.active.sum()

    @functools.cached_property
    def tokens(self) -> LossTokens:
        n, device = len(self.target), self.target.device
        zeros = torch.zeros(n, dtype=torch.int64, device=device)
        return LossTokens(
            row=torch.arange(n, device=device),
            target=self.target,
            context=zeros,
            component=zeros,
            sequence=torch.arange(SEQUENCES, device=device).repeat_interleave(n // SEQUENCES),
            advantage=self.advantage,
            old_logprob=torch.full((n,), torch.nan, device=device),
            rl_weight=self.token_weight,
            sft_weight=torch.zeros(n, device=device),
        )

    @property
    def gradient_bytes(self) -> int:
        return self.hidden.nbytes + self.weight.nbytes

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def few(self, rows: int) -> Problem:
        """The first tokens of every sequence, `rows` in all; the same weight."""
        per = max(1, min(rows, len(self.target)) // SEQUENCES)

        def cut(t: Tensor) -> Tensor:
            return t.detach().view(SEQUENCES, -1, *t.shape[1:])[:, :per].flatten(0, 1)

        hidden = cut(self.hidden).clone().requires_grad_()
        return replace(self, hidden=hidden, target=cut(self.target), active=cut(self.active))

    def double(self) -> Problem:
        hidden, weight = (t.detach().double().requires_grad_() for t in (self.hidden, self.weight))
        return replace(self, hidden=hidden, weight=weight)


def make_problem(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, fraction: float, seed: int = 0
) -> Problem:
    """Logits with the spread of a trained model's: normal with LOGIT_STD, the target's raised by U(0, TARGET_LIFT).

    hᵢ = ε + a·w_t/‖w_t‖² raises the logit of t by a. Exactly a share of `fraction` of the rows, at random places, is
    active; the same rows and values in every dtype up to rounding.
    """
    n, d, v = shape
    if n % SEQUENCES:
        raise ValueError(f"N = {n} must be a multiple of {SEQUENCES}")
    rng = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(v, d, generator=rng, device=device).mul_(LOGIT_STD / d**0.5)
    target = torch.randint(v, (n,), generator=rng, device=device)
    lift = TARGET_LIFT * torch.rand(n, 1, generator=rng, device=device)
    rows = weight[target]
    hidden = torch.randn(n, d, generator=rng, device=device) + lift * rows / rows.square().sum(1, keepdim=True)
    active = torch.zeros(n, dtype=torch.bool, device=device)
    active[torch.randperm(n, generator=rng, device=device)[: max(1, round(fraction * n))]] = True
    advantage = torch.randn(SEQUENCES, generator=rng, device=device)
    return Problem(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target, active, advantage)


def policy_loss(problem: Problem, logprob: Tensor) -> Tensor:
    """PPO's clipped loss at ratio 1, as every peer without a loss of its own gets it."""
    ratio = (logprob - logprob.detach()).exp()
    gain = torch.minimum(ratio * problem.advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * problem.advantage)
    return -(gain * problem.token_weight).sum()


@dataclass(frozen=True)
class Method:
    """forward: log-probs (kind "ce": the loss), called without grad. step: forward and backward, which leaves .grad.

    Both take a problem and one of `settings`, of which the fastest is found by trying; they return what they have of
    the log-probs [N], else None or a scalar. `reason` says why the method cannot run, else None.
    """

    kind: str  # "floor" | "rl" | "ce"
    forward: Callable[..., Tensor | None]
    step: Callable[..., Tensor | None]
    settings: Callable[[Problem], list[dict[str, Any]]] = lambda problem: [{}]
    package: str | None = None
    reason: Callable[[Problem], str | None] = lambda problem: None
    logprob: Callable[..., Tensor] | None = None  # for the error, where forward has none
    compiled: bool = False
    ours: bool = False

    def missing(self, problem: Problem) -> str | None:
        module = {"liger-kernel": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy", "trl": "trl"}
        if self.package and importlib.util.find_spec(module[self.package]) is None:
            return f"not installed: pip install {self.package}"
        return self.reason(problem)


def rl(logprob: Callable[..., Tensor], **options: Any) -> Method:
    """A differentiable log-prob, and policy_loss on top."""

    def step(problem: Problem, **setting: Any) -> Tensor:
        value = logprob(problem, **setting)
        policy_loss(problem, value).backward()
        return value.detach()

    return Method("rl", logprob, step, **options)


def ce(loss: Callable[..., Tensor], **options: Any) -> Method:
    """loss(problem, labels, reduction): mean over the labels that are not IGNORE, or one value per token."""

    def mean(problem: Problem, **setting: Any) -> Tensor:
        return loss(problem, problem.labels, "mean", **setting)

    def step(problem: Problem, **setting: Any) -> None:
        mean(problem, **setting).backward()

    def logprob(problem: Problem, **setting: Any) -> Tensor:
        return -loss(problem, problem.target, "none", **setting)

    return Method("ce", mean, step, logprob=logprob, **options)


def cuda_only(problem: Problem) -> str | None:
    return None if problem.hidden.is_cuda else "Triton kernels: CUDA only"


# The floor: z = XWᵀ, dX = dZ·W, dW = dZᵀX in the dtype of the inputs, nothing else


def _gemms(backward_rows: Callable[[Problem], int]) -> Method:
    def forward(problem: Problem, rows: int, **_: Any) -> None:
        z = _logits(rows, problem)
        with torch.no_grad():
            for x in problem.hidden.split(rows):
                torch.mm(x, problem.weight.t(), out=z[: len(x)])

    def step(problem: Problem, rows: int, transposed: bool) -> None:
        z, count = _logits(rows, problem), backward_rows(problem)
        hidden, weight = problem.hidden.detach(), problem.weight.detach()
        dx = torch.empty_like(hidden)
        dw: Tensor | None = None
        for start in range(0, len(hidden), rows):
            x = hidden[start : start + rows]
            torch.mm(x, weight.t(), out=z[: len(x)])
            here = min(start + rows, count) - start  # the rows that have a backward pass, packed to the front
            if here <= 0:
                continue
            dz, x = z[:here], x[:here]
            torch.mm(dz, weight, out=dx[start : start + here])
            left, right = (x.t(), dz) if transposed else (dz.t(), x)
            dw = torch.mm(left, right) if dw is None else dw.addmm_(left, right)

    def settings(problem: Problem) -> list[dict[str, Any]]:
        sizes = sorted({min(rows, len(problem.target)) for rows in (512, 2048, 8192, len(problem.target))})
        return [{"rows": rows, "transposed": turned} for rows in sizes for turned in (False, True)]

    return Method("floor", forward, step, settings=settings)


@functools.lru_cache(maxsize=2)
def buffer(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for the floor's logits, made once: an allocation is not a GEMM."""
    return torch.empty(rows, vocab, dtype=dtype, device=device)


def _logits(rows: int, problem: Problem) -> Tensor:
    return buffer(rows, len(problem.weight), problem.weight.dtype, problem.weight.device)


# torch: full logits in the dtype of the inputs, softmax in fp32


def eager(problem: Problem) -> Tensor:
    return _eager(problem.hidden, problem.weight, problem.target)


def _eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)


def eager_entropy(problem: Problem) -> Tensor:
    """With the entropy that trainers log, which needs no gradient."""
    log_p = (problem.hidden @ problem.weight.t()).float().log_softmax(-1)
    with torch.no_grad():
        -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(1, problem.target[:, None]).squeeze(1)


def apart(logprob: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A head that only knows rows with gradient, told which rows need none: two calls, the second without grad."""

    def split(problem: Problem, **setting: Any) -> Tensor:
        parts = []
        for mask in (problem.active, ~problem.active):
            part = replace(problem, hidden=problem.hidden[mask], target=problem.target[mask])
            with torch.set_grad_enabled(torch.is_grad_enabled() and mask is problem.active):
                parts.append(logprob(part, **setting))
        return torch.zeros_like(problem.token_weight).masked_scatter(problem.active, parts[0]).masked_scatter(
            ~problem.active, parts[1].detach()
        )  # fmt: skip

    return split


def some_inactive(problem: Problem) -> str | None:
    return "all rows are active" if bool(problem.active.all()) else None


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_eager, dynamic=False)


def compiled(problem: Problem) -> Tensor:
    return _compiled()(problem.hidden, problem.weight, problem.target)


def torch_linear_ce(problem: Problem, labels: Tensor, reduction: str, **options: Any) -> Tensor:
    return F.linear_cross_entropy(
        problem.hidden,
        problem.weight,
        labels,
        reduction=reduction,
        ignore_index=IGNORE,
        options=torch.nn.LinearCrossEntropyOptions(**options),
    )


def _torch_linear_ce_settings(problem: Problem) -> list[dict[str, Any]]:
    sizes = [size for size in (512, 1024, 4096) if size <= len(problem.target)]
    return [{}, *({"batch_chunk_size": size} for size in sizes)]


def _no_torch_linear_ce(problem: Problem) -> str | None:
    there = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    return None if there else f"not in torch {torch.__version__}; 2.13 has it"


# Peers


def liger_ce(problem: Problem, labels: Tensor, reduction: str, accum_dtype: Any, chunk_mem_const: int) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    # positional: bias, class weights, ignore_index, z-loss, smoothing, reduction, softcap, three outputs we do without
    return LigerFusedLinearCrossEntropyFunction.apply(
        problem.hidden, problem.weight, labels, None, None, IGNORE, 0.0, 0.0, reduction, None, False, accum_dtype,
        False, False, False, None, None, chunk_mem_const,
    )[0]  # fmt: skip


def _liger_ce_settings(problem: Problem) -> list[dict[str, Any]]:
    return [{"accum_dtype": dtype, "chunk_mem_const": c} for dtype in (None, torch.float32) for c in (1, 16)]


def liger_logprob(problem: Problem, **_: Any) -> Tensor:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    hidden = problem.hidden.view(SEQUENCES, -1, problem.hidden.shape[1])
    ids = problem.target.view(SEQUENCES, -1)
    return LigerFusedLinearPPOBase.chunk_forward(hidden, problem.weight, ids).flatten()


def liger_grpo(problem: Problem, **setting: Any) -> None:
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


def cut_cross_entropy(problem: Problem, labels: Tensor, reduction: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if problem.hidden.is_cuda else "torch_compile"
    return linear_cross_entropy(problem.hidden, problem.weight, labels, reduction=reduction, impl=impl)


def trl_chunked(problem: Problem, chunk_size: int, outputs: tuple[str, ...] = ()) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(
        problem.hidden, problem.weight, None, problem.target, 1.0, chunk_size, None, 1.0, outputs
    )[0]


def _trl_settings(problem: Problem) -> list[dict[str, Any]]:
    return [{"chunk_size": size} for size in sorted({min(size, len(problem.weight)) for size in (8192, 32768)})]


def verl_formula(problem: Problem, rows: int) -> Tensor:
    """Log-prob and entropy of one chunk of rows after another, recomputed in the backward pass; torch throughout."""

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


def _verl_settings(problem: Problem) -> list[dict[str, Any]]:
    return [{"rows": rows} for rows in sorted({min(rows, len(problem.target)) for rows in (512, 2048)})]


# Ours: entropy in both columns, since it comes with the log-prob


def pact(backend: str) -> Method:
    def forward(problem: Problem) -> Tensor:
        return linear_logprob(problem.hidden, problem.weight, problem.target, entropy=True, backend=backend).logprob

    def step(problem: Problem) -> Tensor:
        output = pact_loss(problem.hidden, problem.weight, problem.tokens, clip=(CLIP, CLIP), backend=backend)
        output.loss.backward()
        return output.logprob

    def reason(problem: Problem) -> str | None:
        device = {"cpp": "cpu", "triton": "cuda"}.get(backend)
        if device not in (None, problem.hidden.device.type):
            return f"for {device} only"
        state = backends().get(backend, "no such back-end in this version")
        return None if state == "ready" else state

    return Method("rl", forward, step, reason=reason, ours=True)


METHODS: dict[str, Method] = {
    "gemms": _gemms(lambda problem: len(problem.target)),
    "gemms, active rows": replace(_gemms(lambda problem: int(problem.active.sum())), reason=some_inactive),
    "eager": rl(eager),
    "eager, inactive rows apart": rl(apart(eager), reason=some_inactive),
    "eager + entropy": rl(eager_entropy),
    "compile": rl(compiled, compiled=True),
    "torch linear_cross_entropy": ce(torch_linear_ce, settings=_torch_linear_ce_settings, reason=_no_torch_linear_ce),
    "liger CE": ce(liger_ce, settings=_liger_ce_settings, package="liger-kernel", reason=cuda_only),
    "liger GRPO": Method(
        "rl",
        liger_logprob,
        liger_grpo,
        # one chunk of all sequences: the weight gradient is then formed once; the log-probs are chunked within
        settings=lambda problem: [{"chunk_size": SEQUENCES, "compiled": on} for on in (False, True)],
        package="liger-kernel",
        compiled=True,
    ),
    "cut-cross-entropy": ce(cut_cross_entropy, package="cut-cross-entropy", compiled=True),
    "trl chunked": rl(trl_chunked, settings=_trl_settings, package="trl"),
    "trl chunked, inactive rows apart": rl(
        apart(trl_chunked), settings=_trl_settings, package="trl", reason=some_inactive
    ),
    "trl chunked + entropy": rl(
        functools.partial(trl_chunked, outputs=("entropy",)), settings=_trl_settings, package="trl"
    ),
    "verl's formula": rl(verl_formula, settings=_verl_settings),
    "pact torch": pact("torch"),
    "pact cpp": pact("cpp"),
    "pact triton": pact("triton"),
}
