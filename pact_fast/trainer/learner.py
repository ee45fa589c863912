"""One optimizer step: plans → packs, dealt to processes → forward, loss, backward → clip → AdamW."""

from __future__ import annotations

import gc
import logging
import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from pact_fast.algorithms.base import Plan, Scored, loss_tokens
from pact_fast.config import AlgorithmConfig, TrainerConfig
from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.kernels.stats import SUMS
from pact_fast.kernels.tokens import COMPONENTS, LossTokens, Stream
from pact_fast.trainer.backend import Backend, Replicated
from pact_fast.trainer.lora import adapters_off
from pact_fast.trainer.policy import Policy
from pact_fast.tree import PackedBatch, TokenTree, deal, pack
from pact_fast.tree.cost import flops_per, work_of_packs, work_of_paths

log = logging.getLogger(__name__)

Forward = Callable[..., tuple[torch.Tensor, ...]]


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
    flops_waited: float = 0.0  # had every process as much to do as the busiest one in each step
    capacity: int = 0  # tokens that the packs had room for
    supervised: int = 0
    packs: int = 0
    gaps: list[np.ndarray] = field(default_factory=list)  # [n, 2] per pack: component, trainer's − sampler's log-prob
    skipped: bool = False  # loss or gradient was not finite: the parameters are as they were
    seconds: dict[str, float] = field(default_factory=dict)


class PacksTooLarge(PactError):
    """Out of memory where the update cannot be done again; `tokens` is what packs should have at most."""

    def __init__(self, rank: int, tokens: int):
        self.tokens = max(tokens // 2, 128)
        super().__init__(
            f"process {rank} is out of memory with packs of {tokens} tokens; start again with resume=auto, and packs will have "
            f"at most {self.tokens}. model.gradient_checkpointing=true allows larger ones"
        )


class Learner:
    """Plans in, optimizer steps out. `total_updates` is the horizon of the learning-rate schedule; `foreign_sampler`: rollouts
    come from other kernels or older weights than the model's, and are corrected for it if the algorithm says so.

    Every process of `world` hands over the same plans. Packs are dealt out by cost; what is summed over them is summed over
    processes, so that results are everybody's.
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
        world: World | None = None,
        dtype: str = "float32",
    ):
        self.model, self.trainer, self.algorithm = model, trainer, algorithm
        self.total_updates, self.temperature = total_updates, temperature
        self.shares_batches = shares_batches  # several optimizer steps per rollout batch
        self.updates = 0
        self.world = world or World()
        self._sampler_mode = (
            algorithm.vllm_importance_sampling_mode
            if foreign_sampler and algorithm.vllm_importance_sampling_correction
            else None
        )
        self.max_tokens = trainer.pack_tokens  # less after a pack that did not fit
        self.policy = Policy(model, self.world, autocast)
        self.backend = make_backend(self.policy, trainer, dtype, self.world)
        self.reference, self._reference = reference, None
        if reference is not None:
            self._reference = self._reference_forward(reference, autocast, dtype)
        if self.policy.unshared:
            reason = f"prefixes are not shared, every sequence is computed whole: {self.policy.unshared}"
            warnings.warn(reason, stacklevel=2)
        self._share = trainer.share_prefixes and self.policy.unshared is None

    def _reference_forward(
        self, reference: PreTrainedModel, autocast: AbstractContextManager | None, dtype: str
    ) -> Forward:
        if reference is self.model:
            return self.backend.forward
        policy = Policy(reference, self.world, autocast)
        zero = self.trainer.deepspeed
        if zero is None or zero.stage < 3:
            return policy
        from pact_fast.trainer.zero import split_frozen

        return split_frozen(policy, self.trainer, dtype, self.world)

    def prepare(self, plans: list[Plan]) -> None:
        """The passes without gradient, before the first optimizer step on a rollout batch.

        π_old is needed only when several optimizer steps share the batch (otherwise the ratio is exactly 1) or for weights
        that the loss cannot form token by token; the reference only when there is a KL term.
        """
        scored = [s for plan in plans for s in plan.scored if s.stream != Stream.EXPERT]
        sequence_weights = self.algorithm.name == "pact" and self.algorithm.trace.context_is == "sequence"
        folded = self._sampler_mode not in (None, "token_truncate")
        if self.shares_batches or sequence_weights or folded:
            self._fill(plans, scored, self.backend.forward, "old_logprob")
        if sequence_weights:
            fold_weights(scored, Stream.TRACE, "mean_truncate", self.algorithm.trace.context_is_cap)
        if folded:
            assert self._sampler_mode is not None
            cap = self.algorithm.vllm_importance_sampling_clip_max
            fold_weights(scored, Stream.PROMPT, self._sampler_mode, cap)
        if self._reference is not None and self.reference is not None:
            with adapters_off(self.reference):
                self._fill(plans, scored, self._reference, "ref_logprob")

    def update(self, plans: list[Plan]) -> UpdateResult:
        """One optimizer step on the plans."""
        result = self.accumulate(plans)
        started = time.perf_counter()
        result.grad_norm = self.step()
        result.skipped = not math.isfinite(result.grad_norm)
        result.seconds["optimizer"] = time.perf_counter() - started
        return result

    def accumulate(self, plans: list[Plan]) -> UpdateResult:
        """Add the gradient of the plans' loss to the parameters'.

        If memory runs out in a pack, all is done again in packs of half the size, from now on; the gradient is the same.
        Processes that wait for each other inside every pack cannot turn back: PacksTooLarge.
        """
        started = time.perf_counter()
        scored = [s for plan in plans for s in plan.scored]
        self.model.train()
        while True:
            table, result = self._deal(plans)
            short = self._backward_all(table, scored, result)
            if self._in_step or not self.world.any(short, "gradients"):
                break
            self.backend.discard()
            self._halve(table)
        self._sum(result)
        result.seconds["forward_backward"] = time.perf_counter() - started
        return result

    def _backward_all(self, table: list[list[PackedBatch]], scored: list[Scored], result: UpdateResult) -> bool:
        """Whether memory ran out on the way."""
        try:
            for step, packs in enumerate(table):
                self._backward(packs[self.world.replica], scored, result, last=step == len(table) - 1)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):  # CUDA, CPU
                raise
            if self._in_step:
                raise PacksTooLarge(self.world.rank, self.max_tokens) from error
            return True
        return False

    def _halve(self, table: list[list[PackedBatch]]) -> None:
        """Packs of half the size, after one did not fit."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        longest = max(int(batch.position_ids.max(initial=-1)) + 1 for row in table for batch in row)
        if self.max_tokens <= longest:
            raise PactError(
                f"out of memory with a single sequence of {longest} tokens: set model.gradient_checkpointing=true, "
                "trainer.deepspeed.stage=3 or trainer.sequence_parallel_size, or lower rollout.max_completion_length"
            )
        self.max_tokens //= 2
        log.warning("out of memory: packs have at most %d tokens from now on", self.max_tokens)

    def step(self) -> float:
        """Clip, set the learning rate, step, clear. Returns the gradient norm before clipping; if it is not finite, the
        parameters are as they were.
        """
        norm = self.backend.step(self.learning_rate())
        self.updates += 1
        return norm

    def learning_rate(self) -> float:
        return self.trainer.learning_rate * schedule(
            self.updates, self.total_updates, self.trainer.lr_scheduler_type, self.trainer.warmup_steps
        )

    def _deal(self, plans: list[Plan]) -> tuple[list[list[PackedBatch]], UpdateResult]:
        """Packs by step and replica, and what they cost; the same on every process."""
        trees = [tree for plan in plans for tree in plan.trees]
        budget = self.max_tokens
        per_token, per_pair = flops_per(self.model)

        def cost(tokens: int, pairs: int) -> float:
            return per_token * tokens + per_pair * pairs

        merge = self.trainer.merge_rollouts
        table = deal(trees, max_tokens=budget, ranks=self.world.replicas, cost=cost, share=self._share, merge=merge)
        packs = [batch for row in table for batch in row]
        work, alone = work_of_packs(packs), work_of_paths(trees)
        slowest = [max(cost(*work_of_packs([batch])) for batch in row) for row in table]
        return table, UpdateResult(
            tokens=work.tokens,
            tokens_unshared=alone.tokens,
            flops=cost(*work),
            flops_unshared=cost(*alone),
            flops_waited=self.world.replicas * sum(slowest),
            capacity=sum(max(len(batch), budget) for batch in packs),
            packs=sum(len(batch) > 0 for batch in packs),
        )

    @torch.no_grad()
    def _fill(self, plans: list[Plan], scored: list[Scored], forward: Forward, name: str) -> None:
        """Log-probs of all scored rollout tokens under a policy, written to their field `name`."""
        self.model.eval()
        ends = np.cumsum([0, *(len(s.index) for s in scored)])
        first = {id(s): start for s, start in zip(scored, ends[:-1], strict=True)}
        found = torch.zeros(int(ends[-1]), dtype=torch.float64)
        for packs in self._deal(plans)[0]:
            batch = packs[self.world.replica]
            tokens, here = loss_tokens(batch, scored)
            place = np.concatenate([np.zeros(0, np.int64), *(first[id(s)] + np.arange(len(s.index)) for s in here)])
            batch, tokens, mine = self._mine(batch, tokens)
            if len(tokens):
                (logprob,) = forward(batch, tokens.to(self._device()), self.temperature)
                found[torch.as_tensor(place)[mine]] = logprob[: int(mine.sum())].cpu().double()
        values = self.world.total(found, "log-probs").numpy().astype(np.float32)
        for s, part in zip(scored, np.split(values, ends[1:-1]), strict=True):
            setattr(s, name, part)

    def _backward(self, batch: PackedBatch, scored: list[Scored], result: UpdateResult, last: bool) -> None:
        tokens, _ = loss_tokens(batch, scored, reference=self.reference is not None)
        batch, tokens, mine = self._mine(batch, tokens)
        if not len(tokens):
            return
        on_device = tokens.to(self._device())
        loss, logprob, stats = self.backend.forward(batch, on_device, self._temperature(on_device), self._settings())
        if not torch.isfinite(loss):
            loss = loss * torch.nan  # whatever its gradient is: no process may step on it
        self.backend.backward(loss, last)
        if not mine.any():
            return
        result.loss += float(loss.detach())
        result.gaps.append(_gaps(tokens, logprob.cpu()))
        result.supervised += len(tokens)
        for key, value in zip(SUMS, stats, strict=True):
            result.stats[key] = result.stats[key] + value if key in result.stats else value

    def _mine(self, batch: PackedBatch, tokens: LossTokens) -> tuple[PackedBatch, LossTokens, torch.Tensor]:
        """(pack, tokens in this process's rows, bool [N] which these are).

        Where processes work in lockstep and there is nothing to do, one token without weight is computed, and the mask is
        all False.
        """
        start, end = self.policy.rows(batch)
        mine = (tokens.row >= start) & (tokens.row < end)
        if len(batch) and mine.any():
            tokens = tokens.select(mine)
            tokens.row -= start
            return batch, tokens, mine
        if not self._in_step:
            return batch, tokens, mine
        if not len(batch):
            batch = idle_pack(self.world.sequence_parallel)
        return batch, idle_tokens(self.reference is not None), mine

    def _sum(self, result: UpdateResult) -> None:
        """Over all processes."""
        if self.world.size == 1:
            return
        shape = (len(SUMS), len(Stream), COMPONENTS)
        stats = torch.stack([result.stats[name].cpu() for name in SUMS]) if result.stats else torch.zeros(shape)
        own = torch.tensor([result.loss, result.supervised], dtype=torch.float64)
        loss, supervised, *rest = self.world.total(torch.cat([own, stats.double().flatten()])).unbind()
        result.loss, result.supervised = float(loss), int(supervised)
        result.stats = dict(zip(SUMS, torch.stack(rest).view(shape), strict=True))
        result.gaps = self.world.gather(np.concatenate([np.zeros((0, 2), np.float32), *result.gaps]), "statistics")

    def _settings(self) -> dict[str, Any]:
        """Of pact_loss."""
        config = self.algorithm
        return {
            "policy_loss": config.policy_loss,
            "clip": (config.epsilon, config.epsilon_high or config.epsilon),
            "delta": config.delta,
            "kl_coef": config.beta,
            "entropy_coef": config.entropy_coef,
            "is_cap": self._caps(),
        }

    def _temperature(self, tokens: LossTokens) -> float | torch.Tensor:
        if self.temperature == 1.0:
            return 1.0
        return torch.where(tokens.stream == Stream.EXPERT, 1.0, self.temperature)  # expert tokens were not sampled

    def _caps(self) -> dict[Stream, float] | None:
        """Caps of the weights that the loss forms itself."""
        config, caps = self.algorithm, {}
        if config.name == "pact" and config.trace.context_is == "token":
            caps[Stream.TRACE] = config.trace.context_is_cap
        if self._sampler_mode == "token_truncate":
            caps[Stream.PROMPT] = config.vllm_importance_sampling_clip_max
        return caps or None

    @property
    def _in_step(self) -> bool:
        """Processes wait for each other inside every pack."""
        return self.backend.lockstep or self.world.sequence_parallel > 1

    def _device(self) -> torch.device:
        return self.model.device


def make_backend(policy: Policy, trainer: TrainerConfig, dtype: str, world: World) -> Backend:
    if trainer.deepspeed is None or trainer.deepspeed.stage == 0:
        return Replicated(policy, trainer, world)
    from pact_fast.trainer.zero import Zero

    return Zero(policy, trainer, dtype, world)


def idle_pack(tokens: int) -> PackedBatch:
    """What a process computes that has nothing to do while the others need it."""
    tree = TokenTree()
    tree.add(np.zeros(tokens, np.int64))
    return pack([tree], max_tokens=tokens)[0]


def idle_tokens(reference: bool) -> LossTokens:
    """One token without weight."""
    whole, number = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    return LossTokens(
        row=whole, target=whole, stream=whole, component=whole, sequence=whole, advantage=number,
        old_logprob=number, rl_weight=number.double(), sft_weight=number.double(),
        ref_logprob=number if reference else None, sampler_logprob=number,
    )  # fmt: skip


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
