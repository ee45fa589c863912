"""What an update benchmark runs: models of random weights, the update itself with a clock over its phases, and the check."""

from __future__ import annotations

import copy
import functools
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))  # a script among its siblings, from wherever it is imported

from measure import failure
from update_variants import VARIANTS, Problem, Shape, Variant, make_problem

from pact_fast.config import TrainerConfig
from pact_fast.train.backends.replicated import make_optimizer

QWEN3 = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40_960}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256, "head_dim": 16, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True,
    },
    "30m": {
        "vocab_size": 8192, "head_dim": 64, "num_key_value_heads": 4, "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 8, "num_attention_heads": 8, "tie_word_embeddings": True,
    },
    "qwen3-0.6b": QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-1.7b": QWEN3 | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
DEFAULT_LAYERS = {"qwen3-8b": 8}  # of 36: activations of 25,000 tokens beside AdamW's state fill one GPU
CHECKED = Shape(48, 40, 24, 4, 8)
LIMIT, FACTOR = 1e-5, 2.0  # relative in fp32; in other dtypes times the error of (a), if that is above the rounding


class Case(NamedTuple):
    model: str
    layers: int
    shape: Shape
    dtype: str
    prompts: int
    old: bool

    def __str__(self) -> str:
        full = MODELS[self.model]["num_hidden_layers"]
        some = "" if self.layers == full else f" with {self.layers} of its {full} layers"
        p, z, n, k, r = self.shape
        old = ", old log-probs by a pass of their own" if self.old else ""
        return f"{self.model}{some}, {self.dtype}: {self.prompts} x (P={p} Z={z} L={n} K={k} R={r}){old}"


def build(case: Case, device: torch.device) -> PreTrainedModel:
    """Random weights, the same ones every time."""
    torch.manual_seed(0)
    config = Qwen3Config(**MODELS[case.model] | {"num_hidden_layers": case.layers, "use_cache": False})
    with device:
        return Qwen3ForCausalLM(config).to(getattr(torch, case.dtype)).train()


class Clock:
    """Which phase took how long, by a mark wherever another one begins."""

    now: Clock | None = None  # the one that attention functions report to

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    @property
    def phase(self) -> str:
        return self._marks[-1][0]

    def enter(self, phase: str) -> None:
        mark: Any = time.perf_counter()
        if self._cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append((phase, mark))

    def seconds(self) -> dict[str, float]:
        """By phase, after the device has finished."""
        total: dict[str, float] = {}
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            lasted = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            total[phase] = total.get(phase, 0.0) + lasted
        return total


def timed(attention: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function, with marks around its forward and its backward pass."""

    @functools.wraps(attention)
    def with_marks(module, q, k, v, *args, **kwargs):
        clock = Clock.now
        if clock is None or clock.phase != "trunk":
            return attention(module, q, k, v, *args, **kwargs)
        clock.enter("attention")
        result = attention(module, q, k, v, *args, **kwargs)
        clock.enter("trunk")
        waiting = [q, k, v]

        def arrived(_: torch.Tensor) -> None:
            waiting.pop()
            if not waiting:
                clock.enter("trunk")

        result[0].register_hook(lambda _: clock.enter("attention"))
        for tensor in list(waiting):
            tensor.register_hook(arrived)
        return result

    return with_marks


def time_attention() -> None:
    """From now on every attention function that a variant uses reports to `Clock.now`."""
    functions = AttentionInterface()
    for name in ("sdpa", "pact_tree", "bench_flex", "bench_grouped"):
        if not hasattr(functions[name], "__wrapped__"):
            AttentionInterface.register(name, timed(functions[name]))


class Bench:
    """One model, its optimizer and its data; the update of any variant."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        self.model = build(case, device)
        vocab = self.model.config.vocab_size
        self.problems = [make_problem(case.shape, vocab, seed, 1.0 / case.prompts) for seed in range(case.prompts)]
        self.trainer = TrainerConfig(learning_rate=1e-6)
        self.optimizer = make_optimizer(self.model, self.trainer)

    def step(self, variant: Variant, setting: dict[str, int]) -> dict[str, Any]:
        """One update: its clock, loss and tokens of the trunk."""
        Clock.now = clock = Clock(self.device)
        clock.enter("rest")
        self.optimizer.zero_grad(set_to_none=True)
        loss, tokens = gradients(self.model, self.problems, variant, setting, self.case.old, clock)
        clock.enter("optimizer")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.trainer.max_grad_norm)
        self.optimizer.step()
        clock.enter("end")
        Clock.now = None
        return {"clock": clock, "loss": loss, "tokens": tokens}

    def clear(self) -> None:
        Clock.now = None
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def gradients(
    model: PreTrainedModel, problems: list[Problem], variant: Variant, setting: dict[str, int], old: bool, clock: Clock
) -> tuple[torch.Tensor, int]:
    """Loss and tokens of the trunk; gradients are left in the parameters."""
    loss, tokens = torch.zeros((), device=model.device), 0
    for problem in problems:
        for part in variant.passes(model, problem, **setting):
            known = None
            if old:
                clock.enter("old")
                with torch.no_grad():
                    known = part.logprob(part.decoder_of())
            clock.enter("trunk")
            hidden = part.decoder_of()
            hidden.register_hook(lambda _: clock.enter("trunk"))
            clock.enter("head")
            value = part.loss(hidden, known)
            value.backward()
            clock.enter("rest")
            loss, tokens = loss + value.detach(), tokens + part.tokens
    return loss, tokens


def check(case: Case, device: torch.device, names: list[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Errors of every variant against (a) in fp64 at a small shape, and what is wrong with them."""
    small = case._replace(layers=min(case.layers, 8 if case.model == "30m" else 2))
    model = build(small, device)
    problems = [make_problem(CHECKED, model.config.vocab_size, seed=0)]

    def run(name: str, dtype: str) -> tuple[float, dict[str, torch.Tensor]]:
        subject = copy.deepcopy(model).to(getattr(torch, dtype))
        variant = VARIANTS[name]
        loss, _ = gradients(subject, problems, variant, variant.settings(CHECKED)[0], case.old, Clock(device))
        return float(loss), {key: p.grad.double() for key, p in subject.named_parameters() if p.grad is not None}

    exact_loss, exact = run("alone", "float64")

    def errors(name: str, dtype: str) -> dict[str, float]:
        loss, grads = run(name, dtype)
        off = [float((grads[key] - g).norm() / g.norm()) if key in grads else float("inf") for key, g in exact.items()]
        return {"loss": abs(loss / exact_loss - 1.0), "gradient": max(off)}

    found: dict[str, dict[str, Any]] = {}
    failures = []
    own = errors("alone", case.dtype)
    for name in names:
        try:
            found[name] = {dtype: errors(name, dtype) for dtype in dict.fromkeys(("float32", case.dtype))}
        except Exception as error:  # a peer that does not run is a row of the table
            found[name] = {"status": reason(error)}
            if VARIANTS[name].ours:
                failures.append(f"{name}: {found[name]['status']}")
            continue
        for dtype, pair in found[name].items():
            for what, value in pair.items():
                limit = LIMIT if dtype == "float32" else max(torch.finfo(getattr(torch, dtype)).eps, FACTOR * own[what])
                if not value <= limit:
                    failures.append(f"{name}: {what} in {dtype} is off by {value:.2g}, more than {limit:.2g}")
    return found, failures


def reason(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"not installed: {error.name}"
    return failure(error)
