"""Every backend on the sizes and values that broke other fused heads: error at most twice that of torch's own code.

Truth is plain torch in fp64; the yardstick is the same plain torch in the dtype of the inputs, all logits at once. With
TRITON_INTERPRET=1 the Triton backend takes part on the small cases (see test_triton_interpreter.py); on a machine with
CUDA it does so on all of them.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from pact_fast.kernels import LossTokens, backends, linear_logprob, pact_loss
from pact_fast.kernels.runtime.backends import interpreted

NAN = float("nan")
LIVE = [name for name, reason in backends().items() if reason == "ready"]
DEVICE = {"torch": "cpu", "cpp": "cpu", "triton": "cpu" if interpreted() else "cuda"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ENTROPY = 0.01  # the coefficient; without an entropy term less need be kept of a chunk in bf16


@dataclasses.dataclass
class Case:
    """n tokens on `rows` hidden rows; logits have a standard deviation of about `spread`."""

    n: int
    width: int
    vocab: int
    rows: int | None = None
    spread: float = 5.0
    bias: bool = False
    softcap: float | None = None
    per_token: bool = False
    strided: bool = False
    extreme: bool = False
    draws: int = 1  # errors are added up over so many draws of the inputs: that of a single row is a matter of luck

    def inputs(self, dtype: torch.dtype, draw: int = 0) -> tuple[list[torch.Tensor], LossTokens, dict]:
        torch.manual_seed(self.n + self.vocab + draw)
        rows = self.rows or self.n
        hidden = torch.randn(rows, self.width)
        weight = torch.randn(self.vocab, self.width) * self.spread / self.width**0.5
        row = torch.randint(rows, (self.n,)) if self.rows else torch.arange(self.n)
        target = torch.randint(self.vocab, (self.n,))
        if self.extreme:  # p → 1 at the target of even rows, just about or beyond all doubt, p → 0 at that of odd ones
            sign = torch.tensor([60.0, -60.0, 16.0, -16.0, 24.0]).repeat(rows)[:rows, None]
            direction = weight[target[:rows]]
            hidden = sign * direction / direction.square().sum(1, keepdim=True)
        parameters = [hidden, weight] + ([torch.randn(self.vocab)] if self.bias else [])
        parameters = [p.to(dtype) for p in parameters]
        if self.strided:
            parameters[0] = torch.stack([parameters[0], parameters[0]], -1)[..., 0]
        options = {"softcap": self.softcap, "temperature": torch.rand(self.n) + 0.5 if self.per_token else 1.0}
        return parameters, self.table(row, target, parameters, options), options

    def table(self, row, target, parameters, options) -> LossTokens:
        n = self.n
        with torch.no_grad():
            now = statistics([p.double() for p in parameters], row, target, options)[0].float()
        old = now + 0.3 * torch.randn(n)
        old[::3] = NAN
        rl_weight = torch.rand(n) / n
        rl_weight[1::4] = 0.0
        old[1::4] = -5000.0  # an overflowed ratio on masked rows
        sft_weight = torch.rand(n) / n * (torch.arange(n) % 4 == 1)
        ids = torch.zeros(n, dtype=torch.int64)
        return LossTokens(row, target, ids, ids, ids, torch.randn(n), old, rl_weight, sft_weight)


def statistics(parameters, row, target, options):
    """(log-prob, entropy) of all tokens from all logits, softmax in fp32 or fp64 as trainers do."""
    hidden, weight, *bias = parameters
    z = torch.nn.functional.linear(hidden[row], weight, *bias)
    z = z if z.dtype == torch.float64 else z.float()
    if options["softcap"]:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    temperature = options["temperature"]
    z = z / (temperature[:, None].to(z.dtype) if isinstance(temperature, torch.Tensor) else temperature)
    log_p = z.log_softmax(-1)
    return log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def plain(parameters, t: LossTokens, options, entropy_coef: float) -> dict[str, torch.Tensor]:
    """ppo with entropy bonus and SFT, from the formulas, by autograd."""
    parameters = [p.detach().requires_grad_() for p in parameters]
    logprob, entropy = statistics(parameters, t.row, t.target, options)
    old = torch.where(t.old_logprob.isnan(), logprob.detach(), t.old_logprob.to(logprob.dtype))
    live = t.rl_weight != 0
    ratio = (logprob - torch.where(live, old, logprob.detach())).exp()
    policy = -torch.minimum(ratio * t.advantage, ratio.clamp(0.8, 1.2) * t.advantage)
    loss = (t.rl_weight * (policy - entropy_coef * entropy)).sum() - (t.sft_weight * logprob).sum()
    return result(loss, logprob, entropy, torch.autograd.grad(loss, parameters))


def ours(parameters, t: LossTokens, options, backend: str, entropy_coef: float = ENTROPY) -> dict[str, torch.Tensor]:
    device = DEVICE[backend]
    parameters = [p.detach().to(device).requires_grad_() for p in parameters]
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    bias = parameters[2] if len(parameters) > 2 else None
    out = pact_loss(*parameters[:2], t.to(device), entropy_coef=entropy_coef, bias=bias, backend=backend, **options)
    return result(out.loss, out.logprob, out.entropy, torch.autograd.grad(out.loss, parameters))


def result(loss, logprob, entropy, gradients) -> dict[str, torch.Tensor]:
    names = ("d_hidden", "d_weight", "d_bias")
    values = {"loss": loss, "logprob": logprob, "entropy": entropy} | dict(zip(names, gradients, strict=False))
    return {name: value.detach().double().cpu() for name, value in values.items()}


def errors(given: dict, truth: dict) -> dict[str, float]:
    return {name: float((given[name] - value).norm()) for name, value in truth.items()}


CASES = {
    "one token": Case(1, 896, 1003, draws=16),
    "odd sizes": Case(37, 100, 1003, bias=True, softcap=30.0, per_token=True),
    "odd sizes, shared rows": Case(41, 896, 1003, rows=7),
    "strided hidden": Case(33, 64, 1003, strided=True),
    "a vocabulary of five": Case(64, 8, 5),
    "certain and impossible targets": Case(16, 64, 1003, extreme=True),
    "spread logits": Case(64, 1024, 4099, spread=10.0),
    "wide": Case(24, 4096, 5003),
    "Qwen's vocabulary": Case(5, 64, 151_936),
    "70,001 tokens": Case(70_001, 16, 257, per_token=True),
}
SMALL = ("one token", "odd sizes", "a vocabulary of five", "certain and impossible targets")


@functools.lru_cache(maxsize=1)  # the same for every backend
def yardstick(name: str, dtype: torch.dtype, entropy_coef: float) -> list[tuple]:
    """For each draw of a case: parameters, table, options, the truth, and the errors of torch's own code."""
    found = []
    for draw in range(CASES[name].draws // 2 if interpreted() else CASES[name].draws):
        parameters, table, options = CASES[name].inputs(dtype, draw)
        truth = plain([p.double() for p in parameters], table, options, entropy_coef)
        own = errors(plain(parameters, table, options, entropy_coef), truth)
        found.append((parameters, table, options, truth, own))
    return found


# Large cases: the fp16 and no-entropy combinations that also run without a GPU
RARE: dict[str, set] = {
    "wide": set(),
    "spread logits": {torch.float16},
    "Qwen's vocabulary": {0.0},
    "70,001 tokens": set(),
}


def combinations() -> list:
    """Case, dtype and entropy coefficient; all of them, but for large cases."""
    found, gpu = [], torch.cuda.is_available()
    for name in CASES:
        for dtype, entropy_coef in [*((dtype, ENTROPY) for dtype in DTYPES), (torch.bfloat16, 0.0)]:
            rare = {dtype, entropy_coef} & {torch.float16, 0.0}
            if name == "70,001 tokens" and (rare or (dtype == torch.float32 and not gpu)):
                continue
            if not gpu and rare - RARE.get(name, rare):
                continue
            words = (name, str(dtype).removeprefix("torch."), str(entropy_coef))
            marks = () if name in (*SMALL, "strided hidden") else pytest.mark.slow
            found.append(pytest.param(name, dtype, entropy_coef, id="-".join(words), marks=marks))
    return found


@pytest.mark.parametrize("backend", LIVE)
@pytest.mark.parametrize("name, dtype, entropy_coef", combinations())
def test_error_is_at_most_twice_that_of_plain_torch(name, dtype, entropy_coef, backend):
    if interpreted() and (name not in SMALL or backend != "triton"):
        pytest.skip("the interpreter takes the small cases")
    mine: dict[str, float] = {}
    allowed: dict[str, float] = {}
    for parameters, table, options, truth, own in yardstick(name, dtype, entropy_coef):
        found = errors(ours(parameters, table, options, backend, entropy_coef), truth)
        for key, value in truth.items():
            # torch may happen to hit the truth: the rounding of the result itself is always allowed, and the loss, a
            # single number and a sum of terms of both signs, has one unit of the sum of their sizes
            unit, size = torch.finfo(torch.float32 if key in ("logprob", "entropy") else dtype).eps / 2, value.norm()
            if key == "loss":
                unit = torch.finfo(torch.float32).eps
                size = (table.rl_weight * table.advantage.abs() - table.sft_weight * truth["logprob"]).sum()
            mine[key] = mine.get(key, 0.0) + found[key]
            allowed[key] = allowed.get(key, 0.0) + 2 * own[key] + unit * float(size)
    assert all(mine[key] <= allowed[key] for key in mine), (mine, allowed)


@pytest.mark.parametrize("backend", LIVE)
def test_logprobs_of_bf16_inputs_come_from_the_fp32_accumulator(backend):
    """At logits of spread 16–30, bf16-rounded logits cost 0.03 nats."""
    case = Case(512 if not interpreted() else 16, 256, 8192 if not interpreted() else 515, spread=8.0)
    (hidden, weight), table, options = case.inputs(torch.bfloat16)
    truth = statistics([hidden.double(), weight.double()], table.row, table.target, options)[0]
    device = DEVICE[backend]
    given = linear_logprob(hidden.to(device), weight.to(device), table.target.to(device), backend=backend).logprob
    assert (given.double().cpu() - truth).square().mean().sqrt() <= 5e-3


@pytest.mark.parametrize("backend", LIVE)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_all_masked_rows_give_zero_loss_and_gradients(dtype, backend):
    parameters, table, options = CASES["odd sizes"].inputs(dtype)
    table.rl_weight.zero_()
    table.sft_weight.zero_()
    given = ours(parameters, table, options, backend)
    assert given["loss"] == 0.0 and not any(given[name].any() for name in ("d_hidden", "d_weight", "d_bias"))
    assert given["logprob"].isfinite().all()


@pytest.mark.parametrize("backend", LIVE)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_runs_are_bit_identical_for_any_number_of_threads(dtype, backend):
    parameters, table, options = CASES["odd sizes, shared rows"].inputs(dtype)
    before = torch.get_num_threads()
    runs = []
    for threads in (1, 1, 2) if backend == "cpp" else (1, 1):
        torch.set_num_threads(threads)
        runs.append(ours(parameters, table, options, backend))
    torch.set_num_threads(before)
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    if backend == "cpp" and dtype != torch.float16:  # fp16 logits are GEMMs of the BLAS library, whose sums vary
        assert torch.equal(runs[0]["entropy"], runs[2]["entropy"])
