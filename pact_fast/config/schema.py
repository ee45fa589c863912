"""The schema of a run's configuration. Importable without torch.

Names are TRL's where the meaning is the same (`beta` is the KL coefficient, `epsilon_high`, `num_generations`, …).
Field descriptions are the reference documentation: `docs/configuration.md` is generated from them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pact_fast.errors import PactError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=False)


class LoraConfig(Section):
    """Low-rank adapters (docs/lora.md): only they train; the weights under them stay as they were loaded."""

    r: int = Field(16, ge=1, le=512, description="Rank.")
    alpha: float = Field(32.0, gt=0, description="An adapter's output is scaled by alpha / r.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Layers that get an adapter, by the end of their names ([q_proj, v_proj]); `all-linear`: every linear "
        "layer but the head.",
    )


class ModelConfig(Section):
    """The policy."""

    path: str | None = Field(None, description="Model folder or hub name. Leave empty to start from random weights.")
    random_init: dict[str, Any] | None = Field(
        None,
        description="A transformers configuration ({model_type: qwen3, hidden_size: 128, …}) for random weights. With an "
        "empty `tokenizer`, a byte-level BPE of `vocab_size` is trained on the environment's own text.",
    )
    tokenizer: str | None = Field(None, description="Tokenizer folder or hub name; default: the model's own.")
    chat_template: str | None = Field(None, description="A Jinja file that replaces the tokenizer's chat template.")
    tool_format: str = Field(
        "auto",
        description="How tool calls are written: `hermes`, `llama3_json`, or one of your own as `file.py:Class`; `auto` "
        "reads it off the chat template.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type of the computation; `bfloat16` is autocast, the weights stay float32 (with ZeRO they are bfloat16, "
        "too: docs/scaling.md).",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    lora: LoraConfig | None = Field(None, description="Train low-rank adapters; default: all weights.")


class DataConfig(Section):
    """Where tasks come from. Without files, the environment generates them (lookup_chain)."""

    train: str | None = Field(None, description="JSONL or parquet file of training tasks.")
    eval: str | None = Field(None, description="JSONL or parquet file of held-out tasks.")
    format: Literal["auto", "pact", "verl", "ftrl", "toolhop"] = Field(
        "auto", description="Row format; `auto` recognises it by its columns."
    )
    expert: str | None = Field(
        None, description="JSONL of expert traces ({id, expert_trace}) joined to the training tasks by id."
    )
    max_rows: int | None = Field(None, ge=1, description="Read only this many rows of each file.")
    shuffle: bool = Field(True, description="New order of the tasks in each epoch, from the seed.")


class EnvConfig(Section):
    """The tools."""

    name: str = Field(
        "auto",
        description="`lookup_chain`: built-in multi-hop look-ups; `python_tools`: tools as Python sources (FTRL, ToolHop) in "
        "separate limited processes; one of your own as `file.py:Class`; `auto`: python_tools with data files, else "
        "lookup_chain. Rows with a column `env` name their own.",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of the environment, see docs/environments.md."
    )


class RolloutConfig(Section):
    """How trajectories are sampled: from the prompt only, several turns, with tools in between."""

    engine: str = Field(
        "transformers",
        description="What generates tokens: `transformers`, the model itself, embedded; `vllm` (docs/rollouts.md); or one of "
        "your own as `file.py:Class`.",
    )
    num_generations: int = Field(8, ge=1, description="Rollouts per prompt (K).")
    oversampling_factor: float = Field(
        1.0,
        ge=1,
        description="Begin ⌈factor·K⌉ rollouts per prompt and cancel the slowest once K have ended; favours short ones.",
    )
    temperature: float = Field(
        1.0, gt=0, description="Sampling temperature; log-probs are taken at the same temperature."
    )
    max_turns: int = Field(10, ge=1, description="Assistant turns per trajectory.")
    max_turn_tokens: int = Field(1024, ge=1, description="Sampled tokens per assistant turn.")
    max_completion_length: int = Field(
        4096, ge=1, description="Response tokens of a whole trajectory, observations included."
    )
    max_prompt_length: int = Field(
        4096, ge=1, description="Longest prompt; a longer one is an error that names the task."
    )
    max_observation_tokens: int = Field(1024, ge=16, description="Longer observations are cut, with a note.")
    max_batch_size: int = Field(128, ge=1, description="Trajectories that generate at the same time.")
    stop_at_tool_call: bool = Field(
        False,
        description="End a turn at its first complete call, for models that go on and invent the result; there are no parallel "
        "calls then.",
    )
    tool_timeout: float = Field(10.0, gt=0, description="Seconds per tool call.")
    trajectory_timeout: float | None = Field(
        None,
        gt=0,
        description="Seconds per trajectory; what is under way then is cancelled. A run with it is not repeatable.",
    )
    engine_timeout: float = Field(
        300.0,
        gt=0,
        description="vLLM: seconds without a finished turn, or without an answer, after which the engine counts as hung and "
        "is started again.",
    )
    vllm_mode: Literal["colocate", "server"] = Field(
        "colocate",
        description="`colocate`: in the trainer's process, on its device; `server`: a process of its own, on its own devices.",
    )
    vllm_server_base_url: str | None = Field(
        None, description="A running `vllm serve` (docs/rollouts.md); default: the trainer starts and watches its own."
    )
    vllm_server_timeout: float = Field(240.0, gt=0, description="Seconds that a server may take to start.")
    vllm_gpu_memory_utilization: float = Field(0.3, gt=0, le=1, description="Share of a GPU's memory that vLLM takes.")
    vllm_tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share one copy of the model.")
    vllm_data_parallel_size: int = Field(
        1, ge=1, description="server: copies of the model on different GPUs, each driven by one training process."
    )
    vllm_enable_sleep_mode: bool = Field(
        False, description="colocate: vLLM's memory is free during updates (GPU only)."
    )
    vllm_weight_transfer: Literal["auto", "nccl", "files"] = Field(
        "auto",
        description="server: `nccl`: weights go from GPU to GPU; `files`: through `vllm_weights_dir`; `auto`: `nccl` where it "
        "works and a server that dies can be given its weights again (docs/rollouts.md).",
    )
    vllm_weights_dir: str | None = Field(
        None,
        description="server: folder through which weights go, seen by both sides; default: shared memory, else the run folder.",
    )
    vllm_args: dict[str, Any] = Field(
        default_factory=dict, description="Further vLLM engine arguments, for example {enforce_eager: true}."
    )


class AnchorConfig(Section):
    """Prompt-only anchoring (method, section 2)."""

    mode: Literal["gate", "blend"] = Field(
        "gate",
        description="`gate`: a coin per prompt and step chooses the context; `blend`: its expectation, both contexts.",
    )
    q: float = Field(0.4, ge=0, le=1, description="Probability (gate) or share (blend) of the prompt-only route.")


class TraceConfig(Section):
    """How the expert trace enters the context of the surrogate."""

    rendering: Literal["demonstration", "turns", "hint"] = Field(
        "demonstration",
        description="`demonstration`: the trace's turns, then the question restated; `turns`: the trace's turns only; `hint`: "
        "the trace as text in the user turn.",
    )
    reasoning: Literal["full", "level"] = Field(
        "full", description="Reasoning that stands in the context: all of it, or the current prefix level."
    )
    context_importance_weight: Literal["token", "sequence", "none"] = Field(
        "token",
        description="Stop-gradient weight min(cap, π(τ|x,h*)/π(τ|x)) on the trace-conditioned terms: per token, per sequence "
        "(geometric mean), or none (as printed in the paper; unstable on small models).",
    )
    context_importance_weight_clip: float = Field(1.0, gt=0, description="Cap of that weight.")


class SFTConfig(Section):
    """Component-aware SFT on the expert trace."""

    coef: float = Field(
        0.1, ge=0, description="Weight of the SFT loss (β in the paper; TRL's `beta` is the KL coefficient)."
    )
    lambda_start: float = Field(0.8, ge=0, description="Weight of tool-call tokens at step 0.")
    lambda_end: float = Field(0.2, ge=0, description="Weight of tool-call tokens from the annealing horizon on.")
    horizon: int | None = Field(None, ge=1, description="Annealing horizon S in steps; default: the run's steps.")
    reasoning_level_start: int = Field(
        4, ge=0, le=4, description="Reasoning prefix level at step 0 (4 = longest safe prefix, 0 = none)."
    )
    reasoning_level_end: int = Field(0, ge=0, le=4, description="Reasoning prefix level at the horizon.")
    normalizer: Literal["weighted", "count"] = Field(
        "weighted", description="Divide by the sum of weights (as printed) or by the number of supervised tokens."
    )


class RewardConfig(Section):
    """Rewards and advantages (method, section 3)."""

    unmatched_penalty: float = Field(0.0, ge=0, description="λ_pen: an unmatched call earns −λ_pen.")
    gamma: float = Field(0.9, ge=0, le=1, description="Discount of the turn-level return.")
    advantage_combine: Literal["sum", "mean"] = Field(
        "sum", description="Token advantage = group + turn advantage, or their mean."
    )
    env_weight: float = Field(
        0.0, description="Weight of the environment's own outcome reward in the trajectory reward."
    )
    match_weight: float = Field(1.0, ge=0, description="Weight of the matching turn rewards in the trajectory reward.")
    functions: list[str] = Field(
        default_factory=list,
        description="User reward functions, `file.py:name` or `module:name`, with TRL's keyword signature.",
    )


class AlgorithmConfig(Section):
    """What is optimised."""

    name: str = Field(
        "pact",
        description="`pact`, `grpo`, `matchtir` or `sft`, one file each in pact_fast/algorithms; one of your own as "
        "`file.py:Class`.",
    )
    args: dict[str, Any] = Field(default_factory=dict, description="Arguments of an algorithm of your own.")
    epsilon: float = Field(0.2, gt=0, description="Lower clip range of the ratio.")
    epsilon_high: float | None = Field(None, gt=0, description="Upper clip range; default: epsilon.")
    delta: float | None = Field(
        None, gt=1, description="Dual clip: ratio bound for negative advantages; off by default."
    )
    beta: float = Field(0.0, ge=0, description="Coefficient of the KL to the frozen reference (k3 estimator).")
    entropy_coef: float = Field(0.0, description="Entropy bonus.")
    policy_loss: str = Field(
        "ppo",
        description="Policy loss: `ppo` or `cispo`, or one of your own as `file.py:Class` (`gspo`: kernel only, not in the "
        "trainer).",
    )
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = Field(
        "grpo",
        description="Aggregation: mean over tokens, then over rollouts (grpo); mean over all tokens of the batch (dapo); sum "
        "divided by max_completion_length (dr_grpo).",
    )
    scale_rewards: bool = Field(True, description="Divide advantages by the group's standard deviation.")
    vllm_importance_sampling_correction: bool = Field(
        True,
        description="With vLLM, weight prompt-only policy terms by π_trainer/π_sampler (stop-gradient): its kernels round "
        "otherwise, and its weights may be older.",
    )
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        Field(
            "token_truncate",
            description="Weight of a token, or of its whole rollout (product over its tokens); above the cap it is cut to "
            "the cap (truncate) or to 0 (mask). All but token_truncate cost a forward pass.",
        )
    )
    vllm_importance_sampling_clip_max: float = Field(3.0, gt=0, description="Cap of that weight.")
    mask_truncated_completions: bool = Field(
        False, description="Leave rollouts that hit a limit (length or turns) out of the loss."
    )
    anchor: AnchorConfig = Field(default_factory=AnchorConfig)
    trace: TraceConfig = Field(default_factory=TraceConfig)
    sft: SFTConfig = Field(default_factory=SFTConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)


class DeepSpeedConfig(Section):
    """Training state split over processes by DeepSpeed ZeRO (docs/scaling.md)."""

    stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="What is split: optimizer states (1), gradients too (2), parameters too (3); nothing (0), which needs no "
        "DeepSpeed.",
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field("none", description="Where optimizer states lie instead.")
    offload_param: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where parameters lie instead (stage 3 only)."
    )
    nvme_path: str | None = Field(None, description="Folder on a local NVMe disk, for what is offloaded to `nvme`.")
    args: dict[str, Any] = Field(
        default_factory=dict,
        description="Further DeepSpeed settings, laid over ours: {zero_optimization: {reduce_bucket_size: 50000000}}.",
    )

    @model_validator(mode="after")
    def _coherent(self) -> DeepSpeedConfig:
        if self.offload_param != "none" and self.stage != 3:
            raise ValueError("offload_param needs stage=3: only then are parameters split")
        if self.offload_optimizer != "none" and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3")
        if "nvme" in (self.offload_optimizer, self.offload_param) and not self.nvme_path:
            raise ValueError("offloading to nvme needs nvme_path, a folder on a local disk")
        return self


class TrainerConfig(Section):
    """The loop."""

    max_steps: int = Field(100, ge=1, description="Rollout-and-update steps.")
    prompts_per_step: int = Field(16, ge=1, description="Prompts per step.")
    prompts_per_update: int | None = Field(
        None,
        ge=1,
        description="Prompts per optimizer step; default: all of them (strictly on-policy, no old log-prob pass).",
    )
    max_off_policy_steps: int = Field(
        0,
        ge=0,
        description="Rollouts may be sampled by weights up to so many steps old, so that sampling overlaps updates (vLLM "
        "server only). 0: strictly on-policy, and repeatable.",
    )
    max_tokens_per_pack: int | None = Field(
        16384,
        ge=128,
        description="Token budget of one forward/backward; null: what is estimated to fit into the free memory "
        "(docs/planning.md).",
    )
    deepspeed: DeepSpeedConfig | None = Field(
        None, description="Split the training state over processes; default: each holds all of it."
    )
    sequence_parallel_size: int = Field(
        1, ge=1, description="Processes that share each pack, for contexts too long for one GPU (docs/scaling.md)."
    )
    dist_timeout: int = Field(
        1800, ge=1, description="Seconds after which a process that does not answer the others counts as lost."
    )
    max_skipped_updates: int = Field(
        3,
        ge=0,
        description="Updates in a row that may be skipped because loss or gradient is not finite, before the run stops.",
    )
    share_prefixes: bool = Field(True, description="Compute a prompt's shared prefix once for all of its rollouts.")
    merge_rollouts: bool = Field(
        True,
        description="With share_prefixes: compute once, too, what a prompt's rollouts have in common at their start.",
    )
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate of AdamW.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Learning rate after warm-up; `linear` and `cosine` fall to 0 at the last step."
    )
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps of linear warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay of matrices; norms and biases are not decayed.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the gradient average.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the squared-gradient average.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm clip.")
    save_steps: int = Field(10, ge=1, description="Checkpoint every so many steps; the last step is always saved.")
    save_total_limit: int = Field(2, ge=1, description="Checkpoints kept.")
    eval_steps: int | None = Field(None, ge=1, description="Evaluate on held-out tasks every so many steps.")
    eval_tasks: int = Field(200, ge=1, description="Held-out tasks per evaluation.")
    log_completions: int = Field(4, ge=0, description="Sampled rollouts shown as a table at each evaluation.")
    save_rollouts: int = Field(32, ge=0, description="Rollouts written to rollouts/ per step (for `pact-fast view`).")

    @property
    def pack_tokens(self) -> int:
        """max_tokens_per_pack, where it must be a number; a run turns null into one when it starts."""
        if self.max_tokens_per_pack is None:
            raise PactError("trainer.max_tokens_per_pack=null is for training; give a number of tokens here")
        return self.max_tokens_per_pack


class PretrainConfig(Section):
    """An SFT stage on noisy traces of the environment, before RL: makes the base model of the quickstart.

    Noise makes a base that is sharp on grammar and copying but unsure of strategy, which RL can improve.
    """

    steps: int = Field(800, ge=1, description="Optimizer steps.")
    batch_size: int = Field(16, ge=1, description="Traces per step.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate; it falls linearly.")
    final_lr_ratio: float = Field(0.03, ge=0, le=1, description="Learning rate at the end, relative to its peak.")
    early_stop: float = Field(0.35, ge=0, lt=1, description="Probability a turn that the trace stops before its goal.")
    wrong_relation: float = Field(
        0.15, ge=0, lt=1, description="Probability a hop that the trace follows a wrong relation."
    )


class Config(Section):
    """A run."""

    seed: int = Field(0, ge=0, description="Seed of everything random.")
    output_dir: str = Field("runs/{recipe}", description="Run directory; `{recipe}` is the recipe's name.")
    resume: Literal["auto", "never"] = Field(
        "never",
        description="`auto` continues from the newest complete checkpoint of the run directory, if there is one.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto`: a GPU if there is one.")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; default: all cores.")
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    env: EnvConfig = Field(default_factory=EnvConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    pretrain: PretrainConfig | None = Field(None, description="Optional stage that makes the base model.")

    @model_validator(mode="after")
    def _coherent(self) -> Config:
        if (self.model.path is None) == (self.model.random_init is None):
            raise ValueError("set exactly one of model.path (a trained model) and model.random_init (random weights)")
        rollout = self.rollout
        if rollout.vllm_server_base_url and (rollout.engine, rollout.vllm_mode) != ("vllm", "server"):
            raise ValueError("rollout.vllm_server_base_url needs rollout.engine=vllm and rollout.vllm_mode=server")
        if self.trainer.max_off_policy_steps and (rollout.engine, rollout.vllm_mode) != ("vllm", "server"):
            raise ValueError(
                "trainer.max_off_policy_steps needs rollout.engine=vllm and rollout.vllm_mode=server: only an engine with "
                "its own devices can sample during an update"
            )
        update, step = self.trainer.prompts_per_update, self.trainer.prompts_per_step
        if update is not None and step % update:
            raise ValueError(
                f"trainer.prompts_per_step ({step}) must be a multiple of trainer.prompts_per_update ({update})"
            )
        return self
