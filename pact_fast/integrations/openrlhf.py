"""OpenRLHF: log-probs and entropies of its actors without logits, and its policy loss in one pass over them.

    ray.init(runtime_env={"worker_process_setup_hook": "pact_fast.integrations.openrlhf.install"})
    openrlhf.cli.train_ppo_ray.train(args)

Every worker then calls `install`. In a program without Ray, call it before training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from pact_fast.integrations.class_head import replace_method
from pact_fast.integrations.fused_forward import separate_logprobs
from pact_fast.integrations.host_loss import HostLoss
from pact_fast.integrations.openrlhf_step import loss_of_step
from pact_fast.integrations.self_check import RandomState, check_close, check_head_of, due, z_dtype
from pact_fast.kernels import head_of
from pact_fast.kernels.head.logit_transform import causal_lm_of, decoder_of
from pact_fast.model.forward import inside_forward

HOST = "OpenRLHF"


class _State:
    """State of an actor's model: whether it has been checked, and whether its loss is a sum over tokens."""

    def __init__(self) -> None:
        self.checked, self.host_loss = False, HostLoss()


def install() -> Callable[[], None]:
    """Let OpenRLHF's actors (0.9 to 0.11) score with these kernels; returns the function that undoes it.

    Served are forward passes that return log-probs: training steps, SFT and DPO losses, and the reference model's. Prompts are
    not scored where an action mask says what counts. `ActorPPOTrainer.training_step` (0.11) differentiates its loss, whatever
    it is, in the pass that makes the logits. Left to OpenRLHF: ring attention, models with images, router losses, and calls
    that ask for logits. Entropies are those of the policy at its temperature, as in 0.11.2.

    Raises:
        ImportError: OpenRLHF is not installed.
        PactError: In the first training step: the model's head is not supported, or kernels and OpenRLHF's own code disagree.
    """
    from openrlhf.models import actor as host

    states: WeakKeyDictionary[Any, _State] = WeakKeyDictionary()  # of causal LMs
    losses: list[Any] = []  # the loss of the training step that runs

    def make(before: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, sequences: torch.Tensor, action_mask: Any = None, **options: Any) -> Any:
            if len(undo) == 1:  # OpenRLHF's trainer is perhaps imported by now
                undo.extend(loss_of_step(losses))
            if not _served(self, action_mask, options):
                return before(self, sequences, action_mask, **options)
            state = states.setdefault(causal_lm_of(self.model), _State())
            return _Forward(self, sequences, action_mask, options, state, losses).run(host, before)

        return forward

    undo = [replace_method(host.Actor, "forward", make), *loss_of_step(losses)]

    def remove() -> None:
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


class _Forward:
    """One forward pass of an actor."""

    def __init__(self, actor: Any, sequences: Any, action_mask: Any, options: Any, state: _State, losses: list[Any]):
        self._actor, self._sequences, self._action_mask, self._options = actor, sequences, action_mask, options
        self._state, self._attention, self._shape = state, options["attention_mask"].bool(), sequences.shape
        self._step: Any = losses[-1] if losses and action_mask is not None and torch.is_grad_enabled() else None
        scored = self._attention | self._attention.roll(-1, dims=1)  # the position or its label is a token
        if action_mask is not None:
            scored = torch.zeros_like(self._attention)
            scored[:, -action_mask.shape[1] - 1 : -1] = action_mask.bool()
        self._at = (scored & self._attention if actor.packing_samples else scored).flatten().nonzero().squeeze(1)

    def run(self, host: Any, before: Callable[..., Any]) -> Any:
        """Compute the result of `Actor.forward` with the fused head."""
        check = torch.is_grad_enabled() and due(self._state.checked, len(self._at))
        random = RandomState(self._sequences.device) if check else None
        scores = inside_forward(self._actor.model, functools.partial(self._score, host, check))
        logprob, entropy = (self._scattered(values)[:, :-1] for values in scores)
        if random is not None:
            self._state.checked = True
            own = {**self._options, "return_output": False, "return_entropy": False}
            with random.replayed(), torch.no_grad():
                theirs = before(self._actor, self._sequences, self._action_mask, **own)
            kept = self._scattered(torch.ones_like(scores[0]))[:, -theirs.shape[1] - 1 : -1]
            check_close("log-probs", logprob[:, -theirs.shape[1] :] * kept, theirs * kept, self._dtype, HOST, scale=1.0)
        if self._action_mask is not None:
            logprob = logprob[:, -self._action_mask.shape[1] :] * self._action_mask.float()
        if not self._options.get("return_output"):
            return logprob
        from transformers.modeling_outputs import CausalLMOutputWithPast

        output = CausalLMOutputWithPast()
        output.entropy = entropy
        return logprob, output

    def _score(self, host: Any, check: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probs, entropies) [N]; runs inside the forward pass of the actor's model."""
        causal_lm, mask, row = causal_lm_of(self._actor.model), self._options["attention_mask"], self._at
        ids, position = self._sequences, (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)
        if self._actor.packing_samples:
            row = (self._attention.flatten().cumsum(0) - 1)[row]
            ids, position, *_ = host.unpad_and_slice_tensor(ids, mask, None)
            mask = None
        hidden = decoder_of(causal_lm)(ids, attention_mask=mask, position_ids=position)[0].flatten(0, 1)
        target, temperature = self._sequences.roll(-1, dims=1).flatten()[self._at], float(self._actor.temperature)
        if check:
            check_head_of(causal_lm, hidden, row, target, temperature, HOST)
        head = head_of(causal_lm)
        self._dtype = z_dtype(hidden, head)
        if self._step is None:
            return separate_logprobs(hidden[row], head, target, temperature=temperature)[:2]
        return self._state.host_loss(hidden, head, row, target, self._loss, self._old_logprob(), temperature)

    def _loss(self, logprob: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        """The loss of the training step, of log-probs and entropies [N]."""
        actions = self._scattered(logprob)[:, -self._action_mask.shape[1] - 1 : -1]
        return self._step.loss(actions, self._scattered(entropy)[:, :-1])

    def _old_logprob(self) -> torch.Tensor:
        old = self._step.old_logprob.float()
        return torch.nn.functional.pad(old, (self._shape[1] - old.shape[1] - 1, 1)).flatten()[self._at]

    def _scattered(self, values: torch.Tensor) -> torch.Tensor:
        """[B, L] with values [N] at the positions that are scored, else 0."""
        return values.new_zeros(self._sequences.numel()).index_put((self._at,), values).view(self._shape)
