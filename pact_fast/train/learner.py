"""One optimizer step: prompt batches → packs, distributed over ranks → forward, loss, backward → clip → AdamW."""

from __future__ import annotations

import gc
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from pact_fast.algorithms.base import Algorithm, PromptBatch, Requirements
from pact_fast.batch.loss_table import ScoredTokens, build_loss_table, teacher_pairs
from pact_fast.batch.packing import PackedBatch
from pact_fast.components import LossContext
from pact_fast.config import TrainerConfig
from pact_fast.config.filters import UNFILTERED, SamplingFilters
from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.kernels.head.divergence import TokenPairs
from pact_fast.kernels.head.objective import make_policy_loss
from pact_fast.kernels.head.stats import SUMS
from pact_fast.kernels.head.tokens import COMPONENTS, LossTokens
from pact_fast.model.flops import flops_per_token_and_pair
from pact_fast.model.lora import adapters_off
from pact_fast.model.modes import update_mode
from pact_fast.model.policy import Policy
from pact_fast.train.backends.base import CanDiscard, Forward
from pact_fast.train.backends.factory import make_backend
from pact_fast.train.dummy_pack import dummy_pack, dummy_tokens
from pact_fast.train.importance import set_importance_weights
from pact_fast.train.packs import Pack, PackCost, StepPacks, make_packs, send_to_owners
from pact_fast.train.part_messages import split_tokens
from pact_fast.train.schedule import lr_factor

log = logging.getLogger(__name__)


@dataclass
class UpdateResult(PackCost):
    """The result of an optimizer step, over all ranks.

    loss          sum of the weighted losses of all tokens
    grad_norm     before clipping
    stats         sums by context and component, see `pact_fast.kernels.head.stats`
    supervised    supervised tokens
    logprob_diff  of this rank alone, float32 [n, 2] per pack: component, trainer's − sampler's log-prob of prompt-only
                  rollout tokens
    skipped       loss or gradient was not finite, so the parameters kept their values
    seconds       by phase
    """

    loss: float = 0.0
    grad_norm: float = 0.0
    stats: dict[str, torch.Tensor] = field(default_factory=dict)
    supervised: int = 0
    logprob_diff: list[np.ndarray] = field(default_factory=list)
    skipped: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


class PacksTooLarge(PactError):
    """Out of memory where the update cannot be retried. `tokens`: the pack budget to restart with."""

    def __init__(self, rank: int, tokens: int):
        self.tokens = max(tokens // 2, 128)
        super().__init__(
            f"rank {rank} is out of memory with packs of {tokens} tokens; start again with resume=auto, and packs will have "
            f"at most {self.tokens}. model.gradient_checkpointing=true allows larger ones"
        )


class Learner:
    """Optimizer steps on prompt batches. Knows no algorithm, only its `requirements`.

    Every rank of `world` passes the batches of its own prompts: consecutive blocks, by rank. Packs are distributed by
    FLOPs, and sums over packs are summed over ranks, so results are the same on all of them.

    Args:
        model: The policy; parameters are updated in place.
        trainer: Optimizer, schedule and packing settings.
        algorithm: Gives loss settings and requirements.
        total_updates: Optimizer steps of the run, the horizon of the learning-rate schedule.
        updates_per_batch: Optimizer steps that share a rollout batch.
        temperature: Of the rollouts; their tokens are scored at it.
        filters: Of the rollouts; sampler and trainer are compared over the same tokens.
        reference: Frozen reference policy of the KL term; `model` itself if adapters are switched off for it.
        autocast: Precision context of the forward pass.
        sampler_differs: Rollouts come from other kernels or older weights (vLLM) and are corrected for it.
        world: Ranks of the run; default: one process.
        dtype: "float32" or "bfloat16", as `model.dtype` of the configuration.
        before_step: Called before an optimizer step changes weights and optimizer state.
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
        filters: SamplingFilters = UNFILTERED,
        reference: PreTrainedModel | None = None,
        autocast: AbstractContextManager | None = None,
        sampler_differs: bool = False,
        world: World | None = None,
        dtype: str = "float32",
        before_step: Callable[[], object] = lambda: None,
    ):
        self.model, self.trainer = model, trainer
        self.total_updates, self.temperature = total_updates, temperature
        self.updates_per_batch = updates_per_batch
        self._before_step = before_step
        self.updates = 0
        self.world = world or World()
        self.requirements = algorithm.requirements(sampler_differs)
        self.loss_settings = {**algorithm.loss_settings(), "importance_cap": self.requirements.importance_cap}
        check_policy_loss(self.loss_settings.get("policy_loss", "ppo"))
        if self.requirements.divergence and self.world.sequence_parallel > 1:
            raise PactError(
                "trainer.sequence_parallel_size: this algorithm compares the distributions of a token in two contexts, whose "
                "rows would be on different ranks; set it to 1"
            )
        self.max_tokens = trainer.pack_tokens  # halved after a pack that ran out of memory
        self.policy = Policy(model, self.world, autocast, filters)
        self.backend = make_backend(self.policy, trainer, dtype, self.world)
        self.reference, self._reference_forward = reference, None
        if reference is not None:
            self._reference_forward = self._make_reference_forward(reference, autocast, dtype)
        if self.policy.unshared:
            reason = f"prefixes are not shared, every sequence is computed whole: {self.policy.unshared}"
            warnings.warn(reason, stacklevel=2)
        self._share_prefixes = trainer.share_prefixes and self.policy.unshared is None

    def _make_reference_forward(
        self, reference: PreTrainedModel, autocast: AbstractContextManager | None, dtype: str
    ) -> Forward:
        if reference is self.model:  # with its adapters switched off
            return self.backend.forward
        policy = Policy(reference, self.world, autocast)
        zero = self.trainer.deepspeed
        if zero is None or zero.stage < 3:
            return policy
        from pact_fast.train.backends.zero import sharded_forward

        return sharded_forward(policy, self.trainer, dtype, self.world)

    def prepare(self, batches: list[PromptBatch]) -> None:
        """Forward passes without gradient, before the first optimizer step on a rollout batch. A collective.

        They fill in `old_logprob` when several optimizer steps share the batch (with one, the ratio is exactly 1) or an
        importance weight needs it, `importance` where the loss cannot form the weight token by token, and `ref_logprob`
        when there is a KL term.

        Args:
            batches: This rank's prompts of the rollout batch.
        """
        scored = [s for batch in batches for s in batch.scored if s.context != LossContext.EXPERT]
        old = self.updates_per_batch > 1 or self.requirements.old_logprob
        if not (old or self._reference_forward) or not self.world.any(bool(scored), "log-probs"):  # SFT has none
            return
        if old:
            self._compute_logprobs(batches, self.backend.forward, "old_logprob")
        for context, rule in self.requirements.importance.items():
            if not rule.in_loss:
                set_importance_weights(scored, context, rule)
        if self._reference_forward is not None and self.reference is not None:
            with adapters_off(self.reference):
                self._compute_logprobs(batches, self._reference_forward, "ref_logprob")

    def update(self, batches: list[PromptBatch], lr_scale: float = 1.0) -> UpdateResult:
        """One optimizer step.

        Args:
            batches: This rank's prompts of the step. Those of all ranks, by rank, are the step's.
            lr_scale: Factor of the scheduled learning rate.
        """
        result = self.accumulate(batches)
        started = time.perf_counter()
        result.grad_norm = self.step(lr_scale)
        result.skipped = not math.isfinite(result.grad_norm)
        result.seconds["optimizer"] = time.perf_counter() - started
        return result

    def accumulate(self, batches: list[PromptBatch]) -> UpdateResult:
        """Accumulate the gradient of the batches' loss. `batches` as for `update`.

        If a pack runs out of memory, the whole update is retried with packs of half the size, which stay that small; the
        gradient is the same.

        Raises:
            PacksTooLarge: Out of memory, and the update cannot be retried: ranks run packs in lockstep.
        """
        started = time.perf_counter()
        update_mode(self.model)
        while True:
            packs = self._make_packs(batches)
            result = UpdateResult(**asdict(packs.cost))
            out_of_memory = self._backward_all(packs.packs, result)
            if self._lockstep or not self.world.any(out_of_memory, "gradients"):
                break
            assert isinstance(self.backend, CanDiscard)  # every backend that does not run in lockstep
            self.backend.discard()
            self._shrink_packs(packs.longest)
        self._all_reduce(result)
        result.seconds["forward_backward"] = time.perf_counter() - started
        return result

    def _backward_all(self, packs: list[Pack], result: UpdateResult) -> bool:
        """Run forward and backward of this replica's packs. True if memory ran out."""
        try:
            for micro_step, pack in enumerate(packs):
                self._backward(pack.batch, pack.scored, result, last=micro_step == len(packs) - 1)
        except RuntimeError as error:
            on_cpu = "can't allocate memory" in str(error)
            if not isinstance(error, torch.OutOfMemoryError) and not on_cpu:
                raise
            if self._lockstep:
                raise PacksTooLarge(self.world.rank, self.max_tokens) from error
            return True
        return False

    def _shrink_packs(self, longest: int) -> None:
        """Halve the pack budget after running out of memory. PactError if a single sequence of `longest` tokens fills it."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.max_tokens <= longest:
            raise PactError(
                f"out of memory with a single sequence of {longest} tokens: set model.gradient_checkpointing=true, "
                "trainer.deepspeed.stage=3 or trainer.sequence_parallel_size, or lower rollout.max_completion_length"
            )
        self.max_tokens //= 2
        log.warning("out of memory: packs have at most %d tokens from now on", self.max_tokens)

    def step(self, lr_scale: float = 1.0) -> float:
        """Clip, step and clear the accumulated gradients. Returns the gradient norm before clipping.

        If the norm is not finite, the parameters keep their values.
        """
        self._before_step()
        norm = self.backend.step(self.learning_rate() * lr_scale)
        self.updates += 1
        return norm

    def learning_rate(self) -> float:
        """The scheduled learning rate of the next optimizer step."""
        return self.trainer.learning_rate * lr_factor(
            self.updates, self.total_updates, self.trainer.lr_scheduler_type, self.trainer.warmup_steps
        )

    def _make_packs(self, batches: list[PromptBatch]) -> StepPacks:
        per_token, per_pair = flops_per_token_and_pair(self.model)
        return make_packs(
            batches,
            lambda tokens, pairs: per_token * tokens + per_pair * pairs,
            max_tokens=self.max_tokens,
            world=self.world,
            share=self._share_prefixes,
            merge=self.trainer.merge_rollouts,
        )

    @torch.no_grad()
    def _compute_logprobs(self, batches: list[PromptBatch], forward: Forward, column: str) -> None:
        """Compute log-probs of all scored tokens and write them to the field `column` of each ScoredTokens of a rollout.

        With filters, those of the current policy also put `sampler_logprob` on the trainer's normalisation, see
        `FusedHead.log_kept_mass`.
        """
        self.model.eval()
        kept = column == "old_logprob" and bool(self.policy.head.filters)
        packs = self._make_packs(batches)
        values = [self._pack_logprobs(pack, forward, kept) for pack in packs.packs]
        for number, found in send_to_owners(packs, values, self.world).items():
            scored = packs.local_units[number].scored
            parts = split_tokens(found.astype(np.float32), [len(s.index) for s in scored])
            for s, part in zip(scored, parts, strict=True):
                if s.context == LossContext.EXPERT:
                    continue
                setattr(s, column, part[0])
                if kept:
                    s.sampler_logprob = s.sampler_logprob + part[1]

    def _pack_logprobs(self, pack: Pack, forward: Forward, kept: bool) -> np.ndarray:
        """float64 [1 + kept, N]: log-probs of a pack's N supervised tokens, and with `kept` the logs of the kept masses.

        0 for the tokens of other ranks that share the pack, and for those of expert traces.
        """
        rollouts = [s for s in pack.scored if s.context != LossContext.EXPERT]
        tokens, here = loss_table_to_tensors(pack.batch, rollouts)
        is_rollout = np.concatenate(
            [np.zeros(0, bool), *(np.full(len(s.index), s.context != LossContext.EXPERT) for s in pack.scored)]
        )
        values = np.zeros((1 + kept, len(is_rollout)))
        assert len(here) == len(rollouts)  # the same order, so that tokens are found by position
        position = torch.as_tensor(np.flatnonzero(is_rollout))
        batch, tokens, is_local = self._local_rows(pack.batch, tokens)
        if len(tokens):
            found = forward(batch, tokens.to(self.model.device), self.temperature)
            for row, one in zip(values, found, strict=False):  # a reference's kept masses are of no use
                row[position[is_local].numpy()] = one[: int(is_local.sum())].cpu().double().numpy()
        return values

    def _backward(self, batch: PackedBatch, scored: list[ScoredTokens], result: UpdateResult, last: bool) -> None:
        """Forward, loss and backward of one pack. `last`: an optimizer step follows."""
        tokens, here = loss_table_to_tensors(batch, scored, reference=self.reference is not None)
        pairs = {} if self.requirements.divergence is None else token_pairs(here, self.requirements, self.model.device)
        batch, tokens, is_local = self._local_rows(batch, tokens)
        if not len(tokens):
            return
        on_device = tokens.to(self.model.device)
        loss, logprob, stats, *kept = self.backend.forward(
            batch, on_device, self._temperature(on_device), {**self.loss_settings, **pairs}
        )
        if kept:
            assert tokens.sampler_logprob is not None
            tokens.sampler_logprob = tokens.sampler_logprob + kept[0].cpu()
        if not torch.isfinite(loss):
            loss = loss * torch.nan  # its gradient may be finite, but no rank may step on it
        self.backend.backward(loss, last)
        if not is_local.any():
            return
        result.loss += float(loss.detach())
        result.logprob_diff.append(_logprob_diff(tokens, logprob.cpu()))
        result.supervised += len(tokens)
        for key, value in zip(SUMS, stats, strict=True):
            result.stats[key] = result.stats[key] + value if key in result.stats else value

    def _local_rows(self, batch: PackedBatch, tokens: LossTokens) -> tuple[PackedBatch, LossTokens, torch.Tensor]:
        """The rows of a pack that this rank computes.

        Returns:
            The pack, the loss table of this rank's rows, and a mask, bool [N], of the tokens in these rows. In lockstep, a
            rank without tokens gets a dummy (see dummy_pack.py); the mask is then all False.
        """
        start, end = self.policy.rows(batch)
        is_local = (tokens.row >= start) & (tokens.row < end)
        if len(batch) and is_local.any():
            tokens = tokens.select(is_local)
            tokens.row -= start
            return batch, tokens, is_local
        if not self._lockstep:
            return batch, tokens, is_local
        if not len(batch):
            batch = dummy_pack(self.world.sequence_parallel)
        return batch, dummy_tokens(self.reference is not None), is_local

    def _all_reduce(self, result: UpdateResult) -> None:
        """Sum loss and statistics over ranks. Log-prob differences stay where they are (train/metrics.py)."""
        if self.world.size == 1:
            return
        shape = (len(SUMS), len(LossContext), COMPONENTS)
        stats = torch.stack([result.stats[name].cpu() for name in SUMS]) if result.stats else torch.zeros(shape)
        own = torch.tensor([result.loss, result.supervised], dtype=torch.float64)
        loss, supervised, *rest = self.world.all_reduce_sum(torch.cat([own, stats.double().flatten()])).unbind()
        result.loss, result.supervised = float(loss), int(supervised)
        result.stats = dict(zip(SUMS, torch.stack(rest).view(shape), strict=True))

    def _temperature(self, tokens: LossTokens) -> float | torch.Tensor:
        """The rollouts' temperature, but 1 for expert tokens, which were not sampled."""
        if self.temperature == 1.0:
            return 1.0
        return torch.where(tokens.context == LossContext.EXPERT, 1.0, self.temperature)

    @property
    def _lockstep(self) -> bool:
        """Forward and backward contain collectives, so every rank runs both in every micro-step."""
        return self.backend.lockstep or self.world.sequence_parallel > 1


def check_policy_loss(name: str) -> None:
    """Raise PactError if there is no such policy loss, or if it needs all tokens of a sequence in one pack."""
    if make_policy_loss(name).sequence_ratio:
        raise PactError(
            f"algorithm.policy_loss='{name}' takes one ratio per sequence, but packs may split a sequence; use ppo or cispo"
        )


def loss_table_to_tensors(
    batch: PackedBatch, scored: Iterable[ScoredTokens], *, reference: bool = False
) -> tuple[LossTokens, list[ScoredTokens]]:
    """The loss table of a pack as tensors; see `build_loss_table`."""
    table, here = build_loss_table(batch, scored, reference=reference)
    columns = {name: None if column is None else torch.as_tensor(column) for name, column in table._asdict().items()}
    return LossTokens(**columns), here  # type: ignore[arg-type]


def token_pairs(
    here: Sequence[ScoredTokens], requirements: Requirements, device: torch.device | str
) -> dict[str, TokenPairs]:
    """Argument `pairs` of pact_loss for the ScoredTokens of a pack, in the order of its table; none without teachers."""
    index, weight = teacher_pairs(here)
    if not len(index):
        return {}
    assert requirements.divergence is not None
    columns = torch.as_tensor(index, device=device), torch.as_tensor(weight, device=device)
    return {"pairs": TokenPairs(*columns, divergence=requirements.divergence)}


def _logprob_diff(tokens: LossTokens, logprob: torch.Tensor) -> np.ndarray:
    """Trainer's − sampler's log-prob of the prompt-only rollout tokens, float32 [n, 2]: component, difference.

    The trainer's is `old_logprob`, or `logprob` [N] where that is unknown: the policy is the same then.
    """
    assert tokens.sampler_logprob is not None
    before = torch.where(tokens.old_logprob.isnan(), logprob, tokens.old_logprob)
    diff = before - tokens.sampler_logprob
    known = (tokens.context == LossContext.PROMPT) & ~diff.isnan()
    return torch.stack([tokens.component[known].float(), diff[known].float()], 1).numpy()
