"""One optimizer step: batches → packs, dealt to processes → forward, loss, backward → clip → AdamW."""

from __future__ import annotations

import gc
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from pact_fast.algorithms.base import Algorithm, PromptBatch
from pact_fast.batch.flops import flops_per, work_of_packs, work_of_paths
from pact_fast.batch.loss_table import ScoredTokens, build_loss_table
from pact_fast.batch.packing import PackedBatch, distribute_packs, pack
from pact_fast.batch.tree import TokenTree
from pact_fast.components import LossContext
from pact_fast.config import TrainerConfig
from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.kernels.head.objective import make_policy_loss
from pact_fast.kernels.head.stats import SUMS
from pact_fast.kernels.head.tokens import COMPONENTS, LossTokens
from pact_fast.model.lora import adapters_off
from pact_fast.model.policy import Policy
from pact_fast.train.backends.replicated import Backend, Replicated
from pact_fast.train.importance import set_importance_weights
from pact_fast.train.schedule import lr_factor

log = logging.getLogger(__name__)

Forward = Callable[..., tuple[torch.Tensor, ...]]


@dataclass
class UpdateResult:
    """stats add up over packs (see pact_fast.kernels.head.loss); the rest describes the optimizer step."""

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
    """Optimizer steps on prompt batches. Knows no algorithm: what one needs is in its `requirements`.

    Every rank of `world` passes the same batches. Packs are distributed by cost; what is summed over packs is summed over
    ranks, so results are the same on all of them.

    Args:
        model: The policy; parameters are updated in place.
        trainer: Optimizer, schedule and packing settings.
        algorithm: Gives loss settings and requirements.
        total_updates: Optimizer steps of the run, the horizon of the learning-rate schedule.
        updates_per_batch: Optimizer steps that share a rollout batch.
        temperature: Of the rollouts; their tokens are scored at it.
        reference: Frozen reference policy of the KL term; `model` itself if adapters are switched off for it.
        autocast: Precision context of the forward pass.
        sampler_differs: Rollouts come from other kernels or older weights (vLLM) and are corrected for it.
        world: Ranks of the run; default: one process.
        dtype: "float32" or "bfloat16", as `model.dtype` of the configuration.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trainer: TrainerConfig,
        algorithm: Algorithm,
        *,
        total_updates: int,
        updates_per_batch: int = 1,
        temperature: float = 1.0,
        reference: PreTrainedModel | None = None,
        autocast: AbstractContextManager | None = None,
        sampler_differs: bool = False,
        world: World | None = None,
        dtype: str = "float32",
    ):
        self.model, self.trainer = model, trainer
        self.total_updates, self.temperature = total_updates, temperature
        self.updates_per_batch = updates_per_batch
        self.updates = 0
        self.world = world or World()
        self.requirements = algorithm.requirements(sampler_differs)
        self.loss_settings = {**algorithm.loss_settings(), "is_cap": self.requirements.is_cap}
        check_policy_loss(self.loss_settings.get("policy_loss", "ppo"))
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
        from pact_fast.train.backends.zero import split_frozen

        return split_frozen(policy, self.trainer, dtype, self.world)

    def prepare(self, batches: list[PromptBatch]) -> None:
        """The passes without gradient, before the first optimizer step on a rollout batch.

        π_old is needed when several optimizer steps share the batch (otherwise the ratio is exactly 1), or for importance
        weights that the loss cannot form token by token; the reference only when there is a KL term.
        """
        scored = [s for batch in batches for s in batch.scored if s.context != LossContext.EXPERT]
        if self.updates_per_batch > 1 or self.requirements.old_logprob:
            self._compute_logprobs(batches, scored, self.backend.forward, "old_logprob")
        for context, rule in self.requirements.importance.items():
            if not rule.in_loss:
                set_importance_weights(scored, context, rule)
        if self._reference is not None and self.reference is not None:
            with adapters_off(self.reference):
                self._compute_logprobs(batches, scored, self._reference, "ref_logprob")

    def update(self, batches: list[PromptBatch], lr_scale: float = 1.0) -> UpdateResult:
        """One optimizer step on the batches, at `lr_scale` times the scheduled learning rate."""
        result = self.accumulate(batches)
        started = time.perf_counter()
        result.grad_norm = self.step(lr_scale)
        result.skipped = not math.isfinite(result.grad_norm)
        result.seconds["optimizer"] = time.perf_counter() - started
        return result

    def accumulate(self, batches: list[PromptBatch]) -> UpdateResult:
        """Add the gradient of the batches' loss to the parameters'.

        If memory runs out in a pack, all is done again in packs of half the size, from now on; the gradient is the same.
        Processes that wait for each other inside every pack cannot turn back: PacksTooLarge.
        """
        started = time.perf_counter()
        scored = [s for batch in batches for s in batch.scored]
        self.model.train()
        while True:
            table, result = self._distribute(batches)
            short = self._backward_all(table, scored, result)
            if self._lockstep or not self.world.any(short, "gradients"):
                break
            self.backend.discard()
            self._shrink_packs(table)
        self._all_reduce(result)
        result.seconds["forward_backward"] = time.perf_counter() - started
        return result

    def _backward_all(self, table: list[list[PackedBatch]], scored: list[ScoredTokens], result: UpdateResult) -> bool:
        """Whether memory ran out on the way."""
        try:
            for step, packs in enumerate(table):
                self._backward(packs[self.world.replica], scored, result, last=step == len(table) - 1)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):  # CUDA, CPU
                raise
            if self._lockstep:
                raise PacksTooLarge(self.world.rank, self.max_tokens) from error
            return True
        return False

    def _shrink_packs(self, table: list[list[PackedBatch]]) -> None:
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

    def step(self, lr_scale: float = 1.0) -> float:
        """Clip, set the learning rate, step, clear. Returns the gradient norm before clipping; if it is not finite, the
        parameters are as they were.
        """
        norm = self.backend.step(self.learning_rate() * lr_scale)
        self.updates += 1
        return norm

    def learning_rate(self) -> float:
        return self.trainer.learning_rate * lr_factor(
            self.updates, self.total_updates, self.trainer.lr_scheduler_type, self.trainer.warmup_steps
        )

    def _distribute(self, batches: list[PromptBatch]) -> tuple[list[list[PackedBatch]], UpdateResult]:
        """Packs by step and replica, and what they cost; the same on every process."""
        trees = [tree for batch in batches for tree in batch.trees]
        budget = self.max_tokens
        per_token, per_pair = flops_per(self.model)

        def cost(tokens: int, pairs: int) -> float:
            return per_token * tokens + per_pair * pairs

        merge = self.trainer.merge_rollouts
        table = distribute_packs(
            trees, max_tokens=budget, ranks=self.world.replicas, cost=cost, share=self._share, merge=merge
        )
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
    def _compute_logprobs(
        self, batches: list[PromptBatch], scored: list[ScoredTokens], forward: Forward, name: str
    ) -> None:
        """Log-probs of all scored rollout tokens under a policy, written to their field `name`."""
        self.model.eval()
        ends = np.cumsum([0, *(len(s.index) for s in scored)])
        first = {id(s): start for s, start in zip(scored, ends[:-1], strict=True)}
        found = torch.zeros(int(ends[-1]), dtype=torch.float64)
        for packs in self._distribute(batches)[0]:
            batch = packs[self.world.replica]
            tokens, here = loss_tokens(batch, scored)
            place = np.concatenate([np.zeros(0, np.int64), *(first[id(s)] + np.arange(len(s.index)) for s in here)])
            batch, tokens, mine = self._local_rows(batch, tokens)
            if len(tokens):
                (logprob,) = forward(batch, tokens.to(self._device()), self.temperature)
                found[torch.as_tensor(place)[mine]] = logprob[: int(mine.sum())].cpu().double()
        values = self.world.all_reduce_sum(found, "log-probs").numpy().astype(np.float32)
        for s, part in zip(scored, np.split(values, ends[1:-1]), strict=True):
            setattr(s, name, part)

    def _backward(self, batch: PackedBatch, scored: list[ScoredTokens], result: UpdateResult, last: bool) -> None:
        tokens, _ = loss_tokens(batch, scored, reference=self.reference is not None)
        batch, tokens, mine = self._local_rows(batch, tokens)
        if not len(tokens):
            return
        on_device = tokens.to(self._device())
        loss, logprob, stats = self.backend.forward(batch, on_device, self._temperature(on_device), self.loss_settings)
        if not torch.isfinite(loss):
            loss = loss * torch.nan  # whatever its gradient is: no process may step on it
        self.backend.backward(loss, last)
        if not mine.any():
            return
        result.loss += float(loss.detach())
        result.gaps.append(_logprob_diff(tokens, logprob.cpu()))
        result.supervised += len(tokens)
        for key, value in zip(SUMS, stats, strict=True):
            result.stats[key] = result.stats[key] + value if key in result.stats else value

    def _local_rows(self, batch: PackedBatch, tokens: LossTokens) -> tuple[PackedBatch, LossTokens, torch.Tensor]:
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
        if not self._lockstep:
            return batch, tokens, mine
        if not len(batch):
            batch = idle_pack(self.world.sequence_parallel)
        return batch, idle_tokens(self.reference is not None), mine

    def _all_reduce(self, result: UpdateResult) -> None:
        """Over all processes."""
        if self.world.size == 1:
            return
        shape = (len(SUMS), len(LossContext), COMPONENTS)
        stats = torch.stack([result.stats[name].cpu() for name in SUMS]) if result.stats else torch.zeros(shape)
        own = torch.tensor([result.loss, result.supervised], dtype=torch.float64)
        loss, supervised, *rest = self.world.all_reduce_sum(torch.cat([own, stats.double().flatten()])).unbind()
        result.loss, result.supervised = float(loss), int(supervised)
        result.stats = dict(zip(SUMS, torch.stack(rest).view(shape), strict=True))
        result.gaps = self.world.all_gather(np.concatenate([np.zeros((0, 2), np.float32), *result.gaps]), "statistics")

    def _temperature(self, tokens: LossTokens) -> float | torch.Tensor:
        if self.temperature == 1.0:
            return 1.0
        return torch.where(
            tokens.context == LossContext.EXPERT, 1.0, self.temperature
        )  # expert tokens were not sampled

    @property
    def _lockstep(self) -> bool:
        """Processes wait for each other inside every pack."""
        return self.backend.lockstep or self.world.sequence_parallel > 1

    def _device(self) -> torch.device:
        return self.model.device


def check_policy_loss(name: str) -> None:
    """Raise PactError if there is no such policy loss, or if it needs all tokens of a sequence in one pack."""
    if make_policy_loss(name).sequence_ratio:
        raise PactError(
            f"algorithm.policy_loss='{name}' takes one ratio per sequence, but packs may split a sequence; use ppo or cispo"
        )


def loss_tokens(
    batch: PackedBatch, scored: Iterable[ScoredTokens], *, reference: bool = False
) -> tuple[LossTokens, list[ScoredTokens]]:
    """The loss table of a pack as tensors; see `build_loss_table`."""
    table, here = build_loss_table(batch, scored, reference=reference)
    columns = {name: None if column is None else torch.as_tensor(column) for name, column in table._asdict().items()}
    return LossTokens(**columns), here  # type: ignore[arg-type]


def make_backend(policy: Policy, trainer: TrainerConfig, dtype: str, world: World) -> Backend:
    if trainer.deepspeed is None or trainer.deepspeed.stage == 0:
        return Replicated(policy, trainer, world)
    from pact_fast.train.backends.zero import Zero

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
        row=whole, target=whole, context=whole, component=whole, sequence=whole, advantage=number,
        old_logprob=number, rl_weight=number.double(), sft_weight=number.double(),
        ref_logprob=number if reference else None, sampler_logprob=number,
    )  # fmt: skip


def _logprob_diff(tokens: LossTokens, logprob: torch.Tensor) -> np.ndarray:
    """[n, 2]: component and log π − sampler's log-prob of the prompt-only rollout tokens; π as it was when the batch came."""
    assert tokens.sampler_logprob is not None
    before = torch.where(tokens.old_logprob.isnan(), logprob, tokens.old_logprob)
    gap = before - tokens.sampler_logprob
    known = (tokens.context == LossContext.PROMPT) & ~gap.isnan()
    return torch.stack([tokens.component[known].float(), gap[known].float()], 1).numpy()
