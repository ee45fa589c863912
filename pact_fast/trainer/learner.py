"""One optimizer step: plans → packs → forward, loss, backward → clip → AdamW."""

from __future__ import annotations

import math
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from pact_fast.algorithms.base import Plan, Scored, loss_tokens
from pact_fast.config import AlgorithmConfig, TrainerConfig
from pact_fast.kernels import linear_logprob, pact_loss
from pact_fast.kernels.tokens import LossTokens, Stream
from pact_fast.trainer.lora import adapters_off
from pact_fast.tree import PackedBatch, pack, paths_forward, tree_forward
from pact_fast.tree.cost import trunk_flops, work_of_packs, work_of_paths
from pact_fast.tree.hf import unsupported


@dataclass
class UpdateResult:
    """stats add up over packs (see pact_fast.kernels.loss); the rest describes the optimizer step."""

    loss: float = 0.0
    grad_norm: float = 0.0
    stats: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: int = 0  # computed by the trunk
    tokens_unshared: int = 0  # had every sequence run alone
    flops: float = 0.0  # of the trunk, forward and backward
    flops_unshared: float = 0.0
    capacity: int = 0  # tokens that the packs had room for
    supervised: int = 0
    packs: int = 0
    gaps: list[np.ndarray] = field(default_factory=list)  # [n, 2] per pack: component, trainer's − sampler's log-prob
    seconds: dict[str, float] = field(default_factory=dict)


class Learner:
    """Owns the optimizer. `total_updates` is the horizon of the learning-rate schedule; `foreign_sampler`: rollouts come
    from other kernels or older weights than the model's, and are corrected for it if the algorithm says so.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trainer: TrainerConfig,
        algorithm: AlgorithmConfig,
        *,
        total_updates: int,
        shares_batches: bool = False,
        temperature: float = 1.0,
        reference: PreTrainedModel | None = None,
        autocast: AbstractContextManager | None = None,
        foreign_sampler: bool = False,
    ):
        self.model, self.trainer, self.algorithm = model, trainer, algorithm
        self.total_updates, self.temperature, self.reference = total_updates, temperature, reference
        self.shares_batches = shares_batches  # several optimizer steps per rollout batch
        self.updates = 0
        self._autocast = autocast or nullcontext()
        self._sampler_mode = (
            algorithm.vllm_importance_sampling_mode
            if foreign_sampler and algorithm.vllm_importance_sampling_correction
            else None
        )
        self.optimizer = make_optimizer(model, trainer)
        reason = unsupported(model)
        if reason is not None:
            warnings.warn(f"prefixes are not shared, every sequence is computed whole: {reason}", stacklevel=2)
        self._forward = tree_forward if reason is None else paths_forward
        self._share = trainer.share_prefixes and reason is None

    def prepare(self, plans: list[Plan]) -> None:
        """The passes without gradient, before the first optimizer step on a rollout batch.

        π_old is needed only when several optimizer steps share the batch (otherwise the ratio is exactly 1) or for weights
        that the loss cannot form token by token; the reference only when there is a KL term.
        """
        batches = self._pack(plans, UpdateResult())
        scored = [s for plan in plans for s in plan.scored]
        sequence_weights = self.algorithm.name == "pact" and self.algorithm.trace.context_is == "sequence"
        folded = self._sampler_mode not in (None, "token_truncate")
        if self.shares_batches or sequence_weights or folded:
            self._fill(batches, scored, self.model, "old_logprob")
        if sequence_weights:
            fold_weights(scored, Stream.TRACE, "mean_truncate", self.algorithm.trace.context_is_cap)
        if folded:
            assert self._sampler_mode is not None
            cap = self.algorithm.vllm_importance_sampling_clip_max
            fold_weights(scored, Stream.PROMPT, self._sampler_mode, cap)
        if self.reference is not None:
            with adapters_off(self.reference):
                self._fill(batches, scored, self.reference, "ref_logprob")

    def update(self, plans: list[Plan]) -> UpdateResult:
        """One optimizer step on the plans."""
        result = self.accumulate(plans)
        started = time.perf_counter()
        result.grad_norm = self.step()
        result.seconds["optimizer"] = time.perf_counter() - started
        return result

    def accumulate(self, plans: list[Plan]) -> UpdateResult:
        """Add the gradient of the plans' loss to the parameters'."""
        result = UpdateResult()
        scored = [s for plan in plans for s in plan.scored]
        batches = self._pack(plans, result)
        started = time.perf_counter()
        self.model.train()
        for batch in batches:
            self._backward(batch, scored, result)
        result.seconds["forward_backward"] = time.perf_counter() - started
        return result

    def step(self) -> float:
        """Clip, set the learning rate, step, clear. Returns the gradient norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.trainer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return float(norm)

    def learning_rate(self) -> float:
        return self.trainer.learning_rate * schedule(
            self.updates, self.total_updates, self.trainer.lr_scheduler_type, self.trainer.warmup_steps
        )

    def _pack(self, plans: list[Plan], result: UpdateResult) -> list[PackedBatch]:
        trees = [tree for plan in plans for tree in plan.trees]
        batches = pack(trees, max_tokens=self.trainer.max_tokens_per_pack, share=self._share)
        work, alone = work_of_packs(batches), work_of_paths(trees)
        result.tokens, result.tokens_unshared = work.tokens, alone.tokens
        result.flops, result.flops_unshared = trunk_flops(self.model, work), trunk_flops(self.model, alone)
        result.capacity = sum(max(len(batch), self.trainer.max_tokens_per_pack) for batch in batches)
        result.packs = len(batches)
        return batches

    @torch.no_grad()
    def _fill(self, batches: list[PackedBatch], scored: list[Scored], model: PreTrainedModel, name: str) -> None:
        """Log-probs of all scored rollout tokens under `model`, written to their field `name`."""
        model.eval()
        for batch in batches:
            tokens, here = loss_tokens(batch, [s for s in scored if s.stream != Stream.EXPERT])
            if not len(tokens):
                continue
            tokens = tokens.to(self._device())
            with self._autocast:
                hidden = self._forward(model, batch)
            weight, bias, softcap = head_of(model)
            logprob = linear_logprob(
                hidden[tokens.row], weight, tokens.target, bias=bias, softcap=softcap, temperature=self.temperature
            ).logprob.cpu().numpy()  # fmt: skip
            for s, part in zip(here, np.split(logprob, np.cumsum([len(s.index) for s in here])[:-1]), strict=True):
                setattr(s, name, part)

    def _backward(self, batch: PackedBatch, scored: list[Scored], result: UpdateResult) -> None:
        tokens, _ = loss_tokens(batch, scored, reference=self.reference is not None)
        if not len(tokens):
            return
        with self._autocast:
            hidden = self._forward(self.model, batch)
        output = self.loss(hidden, tokens.to(self._device()))
        output.loss.backward()
        result.gaps.append(_gaps(tokens, output.logprob.cpu()))
        result.loss += float(output.loss.detach())
        result.supervised += len(tokens)
        for key, value in output.stats.items():
            result.stats[key] = result.stats[key] + value if key in result.stats else value

    def loss(self, hidden: torch.Tensor, tokens: LossTokens):
        """pact_loss with this run's settings."""
        weight, bias, softcap = head_of(self.model)
        config = self.algorithm
        temperature: float | torch.Tensor = self.temperature
        if temperature != 1.0:  # expert tokens were not sampled
            temperature = torch.where(tokens.stream == Stream.EXPERT, 1.0, self.temperature)
        return pact_loss(
            hidden,
            weight,
            tokens,
            policy_loss=config.policy_loss,
            clip=(config.epsilon, config.epsilon_high or config.epsilon),
            delta=config.delta,
            kl_coef=config.beta,
            entropy_coef=config.entropy_coef,
            is_cap=self._caps(),
            temperature=temperature,
            softcap=softcap,
            bias=bias,
        )

    def _caps(self) -> dict[Stream, float] | None:
        """Caps of the weights that the loss forms itself."""
        config, caps = self.algorithm, {}
        if config.name == "pact" and config.trace.context_is == "token":
            caps[Stream.TRACE] = config.trace.context_is_cap
        if self._sampler_mode == "token_truncate":
            caps[Stream.PROMPT] = config.vllm_importance_sampling_clip_max
        return caps or None

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def head_of(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None, float | None]:
    """(weight [V, D], bias, soft-cap) of the language-model head."""
    head = model.get_output_embeddings()
    return (
        head.weight,
        getattr(head, "bias", None),
        getattr(model.config.get_text_config(), "final_logit_softcapping", None),
    )


def make_optimizer(model: torch.nn.Module, trainer: TrainerConfig) -> torch.optim.AdamW:
    """AdamW; norms and biases are not decayed."""
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decay, "weight_decay": trainer.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=trainer.learning_rate,
        betas=(trainer.adam_beta1, trainer.adam_beta2),
        eps=trainer.adam_epsilon,
    )


def schedule(update: int, total: int, kind: str, warmup: int) -> float:
    """Learning-rate factor of optimizer step `update` (0-based) of `total`."""
    if update < warmup:
        return (update + 1) / warmup
    progress = min((update - warmup) / max(total - warmup, 1), 1.0)
    if kind == "linear":
        return 1.0 - progress
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def fold_weights(scored: list[Scored], stream: Stream, mode: str, cap: float) -> None:
    """Multiply w = π_old/π_sampler into the policy weights of a stream's rollouts.

    `token`: one w per token; `sequence`: one per rollout, the product over its tokens (as in TRL); `mean`: the geometric mean.
    `truncate`: min(cap, w); `mask`: w, or 0 beyond the cap.
    """
    for s in scored:
        if s.stream != stream or not len(s.index):
            continue
        gap = (s.old_logprob - s.sampler_logprob).astype(np.float64)
        if not mode.startswith("token"):
            gap = np.full_like(gap, gap.sum() if mode.startswith("sequence") else gap.mean())
        weight = np.exp(np.minimum(gap, 50.0))
        weight = np.minimum(weight, cap) if mode.endswith("truncate") else np.where(weight <= cap, weight, 0.0)
        s.rl_weight = s.rl_weight * weight


def _gaps(tokens: LossTokens, logprob: torch.Tensor) -> np.ndarray:
    """[n, 2]: component and log π − sampler's log-prob of the prompt-only rollout tokens; π as it was when the batch came."""
    assert tokens.sampler_logprob is not None
    before = torch.where(tokens.old_logprob.isnan(), logprob, tokens.old_logprob)
    gap = before - tokens.sampler_logprob
    known = (tokens.stream == Stream.PROMPT) & ~gap.isnan()
    return torch.stack([tokens.component[known].float(), gap[known].float()], 1).numpy()
