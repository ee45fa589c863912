"""verl's FSDP engines with the loss in the pass that makes the logits, and with prompts computed once. See `verl.install`."""

from __future__ import annotations

import functools
import logging
from contextlib import nullcontext
from typing import Any

import torch

from pact_fast.integrations.fused_forward import separate_logprobs
from pact_fast.integrations.host_loss import HostLoss
from pact_fast.integrations.prompt_tree import unsupported_tree
from pact_fast.integrations.self_check import RandomState, check_close, check_head_of, due, z_dtype
from pact_fast.integrations.verl_batch import VerlBatch, group_size
from pact_fast.kernels import head_of
from pact_fast.kernels.head.logit_transform import causal_lm_of, decoder_of
from pact_fast.model.forward import inside_forward

HOST = "verl's engine"
FUSED_HEAD = {"temperature", "return_dict", "shift_labels"}  # arguments for a model with verl's fused head


def register() -> None:
    """Register the engines with verl: vendors `pact` and `pact_tree` of `fsdp` and `fsdp2`, for language models."""
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    for vendor, tree in (("pact", False), ("pact_tree", True)):
        known = EngineRegistry._engines.get("language_model", {}).get("fsdp", {})
        if ("cuda", vendor) not in known:
            engine = type(f"Engine_{vendor}", (FusedEngineMixin, FSDPEngineWithLMHead), {"pact_tree": tree})
            EngineRegistry.register("language_model", ["fsdp", "fsdp2"], ["cuda", "cpu"], vendor)(engine)


class FusedEngineMixin:
    """Mixin for verl's engine: `forward_step` without logits, and micro-batches that keep prompts together."""

    pact_tree = False

    def forward_backward_batch(self: Any, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        """verl's own; with trees and `use_dynamic_bsz`, completions of a prompt stay in one micro-batch if they fit."""
        from verl.utils import tensordict_utils as tu

        if self.pact_tree and tu.get_non_tensor_data(data, "use_dynamic_bsz", True):
            tu.assign_non_tensor(data, force_group_size=group_size(data))
        return super().forward_backward_batch(data, loss_function, forward_only)  # type: ignore[misc]

    def forward_step(self: Any, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        """(loss, output) as verl's; tokens that no loss reads are not scored."""
        from verl.utils.device import get_device_id, get_device_name

        own = super().forward_step  # type: ignore[misc]
        micro_batch = micro_batch.to(get_device_id())
        reason = _left_to_verl(self, micro_batch)
        if reason is not None:
            _warn_once(reason)
            return own(micro_batch, loss_function, forward_only)
        tokens = VerlBatch(micro_batch, everything=loss_function is None)
        dtype = getattr(self, "_autocast_dtype", torch.bfloat16)
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(get_device_name(), dtype)
        check = torch.is_grad_enabled() and due(getattr(self, "_pact_checked", False), len(tokens.row))
        random = RandomState(causal_lm_of(self.module).device) if check else None
        with autocast:
            logprob, entropy = inside_forward(
                self.module, functools.partial(_score, self, tokens, loss_function, check)
            )
        if random is not None:
            self._pact_checked = True
            with random.replayed(), torch.no_grad():
                theirs = own(micro_batch, None, True)[1]["model_output"]
            for name, ours in (("log_probs", logprob), ("entropy", entropy)):
                if name in theirs:
                    check_close(name, ours, theirs[name].values()[tokens.row], self._pact_dtype, HOST, scale=1.0)
        with autocast:
            output, loss, metrics = tokens.model_output(logprob, entropy), torch.ones((), device=logprob.device), {}
            if loss_function is not None:
                group = self.get_data_parallel_group()
                loss, metrics = loss_function(model_output=output, data=micro_batch, dp_group=group)
        output = {name: values.detach() for name, values in output.items()}
        return loss, {"model_output": output, "loss": loss.detach().item(), "metrics": metrics}


def _score(engine: Any, tokens: VerlBatch, loss_function: Any, check: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [N]; runs inside the forward pass of verl's module."""
    causal_lm = causal_lm_of(engine.module)
    trees = tokens.trees() if engine.pact_tree and tokens.shares_prompts() and _tree(causal_lm) else None
    if trees is not None:
        hidden, row = trees.forward(causal_lm), trees.rows(tokens.at)
    else:
        inputs, _ = engine.prepare_model_inputs(micro_batch=tokens.data)
        inputs = {name: value for name, value in inputs.items() if name not in FUSED_HEAD}
        hidden = decoder_of(causal_lm)(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        row = tokens.rows_in(inputs["attention_mask"])
    if check:
        temperature = tokens.temperature
        if isinstance(temperature, torch.Tensor):  # of each token
            temperature = temperature[0].item() if len(temperature) else 1.0
        check_head_of(causal_lm, hidden, row, tokens.target, temperature, HOST)
    head = head_of(causal_lm)
    engine._pact_dtype = z_dtype(hidden, head)
    if loss_function is None or not torch.is_grad_enabled():
        return separate_logprobs(hidden[row], head, tokens.target, temperature=tokens.temperature)[:2]

    def loss(logprob: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        output, group = tokens.model_output(logprob, entropy), engine.get_data_parallel_group()
        return loss_function(model_output=output, data=tokens.data, dp_group=group)[0]

    if not hasattr(engine, "_pact_loss"):
        engine._pact_loss = HostLoss()
    found = engine._pact_loss(hidden, head, row, tokens.target, loss, tokens.old_logprob, tokens.temperature)
    if not engine._pact_loss.token_wise:
        _warn_once(
            "the loss of a token depends on other tokens: its gradients are formed in a second pass over the logits"
        )
    return found


def _left_to_verl(engine: Any, micro_batch: Any) -> str | None:
    """Why verl's own code computes a micro-batch; None: it does not have to."""
    from verl.utils import tensordict_utils as tu

    for name in ("distillation_use_topk", "distillation_only", "calculate_sum_pi_squared"):
        if tu.get_non_tensor_data(micro_batch, name, False):
            return f"{name} needs logits"
    if engine.use_ulysses_sp:
        return "ulysses_sequence_parallel_size > 1 splits sequences over ranks"
    if "multi_modal_inputs" in micro_batch or micro_batch["position_ids"].dim() == 3:
        return "images are not served"
    if "routed_experts" in micro_batch:
        return "routing replay is not served"
    return None


def _tree(causal_lm: Any) -> bool:
    reason = unsupported_tree(causal_lm)
    if reason is not None:
        _warn_once(f"prompts are not shared: {reason}")
    return reason is None


@functools.cache  # once per reason and process
def _warn_once(reason: str) -> None:
    logging.getLogger(__name__).warning("%s: %s", HOST, reason)
