"""One update: models with random weights, the step with a clock over its phases, and the check against fp64."""

from __future__ import annotations

import copy
import functools
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.harness import Case, failure
from benchmarks.recurrences import token_by_token
from benchmarks.update_methods import METHODS, UpdateMethod
from benchmarks.update_problem import PromptProblem, Shape, make_problem
from pact_fast.config import TrainerConfig
from pact_fast.model.attention.registered import registered_name
from pact_fast.train.backends.replicated import make_optimizer

QWEN3 = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40_960}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256, "head_dim": 16, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True,
    },
    "quickstart": {
        "vocab_size": 640, "head_dim": 32, "num_key_value_heads": 1, "hidden_size": 128, "intermediate_size": 512,
        "num_hidden_layers": 4, "num_attention_heads": 4, "tie_word_embeddings": True,
    },
    "30m": {
        "vocab_size": 8192, "head_dim": 64, "num_key_value_heads": 4, "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 8, "num_attention_heads": 8, "tie_word_embeddings": True,
    },
    "qwen3_5": {  # 30 M, 6 layers of Gated DeltaNet and 2 of attention
        "model_type": "qwen3_5_text", "vocab_size": 8192, "head_dim": 64, "num_key_value_heads": 4, "hidden_size": 512,
        "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8, "tie_word_embeddings": True,
        "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "max_position_embeddings": 32_768,
    },
    "gemma3": {  # 30 M, 7 layers with a window of 256 tokens and 1 of full attention
        "model_type": "gemma3_text", "vocab_size": 8192, "head_dim": 64, "num_key_value_heads": 4, "hidden_size": 512,
        "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8, "tie_word_embeddings": True,
        "sliding_window": 256, "query_pre_attn_scalar": 64, "max_position_embeddings": 32_768,
        "layer_types": [*["sliding_attention"] * 5, "full_attention", *["sliding_attention"] * 2],
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
REFERENCE = "full-logits"  # the method that the others are checked against, in fp64
DEFAULT_LAYERS = {"qwen3-8b": 8}  # of 36: activations of 25,000 tokens and AdamW's state fill one GPU
CHECKED = Shape(48, 40, 24, 4, 8)
LIMIT, FACTOR = 1e-5, 2.0  # of relative errors: in fp32 (others: eps), or times REFERENCE's own error, if that is more


@dataclass(frozen=True)
class UpdateCase(Case):
    """An update of a model.

    model      of MODELS
    layers     of its decoder
    shape      of a prompt
    dtype      of weights and activations
    prompts    of the update, each a micro-batch
    old        whether log-probs of the old policy are computed by a pass of their own
    """

    model: str
    layers: int
    shape: Shape
    dtype: str
    prompts: int
    old: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", Shape(*self.shape))  # a list, where it comes from JSON

    def __str__(self) -> str:
        full = MODELS[self.model]["num_hidden_layers"]
        some = "" if self.layers == full else f" with {self.layers} of its {full} layers"
        p, z, n, k, r = self.shape
        old = ", old log-probs by a pass of their own" if self.old else ""
        return f"{self.model}{some}, {self.dtype}: {self.prompts} x (P={p} Z={z} L={n} K={k} R={r}){old}"


def build(case: UpdateCase, device: torch.device) -> PreTrainedModel:
    """The case's model with random weights (seed 0), in its dtype and in training mode."""
    torch.manual_seed(0)
    settings = {"model_type": "qwen3"} | MODELS[case.model] | {"num_hidden_layers": case.layers, "use_cache": False}
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][: case.layers]
    config = AutoConfig.for_model(**settings)
    with device:
        return AutoModelForCausalLM.from_config(config).to(getattr(torch, case.dtype)).train()


class Clock:
    """Seconds by phase, from a mark at every change of phase (CUDA: events)."""

    now: Clock | None = None  # the clock that attention functions report to

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    @property
    def phase(self) -> str:
        """The phase that began last."""
        return self._marks[-1][0]

    def enter(self, phase: str) -> None:
        """Mark the begin of a phase, and so the end of the one before."""
        mark: Any = time.perf_counter()
        if self._cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append((phase, mark))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, added up over its marks. The device must have finished."""
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
        if clock is None or clock.phase != "decoder":
            return attention(module, q, k, v, *args, **kwargs)
        clock.enter("attention")
        result = attention(module, q, k, v, *args, **kwargs)
        clock.enter("decoder")
        waiting = [q, k, v]

        def arrived(_: torch.Tensor) -> None:
            waiting.pop()
            if not waiting:
                clock.enter("decoder")

        result[0].register_hook(lambda _: clock.enter("attention"))
        for tensor in list(waiting):
            tensor.register_hook(arrived)
        return result

    return with_marks


def time_attention() -> None:
    """Make every attention function that a method uses report to `Clock.now`."""
    functions, peers = AttentionInterface(), ("sdpa", "bench_flex", "bench_grouped")
    for name in (*peers, *map(registered_name, peers)):  # a tree may follow any of them
        if not hasattr(functions[name], "__wrapped__"):
            AttentionInterface.register(name, timed(functions[name]))


class Bench:
    """One model, its optimizer and its data, on which every method runs its update."""

    def __init__(self, case: UpdateCase, device: torch.device):
        self.case, self.device = case, device
        self.model = build(case, device)
        vocab = self.model.config.vocab_size
        self.problems = [make_problem(case.shape, vocab, seed, 1.0 / case.prompts) for seed in range(case.prompts)]
        self.trainer = TrainerConfig(learning_rate=1e-6)
        self.optimizer = make_optimizer(self.model, self.trainer)

    def step(self, method: UpdateMethod, setting: dict[str, int]) -> dict[str, Any]:
        """Make one update with a method in one of its settings.

        Returns:
            "clock", whose seconds may be read when the device has finished; "loss", a tensor; and "tokens", the number that
            the decoder computed.
        """
        Clock.now = clock = Clock(self.device)
        clock.enter("rest")
        self.optimizer.zero_grad(set_to_none=True)
        loss, tokens = gradients(self.model, self.problems, method, setting, self.case.old, clock)
        clock.enter("optimizer")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.trainer.max_grad_norm)
        self.optimizer.step()
        clock.enter("end")
        Clock.now = None
        return {"clock": clock, "loss": loss, "tokens": tokens}

    def clear(self) -> None:
        """Free gradients and whatever else the last step left, on the device as well."""
        Clock.now = None
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def gradients(
    model: PreTrainedModel,
    problems: list[PromptProblem],
    method: UpdateMethod,
    setting: dict[str, int],
    old: bool,
    clock: Clock,
) -> tuple[torch.Tensor, int]:
    """Forward and backward passes over all prompts; gradients are added to those of the parameters.

    Args:
        model: The model.
        problems: The prompts of the update.
        method: How they are batched and scored.
        setting: One of the method's settings.
        old: Whether log-probs of the old policy are computed by a pass without gradient; else they are the current ones.
        clock: Takes the seconds of each phase.

    Returns:
        The loss, a scalar, and the number of tokens that the decoder computed.
    """
    loss, tokens = torch.zeros((), device=model.device), 0
    for problem in problems:
        for part in method.passes(model, problem, **setting):
            known = None
            if old:
                clock.enter("old")
                with torch.no_grad():
                    known = part.logprob(part.decoder())
            clock.enter("decoder")
            hidden = part.decoder()
            hidden.register_hook(lambda _: clock.enter("decoder"))
            clock.enter("head")
            value = part.loss(hidden, known)
            value.backward()
            clock.enter("rest")
            loss, tokens = loss + value.detach(), tokens + part.tokens
    return loss, tokens


def check(case: UpdateCase, device: torch.device, names: list[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Compare every method with REFERENCE in fp64 at a small shape, in fp32 and in the case's dtype.

    Returns:
        By method and dtype, relative errors of "loss" and "gradient" (the largest of a parameter's, in the Frobenius norm),
        or a "status" that says why there are none; and a line for each error above its limit.
    """
    small = replace(case, layers=min(case.layers, 8 if MODELS[case.model]["num_hidden_layers"] == 8 else 2))
    model = build(small, device)
    problems = [make_problem(CHECKED, model.config.vocab_size, seed=0)]

    def run(name: str, dtype: str) -> tuple[float, dict[str, torch.Tensor]]:
        subject = copy.deepcopy(model).to(getattr(torch, dtype))
        method = METHODS[name]
        loss, _ = gradients(subject, problems, method, method.settings(CHECKED)[0], case.old, Clock(device))
        return float(loss), {key: p.grad.double() for key, p in subject.named_parameters() if p.grad is not None}

    with token_by_token(model):  # transformers' own code of recurrent layers computes in fp32
        exact_loss, exact = run(REFERENCE, "float64")

    def errors(name: str, dtype: str) -> dict[str, float]:
        loss, grads = run(name, dtype)
        off = [float((grads[key] - g).norm() / g.norm()) if key in grads else float("inf") for key, g in exact.items()]
        return {"loss": abs(loss / exact_loss - 1.0), "gradient": max(off)}

    found: dict[str, dict[str, Any]] = {}
    failures = []
    own = {dtype: errors(REFERENCE, dtype) for dtype in dict.fromkeys(("float32", case.dtype))}
    for name in names:
        if missing := METHODS[name].not_installed():
            found[name] = {"status": missing}
            continue
        try:
            found[name] = {dtype: errors(name, dtype) for dtype in own}
        except Exception as error:  # a row of the table
            found[name] = {"status": failure(error)}
            if METHODS[name].ours:
                failures.append(f"{name}: {found[name]['status']}")
            continue
        for dtype, pair in found[name].items():
            for what, value in pair.items():
                floor = LIMIT if dtype == "float32" else torch.finfo(getattr(torch, dtype)).eps
                limit = max(floor, FACTOR * own[dtype][what])
                if not value <= limit:
                    failures.append(f"{name}: {what} in {dtype} is off by {value:.2g}, more than {limit:.2g}")
    return found, failures
