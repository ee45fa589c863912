"""OpenRLHF: log-probs and entropies of its actors without logits, of the tokens that the loss reads.

    ray.init(runtime_env={"worker_process_setup_hook": "pact_fast.integrations.openrlhf.install"})
    openrlhf.cli.train_ppo_ray.train(args)

Every worker then calls `install`. In a program without Ray, call it before training.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from pact_fast.integrations.fused_forward import replace_forward
from pact_fast.integrations.self_check import agree, check_head, due, z_dtype
from pact_fast.kernels import head_of, linear_logprob
from pact_fast.kernels.head.logit_transform import causal_lm_of, head_layer

HOST = "OpenRLHF"


@dataclass(frozen=True)
class _Tokens:
    """What an actor's forward is about to score.

    labels       int64 [B, L], the token after each position
    rows         bool [B, L], those that are needed; the others get 0
    temperature  of the policy
    check        whether the kernels are compared with full logits
    """

    labels: torch.Tensor
    rows: torch.Tensor
    temperature: float
    check: bool


class _Scored:
    """Stands where the actor expects logits: log-probs and entropies [B, L], final, so that its casts do nothing."""

    def __init__(self, logprob: torch.Tensor, entropy: torch.Tensor):
        self.logprob, self.entropy = logprob, entropy

    def to(self, dtype: torch.dtype) -> _Scored:
        return self

    def div_(self, temperature: float) -> _Scored:
        return self


def install() -> Callable[[], None]:
    """Let OpenRLHF's actors (0.9 to 0.11) score with these kernels; returns the function that undoes it.

    Served are forward passes that return log-probs: training steps, SFT and DPO losses, and the reference model's. Prompts are
    not scored where an action mask says what counts. Left to OpenRLHF: ring attention, models with images, router losses, and
    calls that ask for logits. Entropies are those of the policy at its temperature, as in 0.11.2.

    Raises:
        ImportError: OpenRLHF is not installed.
        PactError: In the first training step: the model's head is not supported, or kernels and OpenRLHF's own code disagree.
    """
    from openrlhf.models import actor as host

    before, undo = host.Actor.forward, [_score_without_logits(host)]
    patched: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # model → whether it has been checked
    pending: list[_Tokens] = []

    def forward(self: Any, sequences: torch.Tensor, action_mask: Any = None, **options: Any) -> Any:
        if not _served(self, action_mask, options):
            return before(self, sequences, action_mask, **options)
        causal_lm = causal_lm_of(self.model)
        if causal_lm not in patched:
            undo.append(replace_forward(self.model, lambda model, own: _scoring(model, own, pending)))
            patched[causal_lm] = False
        tokens = _tokens(self, sequences, action_mask, options["attention_mask"])
        check = torch.is_grad_enabled() and due(patched[causal_lm], int(tokens.rows.sum()))
        if check:
            patched[causal_lm] = True
            _check(self, before, pending, sequences, action_mask, options)
        with _scores(pending, tokens, check):
            return before(self, sequences, action_mask, **options)

    host.Actor.forward = forward

    def remove() -> None:
        host.Actor.forward = before
        while undo:
            undo.pop()()

    return remove


def _served(actor: Any, action_mask: Any, options: dict[str, Any]) -> bool:
    config = causal_lm_of(actor.model).config
    return (
        (action_mask is not None or bool(options.get("return_logprobs")))
        and options.get("attention_mask") is not None
        and options.get("ring_attn_group") is None
        and not getattr(actor, "is_vlm", False)
        and not getattr(config, "output_router_logits", False)
    )


def _tokens(actor: Any, sequences: torch.Tensor, action_mask: Any, attention_mask: torch.Tensor) -> _Tokens:
    """Labels and rows as the actor's model sees them: [B, L], or without padding [1, N] if it packs."""
    labels, rows = sequences.roll(-1, dims=1), _without_padding(attention_mask)
    if action_mask is not None:
        count = action_mask.shape[1]
        rows = torch.zeros_like(rows)
        rows[:, -count - 1 : -1] = action_mask.bool()
    if actor.packing_samples:
        kept = attention_mask.flatten().nonzero().squeeze(1)
        labels, rows = labels.flatten()[kept][None], rows.flatten()[kept][None]
    return _Tokens(labels, rows, float(actor.temperature), check=False)


def _without_padding(attention_mask: torch.Tensor) -> torch.Tensor:
    """bool [B, L]: the position or its label is a token."""
    return attention_mask.bool() | attention_mask.roll(-1, dims=1).bool()


@contextmanager
def _scores(pending: list[_Tokens], tokens: _Tokens, check: bool):
    pending.append(_Tokens(tokens.labels, tokens.rows, tokens.temperature, check))
    try:
        yield
    finally:
        pending.pop()


def _scoring(causal_lm: Any, own: Callable[..., Any], pending: list[_Tokens]) -> Callable[..., Any]:
    """The model's forward, with scores in place of logits while an actor waits for some."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    def forward(*args: Any, **options: Any) -> Any:
        if not pending:
            return own(*args, **options)
        tokens = pending[-1]
        hidden = causal_lm.base_model(*args, **options).last_hidden_state.flatten(0, 1)
        head, row = head_of(causal_lm), tokens.rows.flatten().nonzero().squeeze(1)
        target = tokens.labels.flatten()[row]
        if tokens.check:
            check_head(head_layer(causal_lm), head, hidden, row, target, tokens.temperature, HOST)
        out = linear_logprob(
            head.input(hidden[row]), head.weight, target, temperature=tokens.temperature, entropy=True, **head.options
        )
        assert out.entropy is not None
        scored = [_scattered(values, row, tokens.labels) for values in (out.logprob, out.entropy)]
        # DeepSpeed looks for tensors in what a forward returns
        return CausalLMOutputWithPast(logits=_Scored(*scored), hidden_states=tuple(scored))

    return forward


def _scattered(values: torch.Tensor, row: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.new_zeros(like.numel()).index_put((row,), values).view(like.shape)


def _score_without_logits(host: Any) -> Callable[[], None]:
    """Let the functions that the actor calls on its logits take scores; returns the function that undoes it."""
    logprobs, entropy = host.log_probs_from_logits, host.compute_entropy

    def log_probs_from_logits(logits: Any, *args: Any, **options: Any) -> torch.Tensor:
        return logits.logprob if isinstance(logits, _Scored) else logprobs(logits, *args, **options)

    def compute_entropy(logits: Any) -> torch.Tensor:
        return logits.entropy if isinstance(logits, _Scored) else entropy(logits)

    host.log_probs_from_logits, host.compute_entropy = log_probs_from_logits, compute_entropy

    def remove() -> None:
        host.log_probs_from_logits, host.compute_entropy = logprobs, entropy

    return remove


def _check(
    actor: Any, before: Callable[..., Any], pending: list[_Tokens], sequences: Any, action_mask: Any, options: Any
) -> None:
    """Compare the log-probs of the first sequence with those of OpenRLHF's own code, without dropout."""
    one = {**options, "attention_mask": options["attention_mask"][:1], "return_output": False, "return_entropy": False}
    mask = None if action_mask is None else action_mask[:1]
    training = actor.training
    actor.eval()
    try:
        with torch.no_grad():
            theirs = before(actor, sequences[:1], mask, **one)
            with _scores(pending, _tokens(actor, sequences[:1], mask, one["attention_mask"]), check=False):
                ours = before(actor, sequences[:1], mask, **one)
    finally:
        actor.train(training)
    if mask is None:  # padding is not scored
        kept = _without_padding(one["attention_mask"])[:, :-1].to(theirs)
        ours, theirs = ours * kept, theirs * kept
    head = head_of(actor.model)
    agree("log-probs", ours, theirs, z_dtype(torch.empty(0, dtype=head.weight.dtype), head), HOST, scale=1.0)
