"""TRL's side of the whole-loop benchmark: GRPOTrainer with `environment_factory`, at its best settings on a CPU.

Every setting that is no part of the budget, and why:

use_cpu, bf16=False            fp32, as on our side; TRL's default is bf16
gradient_checkpointing=False   its default recomputes every forward pass
per_device_train_batch_size    sequences of a forward and backward pass (`micro`); small ones waste less on padding and stay in
                               the CPU's caches, so the fastest of several is taken; gradients are accumulated over them
steps_per_generation           left at its default, the accumulation steps: all prompts of a step are generated in one batch,
                               and TRL makes no forward pass for old log-probs
generation_kwargs              max_new_tokens as our limit of a turn: otherwise one rollout that never ends its turn would hold
                               up the whole batch up to max_completion_length
use_transformers_continuous_batching   as --continuous-batching says; a padded batch was faster on a CPU
use_vllm                       no: it is a second server or engine for a model of a million parameters; we use none, either
optim                          adamw_torch_fused, its default, and what we use
loss_type="dapo", scale_rewards="none", beta=0, importance_sampling_level="token", epsilon=0.2
                               the same formula as our loss_type=dapo and scale_rewards=false: Σ −min(ρA, clip(ρ)A) over all
                               sampled tokens of the step, divided by their number, A = R − mean of the group; TRL's other
                               scale divides by a sample deviation + 1e-4, ours by a population deviation + 1e-6
shuffle_dataset=False          the rows in order, as on our side
logging_strategy="no", report_to=[], disable_tqdm    nothing is logged; we write metrics.jsonl
save_strategy="steps"          model, optimizer, scheduler and random states, as ours

The tokenizer gets TRL's own response template for Qwen3, whose turns our template writes: TRL looks templates up by their text
and does not know ours.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.whole_loop_pact import Base, Budget, replace, silence
from benchmarks.whole_loop_phases import Phases
from benchmarks.whole_loop_task import Lookups, read_rows, success


def trl_settings(budget: Budget, out: Path, seed: int, micro: int, continuous: bool = False) -> dict[str, Any]:
    """GRPOConfig of a run; `pact_config` has ours. `micro`: sequences of a forward and backward pass."""
    return {
        "output_dir": str(out),
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": budget.rollouts // micro,
        "num_generations": budget.generations,
        "max_completion_length": budget.tokens,
        "max_tool_calling_iterations": budget.turns - 1,
        "generation_kwargs": {"max_new_tokens": budget.turn_tokens},
        "use_transformers_continuous_batching": continuous,
        "temperature": 1.0,
        "loss_type": "dapo",
        "scale_rewards": "none",
        "importance_sampling_level": "token",
        "epsilon": 0.2,
        "beta": 0.0,
        "max_steps": budget.steps,
        "learning_rate": budget.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "shuffle_dataset": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": budget.interval,
        "save_total_limit": budget.points,
    }


def make_trainer(budget: Budget, base: Base, rows: Path, settings: dict[str, Any]) -> Any:
    """A GRPOTrainer on the base."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    from trl.chat_template_utils import qwen3_template

    tokenizer = AutoTokenizer.from_pretrained(base.tokenizer)
    tokenizer.response_template = qwen3_template
    with warnings.catch_warnings(), silence():
        warnings.simplefilter("ignore")
        return GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(base.model, dtype=torch.float32),
            success,
            GRPOConfig(**settings),
            datasets.Dataset.from_list(read_rows(rows)),
            processing_class=tokenizer,
            environment_factory=Lookups,
        )


def run_trl(
    budget: Budget, base: Base, rows: Path, out: Path, seed: int, micro: int, continuous: bool = False
) -> tuple[Phases, list[float], list[Path]]:
    """Train. Returns the times, the mean reward of every step, and the model of every evaluated step."""
    phases = Phases()
    trainer = make_trainer(budget, base, rows, trl_settings(budget, out, seed, micro, continuous))
    with contextlib.ExitStack() as stack, silence():
        rewards = watch_trl(stack, phases, trainer)
        trainer.train()
    steps = range(budget.interval, budget.steps + 1, budget.interval)
    return phases, rewards, [out / f"checkpoint-{step}" for step in steps]


def watch_trl(stack: contextlib.ExitStack, phases: Phases, trainer: Any) -> list[float]:
    """Measure training steps of a GRPOTrainer until `stack` closes. A step ends with its checkpoint.

    Returns a list that gets the mean reward of every step.
    """
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler
    from transformers import TrainerCallback
    from trl.trainer import grpo_trainer

    watch = functools.partial(phases.watch, stack)
    kind = type(trainer)
    watch(kind, "_generate_single_turn", "generation")
    watch(kind, "_generate _tokenize_prompts _get_tool_suffix_ids _tool_call_loop", "agent loop")
    watch(grpo_trainer, "parse_response", "agent loop")
    watch(Lookups, "reset _look_up", "environment")
    watch(kind, "_calculate_rewards", "rewards")
    watch(kind, "_prepare_inputs get_batch_samples", "batch")
    watch(kind, "training_step", "forward and backward")
    watch(
        kind,
        "_get_per_token_logps_and_entropies",
        lambda: "forward and backward" if torch.is_grad_enabled() else "old log-probs",
    )
    watch(kind, "_clip_grad_norm", "optimizer")
    watch(AcceleratedOptimizer, "step", "optimizer")
    watch(AcceleratedScheduler, "step", "optimizer")
    watch(kind, "_maybe_log_save_evaluate", "logging and checkpoints")
    end = kind._maybe_log_save_evaluate

    def timed_end(self: Any, *args: Any, **kwargs: Any) -> None:
        end(self, *args, **kwargs)
        if len(phases.steps) < self.state.global_step:  # it is called at the end of an epoch, too
            phases.end_step(self.state.global_step == self.args.max_steps)

    replace(stack, kind, "_maybe_log_save_evaluate", timed_end)

    rewards: list[float] = []

    class Notes(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            phases.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            rewards.append(trainer._metrics["train"]["reward"][-1])  # what it logs at the end clears them

    trainer.add_callback(Notes())
    return rewards
