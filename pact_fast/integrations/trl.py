"""TRL (1.15 or newer): log-probs at full precision, GRPO and SFT in one pass over the logits, GRPO on shared prompts.

    trainer = GRPOTrainer(...)
    install(trainer)  # before trainer.train()

docs/integrations.md lists the supported features. `install` needs torch, transformers and trl.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch

from pact_fast.errors import PactError
from pact_fast.integrations.fused_forward import replace_forward, separate_logprobs, summed_logprobs
from pact_fast.integrations.self_check import RandomState, check_close, check_head_of, due, z_dtype
from pact_fast.kernels import head_of

HOST = "TRL"
# fields of TRL's output → statistics of ours
STATISTICS = {"log_sum_sq_probs": "log_sum_sq_probs", "mean_logits": "mean_logit", "is_top1": "is_top1"}
Mode = Literal["head", "loss", "tree"]


class Installed:
    """Changes that `install` made to a trainer.

    served  {part: how}, such as {"head": "log-probs", "loss": "one pass"}
    reasons  {part: reason} of the parts that are left to the host
    """

    def __init__(self) -> None:
        self.served: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self._undo: list[Callable[[], None]] = []

    def remove(self) -> None:
        """Give the trainer its own code back."""
        while self._undo:
            self._undo.pop()()


def install(trainer: Any, mode: Mode = "loss") -> Installed:
    """Let a GRPO, RLOO, SFT, DPO or KTO trainer of TRL compute log-probs and losses with these kernels.

    Args:
        trainer: Before or between `train()` calls.
        mode: "head": log-probs and entropies, in every trainer. "loss": in addition, GRPO and SFT form their gradients in the
            pass that makes the logits. "tree": in addition, GRPO computes a prompt once for its completions.

    Returns:
        The served parts, and the reasons for parts that are left to TRL.

    Raises:
        PactError: The trainer has no fused head, or its model's head is not supported. On the first batch: the
            kernels and TRL's own code disagree.
    """
    if mode not in ("head", "loss", "tree"):
        raise PactError(f"mode='{mode}' is unknown; use 'head', 'loss' or 'tree'")
    result = Installed()
    kind = next((c.__name__ for c in type(trainer).__mro__ if c.__module__.startswith("trl.trainer.")), "")
    args, summed = trainer.args, False
    if mode != "head" and kind == "SFTTrainer":
        if args.loss_type != "nll" or trainer.compute_loss_func or args.label_smoothing_factor:
            result.reasons["loss"] = "its weights depend on the model; the head is served"
        else:
            summed, result.served["loss"] = True, "one pass"
    for name in ("model", "ref_model"):
        model = getattr(trainer, name, None)
        if model is not None:
            make = functools.partial(_fused, summed=summed and name == "model")
            result._undo.append(replace_forward(model, make))
    result.served["head"] = "log-probs"
    if mode != "head" and kind == "GRPOTrainer":
        from pact_fast.integrations import trl_grpo

        trl_grpo.install(trainer, mode == "tree", result.served, result.reasons, result._undo)
    elif mode != "head" and kind != "SFTTrainer":
        result.reasons["loss"] = f"{kind or type(trainer).__name__} has no loss of ours; the head is served"
    return result


def _fused(causal_lm: Any, before: Any, summed: bool) -> Callable[..., Any]:
    """TRL's forward with `fused_lm_head=True`, by these kernels; everything else goes to the forward before."""
    from trl.trainer.utils import FusedCausalLMOutput

    settings = inspect.getclosurevars(getattr(before, "__func__", before)).nonlocals
    if not {"temperature", "outputs", "cast_lm_head_to_fp32"} <= settings.keys():
        raise PactError("TRL: the model has no supported fused head; use TRL 1.15 or newer, and install once")
    temperature, names = settings["temperature"], [n for n in settings["outputs"] if n in STATISTICS]
    full_precision, checked = settings["cast_lm_head_to_fp32"], False

    def forward(*args: Any, fused_lm_head: bool = False, labels=None, shift_labels=None, **options: Any) -> Any:
        nonlocal checked
        given = {"labels": labels, "shift_labels": shift_labels}
        given = {name: value for name, value in given.items() if value is not None}
        if not fused_lm_head or options.get("output_router_logits"):  # MoE losses need more than hidden states
            return before(*args, fused_lm_head=fused_lm_head, **given, **options)
        count = options.pop("num_items_in_batch", None)
        random = None if checked else RandomState(causal_lm.device)
        hidden = causal_lm.base_model(*args, **options | {"use_cache": False}).last_hidden_state
        if shift_labels is None:
            hidden, labels = hidden[:, :-1], labels[:, 1:]
        else:
            labels = shift_labels
        mask = labels != -100
        rows, target, head = hidden[mask], labels[mask], head_of(causal_lm)
        with torch.autocast(
            hidden.device.type, enabled=torch.is_autocast_enabled(hidden.device.type) and not full_precision
        ):
            rows = rows.float() if full_precision else rows
            form = summed_logprobs if summed and torch.is_grad_enabled() else separate_logprobs
            wanted = {"temperature": temperature, "statistics": [STATISTICS[n] for n in names]}
            logprob, entropy, statistics = form(rows, head, target, **wanted)
            if random is not None and due(checked, len(target)):
                checked, dtype = True, z_dtype(rows, head)
                with random.replayed(), torch.no_grad():
                    theirs = before(*args, fused_lm_head=True, **given, **options)
                check_close("log-probs", logprob, theirs.log_probs[mask], dtype, HOST, scale=1.0)
                every = torch.arange(len(rows), device=rows.device)
                check_head_of(causal_lm, rows, every, target, temperature, HOST)
        fields = {"log_probs": logprob} | {n: statistics[STATISTICS[n]] for n in names}
        if "entropy" in settings["outputs"]:
            fields["entropy"] = entropy
        fields = {name: x.new_zeros(mask.shape).masked_scatter(mask, x) for name, x in fields.items()}
        loss = -fields["log_probs"].sum() / (mask.sum().clamp(min=1) if count is None else count)
        return FusedCausalLMOutput(loss=loss, label_mask=mask, **fields)

    return forward
