"""TRL's GRPO loss in the pass that makes the logits, and on trees of shared prompts. Installed by `trl.install`.

TRL's own `_compute_loss` still runs on the log-probs that the pass returns: it logs the metrics, and on the first batch
its loss and its derivatives by log-probs and entropies must be ours.
"""

from __future__ import annotations

from typing import Any

import torch

from pact_fast.integrations import trl_loss
from pact_fast.integrations.prompt_tree import PromptTrees, group_shuffle, unsupported_tree
from pact_fast.integrations.self_check import RandomState, check_close, check_head_of, due, z_dtype
from pact_fast.kernels import head_of, pact_loss
from pact_fast.kernels.head.logit_transform import causal_lm_of
from pact_fast.model.forward import inside_forward

HOST = "TRL's GRPO"
TEXT_INPUTS = {
    "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "advantages", "num_items_in_batch",
    "old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps", "importance_sampling_ratio",
}  # fmt: skip


def install(trainer: Any, tree: bool, served: dict[str, str], reasons: dict[str, str], undo: list[Any]) -> None:
    """See `trl.install`."""
    reason = trl_loss.unsupported(trainer)
    if reason is not None:
        reasons["loss"] = f"{reason}; the head is served"
        return
    no_tree = unsupported_tree(causal_lm_of(trainer.model)) if tree else None
    if tree and no_tree:
        reasons["tree"] = no_tree
    step = FusedComputeLoss(trainer, tree and no_tree is None)
    _override(trainer, "_compute_loss", step, undo)
    served["loss"] = "one pass"
    if step.tree:
        _override(trainer, "_prepare_inputs", group_shuffle(trainer._prepare_inputs), undo)
        served["tree"] = "prompts are computed once for the completions of a micro-batch"


def _override(trainer: Any, name: str, method: Any, undo: list[Any]) -> None:
    """Put a method in front of that of the trainer's class, or of an earlier override."""
    before = vars(trainer).get(name)
    setattr(trainer, name, method)
    undo.append((lambda: delattr(trainer, name)) if before is None else (lambda: setattr(trainer, name, before)))


class FusedComputeLoss:
    """`_compute_loss(model, inputs)` of a trainer."""

    def __init__(self, trainer: Any, tree: bool):
        self._trainer, self._host, self.tree = trainer, trainer._compute_loss, tree
        self._checked, self._dtype = False, torch.float32  # of the host's logits

    def __call__(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        trainer = self._trainer
        if not trainer.model.training or set(inputs) - TEXT_INPUTS:  # evaluation; images
            return self._host(model, inputs)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        at = mask.nonzero(as_tuple=True)
        trees = PromptTrees.of_padded(inputs) if self.tree else None
        start = inputs["prompt_ids"].shape[1]
        row = trees.rows(at) if trees else at[0] * ids.shape[1] + at[1] + start - 1
        tokens = trl_loss.loss_table(trainer, inputs, mask, at, row)
        loss, causal_lm = trl_loss.loss_of_token(trainer, inputs, at), causal_lm_of(model)

        def run() -> tuple[torch.Tensor, ...]:
            with trainer.accelerator.autocast():
                if trees is not None:
                    hidden = trees.forward(causal_lm)
                else:
                    options = {"attention_mask": attention, "use_cache": False}
                    hidden = causal_lm.base_model(input_ids=ids, **options).last_hidden_state.flatten(0, 1)
                if trainer.args.cast_lm_head_to_fp32:
                    hidden = hidden.float()
                with torch.autocast(hidden.device.type, enabled=self._autocast(hidden)):
                    if due(self._checked, len(tokens)):
                        check_head_of(causal_lm, hidden, tokens.row, tokens.target, trainer.temperature, HOST)
                    head = head_of(causal_lm)
                    out = pact_loss(
                        head.input(hidden), head.weight, tokens, policy_loss=loss, temperature=trainer.temperature,
                        entropy_coef=trl_loss.entropy_coef(trainer), **head.options,
                    )  # fmt: skip
                    self._dtype = z_dtype(hidden, head)
                    return out.loss, out.logprob, out.entropy

        random = RandomState(causal_lm.device)
        total, logprob, entropy = inside_forward(model, run)
        if due(self._checked, len(tokens)):
            self._check(model, inputs, ids, attention, at, (total, logprob, entropy), (tokens, loss), random)
        with torch.no_grad():
            self._by_host(model, inputs, at, logprob, entropy)  # metrics
        return total

    def _autocast(self, hidden: torch.Tensor) -> bool:
        return torch.is_autocast_enabled(hidden.device.type) and not self._trainer.args.cast_lm_head_to_fp32

    def _by_host(self, model: Any, inputs: dict, at: Any, logprob: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        """TRL's own loss, and its metrics, from log-probs and entropies [N]."""
        trainer, old = self._trainer, inputs.get("old_per_token_logps")
        base = torch.zeros_like(inputs["completion_ids"], dtype=logprob.dtype) if old is None else old.to(logprob.dtype)
        # where there is no loss, the old log-probs: a ratio that overflows would be NaN under the mask
        values = [base.index_put(at, logprob), torch.zeros_like(base).index_put(at, entropy)]
        trainer._get_per_token_logps_and_entropies = lambda *args, **options: (*values, None)
        try:
            return self._host(model, inputs)
        finally:
            del trainer._get_per_token_logps_and_entropies

    def _check(self, model, inputs, ids, attention, at, results, ours, random) -> None:
        trainer, (total, logprob, entropy), (tokens, loss) = self._trainer, results, ours
        self._checked = True
        with random.replayed(), torch.no_grad():
            length = inputs["completion_ids"].shape[1]
            theirs = trainer._get_per_token_logps_and_entropies(model, ids, attention, length, compute_entropy=True)
        check_close("log-probs", logprob, theirs[0][at], self._dtype, HOST)
        check_close("entropies", entropy, theirs[1][at], self._dtype, HOST)
        state = {
            name: getattr(trainer, name) for name in ("_entropy_window_stats", "_last_world_entropy", "entropy_coef")
        }
        metrics, trainer._metrics = trainer._metrics, {"train": _Ignore(), "eval": _Ignore()}
        try:
            x, y = (t.clone().requires_grad_() for t in (logprob, entropy))
            expected = self._by_host(model, inputs, at, x, y)
            by_host = torch.autograd.grad(expected, (x, y), allow_unused=True)
            mine = tokens.rl_weight * loss(x, y, torch.arange(len(x), device=x.device))
        finally:
            trainer._metrics = metrics
            for name, value in state.items():
                setattr(trainer, name, value)
        mine = mine - trl_loss.entropy_coef(trainer) * tokens.entropy_weight * y
        check_close("the loss", total, expected, torch.float32, HOST, scale=float(mine.detach().abs().sum()))
        derivatives = torch.autograd.grad(mine.sum(), (x, y), allow_unused=True)
        for name, *pair in zip(("log-probs", "entropies"), derivatives, by_host, strict=True):
            a, b = (torch.zeros_like(x) if t is None else t for t in pair)
            check_close(f"derivatives by {name}", a, b, torch.float32, HOST)


class _Ignore(dict):
    """Metrics of the check, which are not logged."""

    def __missing__(self, name: str) -> list:
        return []
