"""The schema of a run's configuration. Importable without torch.

Names are TRL's if the meaning is the same (`beta` is the KL coefficient, `epsilon_high`, `num_generations`, …).
Field descriptions are the reference documentation: `docs/configuration.md` is generated from them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pact_fast.config.data_source import HUB, HubDataset, source_names
from pact_fast.config.filters import SamplingFilters
from pact_fast.errors import PactError


class Section(BaseModel):
    """A group of settings. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_assignment=False)


class LoraConfig(Section):
    """Low-rank adapters (docs/lora.md). Only adapters are trained; the model's own weights stay frozen."""

    r: int = Field(16, ge=1, le=512, description="Rank of the adapters.")
    alpha: float = Field(32.0, gt=0, description="Adapter outputs are scaled by alpha / r.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Layers that get adapters, by the end of their names ([q_proj, v_proj]); `all-linear`: every linear "
        "layer except the head.",
    )


class ModelConfig(Section):
    """The policy model."""

    path: str | None = Field(None, description="Model folder or hub name. Null: random weights, see `random_init`.")
    random_init: dict[str, Any] | None = Field(
        None,
        description="A transformers configuration ({model_type: qwen3, hidden_size: 128, …}) for random weights. "
        "Without `tokenizer`, a byte-level BPE of `vocab_size` is trained on text of the environment.",
    )
    tokenizer: str | None = Field(None, description="Tokenizer folder or hub name; default: the tokenizer of `path`.")
    chat_template: str | None = Field(
        None,
        description="A Jinja file that replaces the tokenizer's chat template, or `chatml_hermes`: ChatML with Hermes "
        "tool calls, for models whose own template has no tools.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Variables for the chat template, such as {enable_thinking: false} or {reasoning_effort: low}. "
        "{strftime_now: 2025-06-30} fixes the date that a template writes. Serve the trained "
        "model with the same variables.",
    )
    tool_format: str = Field(
        "auto",
        description="Format of tool calls: `hermes`, `llama3_json`, `qwen3_coder`, `gemma4`, `lfm2`, `glm4_moe`, `harmony`, "
        "`mistral`, `mistral_json`, `deepseek_v3`, `deepseek_v31`, `granite`, `minimax_m2`, `kimi_k2`, `pythonic`, "
        "`functools`, `atem`, or your own as `file.py:Class`; `auto`: detected from the chat template.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Compute dtype. With `bfloat16`, autocast is used and weights stay float32; with ZeRO, weights are "
        "bfloat16, too (docs/scaling.md).",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, one more forward pass."
    )
    lora: LoraConfig | None = Field(None, description="Train low-rank adapters; null: train all weights.")


class DataConfig(Section):
    """Source of tasks (docs/data.md). Without `train`, the environment generates them (lookup_chain)."""

    train: str | list[str] | None = Field(
        None,
        description="Training tasks: a JSONL or parquet file, a pattern of files (shards/*.jsonl), a dataset of the "
        "Hugging Face Hub (hf://org/name@revision/config:split; revision and config may be left out), or a list of these.",
    )
    eval: str | list[str] | None = Field(None, description="Held-out tasks, named as those of `train`.")
    format: Literal["auto", "pact", "verl", "ftrl", "toolhop"] = Field(
        "auto", description="Row format; `auto`: detected from the columns."
    )
    prompt_format: Literal["row", "matchtir"] = Field(
        "row",
        description="`row`: prompts as the rows have them; `matchtir`: asks for reasoning before every call, and for the "
        "answer between <answer> and </answer> (docs/data.md).",
    )
    expert: str | list[str] | None = Field(
        None,
        description="Expert traces ({id, expert_trace}), joined to the training tasks by id; named as the files of `train`.",
    )
    max_rows: int | None = Field(None, ge=1, description="Read only this many rows of each file or dataset.")
    shuffle: bool = Field(True, description="Shuffle the tasks in each epoch, from the seed.")
    on_bad_row: Literal["error", "skip"] = Field(
        "error",
        description="A row that cannot be used (docs/data.md) stops the run before its first step (in large data: when it is "
        "drawn), or is skipped and listed in `skipped_rows.jsonl` of the run directory.",
    )

    @field_validator("train", "eval", "expert")
    @classmethod
    def _named(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value == []:
            raise ValueError("the list is empty; name at least one file or dataset, or write null")
        for name in source_names(value):
            if name.startswith(HUB):
                HubDataset.parse(name)
        return value


class EnvConfig(Section):
    """The environment: tools and outcome rewards (docs/environments.md)."""

    name: str = Field(
        "auto",
        description="`lookup_chain`: built-in multi-hop look-ups; `python_tools`: tools given as Python source (FTRL, "
        "ToolHop), run in sandboxed processes; `simulated`: tools answered from a row's facts (docs/mtr.md); "
        "`functions`, `trl`, `verifiers`, `mcp`, `gymnasium`: adapters for existing tools and environments "
        "(docs/adapters.md); your own as `file.py:Class`; `auto`: python_tools with data files, else lookup_chain. A "
        "row's column `env` takes precedence.",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of the environment (docs/environments.md)."
    )


class RolloutConfig(Section):
    """Sampling of trajectories: from the prompt only, over several turns with tool calls (docs/rollouts.md)."""

    engine: str = Field(
        "transformers",
        description="Rollout engine: `transformers`: the training model itself, for models up to about 200 M "
        "parameters; `vllm`; or your own as `file.py:Class`.",
    )
    num_generations: int = Field(8, ge=1, description="Rollouts per prompt (K); at least 2, except for `sft`.")
    oversampling_factor: float = Field(
        1.0,
        ge=1,
        description="Start ⌈factor·K⌉ rollouts per prompt and cancel the slowest once K have ended. Favours short "
        "rollouts.",
    )
    temperature: float = Field(
        1.0, gt=0, description="Sampling temperature. Log-probs of rollout tokens are computed at the same temperature."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Sample from the fewest most likely tokens whose probabilities sum to this; 1: from all. `top_p`, "
        "`top_k` and `min_p` hold for rollouts and sampled evaluations (docs/rollouts.md).",
    )
    top_k: int = Field(0, ge=0, description="Sample from this many most likely tokens; 0: from all.")
    min_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Sample from tokens with at least this fraction of the most likely token's probability; null: from "
        "all.",
    )
    max_turns: int = Field(10, ge=1, description="Assistant turns per trajectory.")
    max_user_turns: int | None = Field(
        None,
        ge=1,
        description="Messages of the user per trajectory after the prompt, if the environment has a user "
        "(docs/conversations.md); null: only `max_turns` limits the dialogue.",
    )
    user: Literal["environment", "policy", "model", "endpoint"] = Field(
        "environment",
        description="Who answers turns without tool calls: `environment`: its method `respond`, if it has one; "
        "`policy`: the policy itself, with the environment's `user_prompt` (self-play, docs/conversations.md); "
        "`model`: a separate frozen model, with the same prompt; `endpoint`: a language model at an OpenAI-compatible "
        "endpoint, with the same prompt.",
    )
    user_model: str | None = Field(
        None,
        description="`user=model`: folder or name of the model that plays the user, which has the policy's tokenizer, or "
        "folder of a LoRA adapter on the run's base model; null: the one that `pretrain.user_steps` trains.",
    )
    agent_model: str | None = Field(
        None,
        description="`train_as=user`: a frozen model or LoRA adapter that plays the agent, named as `user_model`; null: the "
        "policy plays both sides.",
    )
    user_llm: dict[str, Any] | None = Field(
        None,
        description="`user=endpoint`: the language model that plays the user: {model: NAME, base_url: URL, api_key_env: "
        "VARIABLE, …} (docs/llm.md). Its answers are kept in `answers` of the run directory unless `cache_dir` is set.",
    )
    user_stop: str = Field(
        "###STOP###",
        min_length=1,
        description="Marker at the end of a message with which the policy or model that plays the user ends the "
        "dialogue.",
    )
    train_as: Literal["agent", "user"] = Field(
        "agent", description="Side of the dialogue that is trained; `user` needs `user=policy`."
    )
    max_turn_tokens: int = Field(1024, ge=1, description="Sampled tokens per assistant turn.")
    max_completion_length: int = Field(
        4096,
        ge=1,
        description="Response tokens per trajectory, observations and user messages included.",
    )
    max_prompt_length: int = Field(
        4096, ge=1, description="Longest prompt in tokens. A longer one is an error that names the task."
    )
    max_observation_tokens: int = Field(
        1024, ge=16, description="Longest observation in tokens. A longer one is cut, with a note."
    )
    max_batch_size: int = Field(128, ge=1, description="Trajectories that are sampled concurrently.")
    stop_at_tool_call: bool = Field(
        False,
        description="End a turn at its first complete tool call, for models that would continue with an invented "
        "result. Excludes parallel calls.",
    )
    tool_timeout: float = Field(10.0, gt=0, description="Seconds per tool call.")
    trajectory_timeout: float | None = Field(
        None,
        gt=0,
        description="Seconds per trajectory; a turn in progress is cancelled. Makes runs non-deterministic.",
    )
    engine_timeout: float = Field(
        300.0,
        gt=0,
        description="vLLM: seconds without a finished turn or a response after which the engine counts as hung and is "
        "restarted.",
    )
    vllm_mode: Literal["colocate", "server"] = Field(
        "colocate",
        description="`colocate`: in the trainer's process, on its device; `server`: in a separate process, on other "
        "devices.",
    )
    vllm_server_base_url: str | None = Field(
        None,
        description="URL of a running `vllm serve` (docs/rollouts.md); default: the trainer starts and supervises one.",
    )
    vllm_server_timeout: float = Field(240.0, gt=0, description="Seconds within which a server must start.")
    vllm_gpu_memory_utilization: float = Field(
        0.3, gt=0, le=1, description="Fraction of a GPU's memory that vLLM takes."
    )
    vllm_tensor_parallel_size: int = Field(1, ge=1, description="GPUs per copy of the model.")
    vllm_data_parallel_size: int = Field(
        1, ge=1, description="server: copies of the model on different GPUs, each driven by one training rank."
    )
    vllm_enable_sleep_mode: bool = Field(
        False, description="colocate: release vLLM's memory during updates (GPU only)."
    )
    vllm_weight_transfer: Literal["auto", "nccl", "files"] = Field(
        "auto",
        description="server: how weights are sent. `nccl`: from GPU to GPU; `files`: through `vllm_weights_dir`; "
        "`auto`: `nccl` where it works and weights can be resent to a restarted server (docs/rollouts.md).",
    )
    vllm_weights_dir: str | None = Field(
        None,
        description="server: folder for weight files, visible to trainer and server; default: shared memory, else the "
        "run directory.",
    )
    verify_weights: Literal["always", "first", "never"] = Field(
        "always",
        description="vLLM: when the fingerprints of the engine's weights are compared with the trainer's. `always`: "
        "after every update and before the next one; `first`: after the first transfer to an engine or a restart; "
        "`never`.",
    )
    vllm_args: dict[str, Any] = Field(
        default_factory=dict, description="Additional vLLM engine arguments, for example {enforce_eager: true}."
    )

    @model_validator(mode="after")
    def _two_sides(self) -> RolloutConfig:
        if self.train_as == "user" and self.user != "policy":
            raise ValueError("train_as=user trains the policy that plays the user; set user=policy, too")
        if self.user_model is not None and self.user != "model":
            raise ValueError("user_model plays the user only with user=model; set that, too, or remove user_model")
        if self.agent_model is not None and self.train_as != "user":
            raise ValueError(
                "agent_model plays the agent only with train_as=user; set that, too, or remove agent_model"
            )
        if (self.user == "model" or self.agent_model is not None) and self.engine != "transformers":
            key = "user=model" if self.user == "model" else "agent_model"
            raise ValueError(f"{key} runs beside the embedded engine; set engine=transformers, or user=endpoint")
        if (self.user == "endpoint") != (self.user_llm is not None):
            raise ValueError(
                "user=endpoint and user_llm, the settings of its model, belong together; set both, or neither"
            )
        if self.user == "policy" and self.max_batch_size < 2:
            raise ValueError("user=policy samples two sides of a dialogue at a time; set max_batch_size to 2 or more")
        return self

    @property
    def filters(self) -> SamplingFilters:
        """`top_p`, `top_k` and `min_p`."""
        return SamplingFilters(self.top_p, self.top_k, self.min_p or 0.0)


class AnchorConfig(Section):
    """Prompt-only anchoring (method, section 2)."""

    mode: Literal["gate", "blend"] = Field(
        "gate",
        description="`gate`: a random draw per prompt and step chooses the context; `blend`: both contexts, weighted by "
        "the expectation of that draw.",
    )
    q: float = Field(0.4, ge=0, le=1, description="Probability (gate) or weight (blend) of the prompt-only route.")


class TraceConfig(Section):
    """Rendering of the expert trace in the context of the trace-conditioned loss (method, section 2)."""

    rendering: Literal["demonstration", "turns", "hint"] = Field(
        "demonstration",
        description="`demonstration`: the trace's turns, then the question again; `turns`: the trace's turns only; "
        "`hint`: the trace as text in the user message.",
    )
    reasoning: Literal["full", "level"] = Field(
        "full", description="Reasoning in the context: all of it, or the prefix of the current reasoning level."
    )
    context_importance_weight: Literal["token", "sequence", "none"] = Field(
        "token",
        description="Stop-gradient importance weight min(clip, π(τ|x,h*)/π(τ|x)) of the trace-conditioned terms: per "
        "token, per sequence (geometric mean), or none (as printed in the paper; unstable on small models).",
    )
    context_importance_weight_clip: float = Field(1.0, gt=0, description="Upper bound of that weight.")


class SFTConfig(Section):
    """Component-aware SFT on the expert trace (method, section 2)."""

    coef: float = Field(
        0.1, ge=0, description="Weight of the SFT loss (β in the paper; TRL's `beta` is the KL coefficient)."
    )
    lambda_start: float = Field(0.8, ge=0, description="Weight of tool-call tokens at step 0.")
    lambda_end: float = Field(0.2, ge=0, description="Weight of tool-call tokens from the annealing horizon on.")
    horizon: int | None = Field(
        None, ge=1, description="Annealing horizon S in training steps; default: trainer.max_steps."
    )
    final_answer: bool = Field(
        False,
        description="`algorithm.name=sft`: also train the final answer and the reasoning before it (complete traces). Never "
        "for `pact`, whose trace must not leak the answer.",
    )
    reasoning_level_start: int = Field(
        4, ge=0, le=4, description="Reasoning prefix level at step 0 (4 = longest safe prefix, 0 = none)."
    )
    reasoning_level_end: int = Field(0, ge=0, le=4, description="Reasoning prefix level at the horizon.")
    normalizer: Literal["weighted", "count"] = Field(
        "weighted",
        description="Divide by the sum of token weights (as printed in the paper) or by the number of supervised "
        "tokens.",
    )


class OverlongBufferConfig(Section):
    """Soft overlong punishment (DAPO; keys as in verl): a penalty for rollouts close to the length limit."""

    enable: bool = Field(False, description="Subtract the penalty from the reward of training rollouts.")
    len: int = Field(
        1024,
        ge=1,
        description="Tokens before `rollout.max_completion_length` over which the penalty rises linearly from 0.",
    )
    penalty_factor: float = Field(1.0, gt=0, description="Penalty of a rollout that reaches the limit.")


class RewardConfig(Section):
    """Rewards and advantages (method, section 3)."""

    unmatched_penalty: float = Field(0.0, ge=0, description="λ_pen: the score of an unmatched call is −λ_pen.")
    gamma: float = Field(0.9, ge=0, le=1, description="Discount factor of the turn-level return.")
    advantage_combine: Literal["sum", "mean"] = Field(
        "sum", description="Token advantage: sum or mean of the group advantage and the turn advantage."
    )
    outcome: str = Field(
        "success",
        description="The environment's reward that `grpo` uses and `env_weight` weights: `success`, or another key of "
        "its rewards, such as `trace_reward` of `simulated` (docs/mtr.md). `none`: no outcome reward, only "
        "`functions` (docs/rewards.md). Evaluations always report `success`.",
    )
    env_weight: float = Field(
        0.0,
        description="Weight of the environment's `success` (`outcome`) in the trajectory reward. Ignored by `grpo`, "
        "whose reward is the outcome.",
    )
    match_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of the summed turn rewards (matching) in the trajectory reward. Not allowed with `grpo`.",
    )
    functions: list[str] = Field(
        default_factory=list,
        description="Additional rewards, which are summed: `toolrl`, `ftrl` (docs/rewards.md), or functions of your "
        "own, `file.py:name` or `module:name`, with TRL's keyword signature.",
    )
    overlong_buffer: OverlongBufferConfig = Field(default_factory=OverlongBufferConfig)


class FilterGroupsConfig(Section):
    """Dynamic sampling (DAPO; keys as in verl): groups without signal are replaced by groups of further prompts."""

    enable: bool = Field(
        False,
        description="Drop groups whose rewards are all equal, and sample further prompts in their place. Metrics: `filter/…`.",
    )
    max_num_gen_batches: int = Field(
        4,
        ge=1,
        description="Most batches of prompts_per_step prompts that a step samples, the first one included. When they are "
        "used up, dropped groups fill the step.",
    )
    max_mean_reward: float | None = Field(
        None, description="Also drop groups whose mean reward is at least this value (almost always solved); null: off."
    )


class SFTThenRLConfig(Section):
    """`algorithm.name=sft_then_rl` (method, section 5)."""

    steps: int | None = Field(None, ge=1, description="Training steps of SFT on complete traces, before RL.")
    rl: Literal["grpo", "matchtir"] = Field("grpo", description="Algorithm after the SFT steps.")


class ChordConfig(Section):
    """`algorithm.name=chord` (method, section 5; names as in its authors' code). Defaults: CHORD-φ with a constant μ."""

    mu_peak: float = Field(0.1, ge=0, le=1, description="Weight μ of SFT after the warm-up.")
    mu_valley: float = Field(0.1, ge=0, le=1, description="μ after the decay.")
    mu_warmup_steps: int = Field(0, ge=0, description="Training steps in which μ rises linearly from 0 to `mu_peak`.")
    mu_decay_steps: int = Field(
        0, ge=0, description="Steps after the warm-up in which μ falls to `mu_valley`, along a cosine; 0: at once."
    )
    enable_phi_function: bool = Field(
        True, description="Weight the traces' tokens by φ = p·(1 − p). False: equal weights (CHORD-μ)."
    )
    rl: Literal["grpo", "matchtir"] = Field("grpo", description="Rewards and advantages of the rollouts.")


class LuffyConfig(Section):
    """`algorithm.name=luffy` (method, section 5)."""

    gamma: float = Field(0.1, gt=0, description="γ of the shaping p/(p + γ).")
    expert_reward: float = Field(
        1.0, description="Reward of the expert trace in its group, as for an equally good rollout."
    )


class HptConfig(Section):
    """`algorithm.name=hpt` (method, section 5)."""

    gate: int = Field(
        0,
        ge=0,
        description="A prompt is trained on its trace if at most this many of its rollouts are solved. Published: 0 for "
        "Qwen2.5-Math, 2 (of 8) for Llama-3.1-8B.",
    )
    sft_coef: float = Field(1.0, gt=0, description="Weight of SFT. Published: 1; 0.3 for a model of 1.5 B parameters.")
    rl: Literal["grpo", "matchtir"] = Field("grpo", description="Algorithm of the other prompts.")


class SdftConfig(Section):
    """`algorithm.name=sdft` (method, section 5)."""

    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = Field(
        "reverse_kl",
        description="Divergence between the policy without the trace (p) and with it (q), over the whole vocabulary: "
        "`reverse_kl`: KL(p ‖ q), as in SDFT; `forward_kl`: KL(q ‖ p); `jsd`: the mean KL of both to their mixture, as in "
        "OPSD.",
    )


class AlgorithmConfig(Section):
    """The algorithm and its loss (docs/method.md)."""

    name: str = Field(
        "pact",
        description="`pact`, `grpo`, `matchtir`, `sft`, `sft_then_rl`, `chord`, `luffy`, `hpt` or `sdft` (one file "
        "each in pact_fast/algorithms), or your own as `file.py:Class`.",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of your own algorithm, which reads them as `self.config.args`."
    )
    epsilon: float = Field(0.2, gt=0, description="Lower clip range of the ratio.")
    epsilon_high: float | None = Field(None, gt=0, description="Upper clip range; default: epsilon.")
    delta: float | None = Field(
        None, gt=1, description="Dual clip: upper bound of the ratio for negative advantages; null: off."
    )
    beta: float = Field(
        0.0, ge=0, description="Coefficient of the KL divergence to the frozen reference policy (k3 estimator)."
    )
    entropy_coef: float = Field(0.0, description="Coefficient of the entropy bonus.")
    policy_loss: str = Field(
        "ppo",
        description="Policy loss: `ppo` (clipped surrogate), `cispo` (clipped importance weight), or one of your own as "
        "`file.py:Class`. `gspo` is in the kernels only, not in the trainer.",
    )
    loss_type: Literal["grpo", "dapo", "dr_grpo", "prompt_mean"] = Field(
        "grpo",
        description="Aggregation over tokens: mean per rollout, then over rollouts (grpo); mean over all tokens of the "
        "batch (dapo); sum divided by max_completion_length (dr_grpo); mean over all tokens of a prompt's rollouts, then "
        "over prompts (prompt_mean, as in EigenData).",
    )
    filter_groups: FilterGroupsConfig = Field(default_factory=FilterGroupsConfig)
    scale_rewards: bool = Field(True, description="Divide advantages by the standard deviation of the group.")
    vllm_importance_sampling_correction: bool = Field(
        True,
        description="With an engine whose log-probs differ from the trainer's (vLLM: other rounding, maybe older "
        "weights), weight prompt-only policy terms by π_trainer/π_sampler (stop-gradient).",
    )
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        Field(
            "token_truncate",
            description="Weight per token, or per rollout (product over its tokens); above clip_max it is set to "
            "clip_max (truncate) or to 0 (mask). All but token_truncate cost a forward pass.",
        )
    )
    vllm_importance_sampling_clip_max: float = Field(3.0, gt=0, description="Upper bound of that weight.")
    mask_truncated_completions: bool = Field(
        False, description="Exclude rollouts that hit a limit (length, turns or time) from the loss."
    )
    anchor: AnchorConfig = Field(default_factory=AnchorConfig)
    trace: TraceConfig = Field(default_factory=TraceConfig)
    sft: SFTConfig = Field(default_factory=SFTConfig)
    sft_then_rl: SFTThenRLConfig = Field(default_factory=SFTThenRLConfig)
    chord: ChordConfig = Field(default_factory=ChordConfig)
    luffy: LuffyConfig = Field(default_factory=LuffyConfig)
    hpt: HptConfig = Field(default_factory=HptConfig)
    sdft: SdftConfig = Field(default_factory=SdftConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)


class DeepSpeedConfig(Section):
    """Training state sharded over ranks by DeepSpeed ZeRO (docs/scaling.md)."""

    stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="ZeRO stage: shards optimizer states (1), also gradients (2), also parameters (3). 0: no sharding "
        "and no DeepSpeed.",
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Device that optimizer states are offloaded to."
    )
    offload_param: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Device that parameters are offloaded to (stage 3 only)."
    )
    nvme_path: str | None = Field(None, description="Folder on a local NVMe disk, for offloading to `nvme`.")
    args: dict[str, Any] = Field(
        default_factory=dict,
        description="Additional DeepSpeed settings, which override ours: {zero_optimization: {reduce_bucket_size: "
        "50000000}}.",
    )

    @model_validator(mode="after")
    def _coherent(self) -> DeepSpeedConfig:
        if self.offload_param != "none" and self.stage != 3:
            raise ValueError("offload_param needs stage=3, the only stage that shards parameters")
        if self.offload_optimizer != "none" and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3")
        if "nvme" in (self.offload_optimizer, self.offload_param) and not self.nvme_path:
            raise ValueError("offloading to nvme needs nvme_path, a folder on a local disk")
        return self


class TrainerConfig(Section):
    """Training steps, optimizer, checkpoints and evaluation."""

    max_steps: int = Field(100, ge=1, description="Training steps (rollouts and updates).")
    prompts_per_step: int = Field(16, ge=1, description="Prompts per training step.")
    prompts_per_update: int | None = Field(
        None,
        ge=1,
        description="Prompts per optimizer step; default: prompts_per_step (strictly on-policy, no pass for old "
        "log-probs).",
    )
    max_off_policy_steps: int = Field(
        0,
        ge=0,
        description="Largest age, in steps, of the weights that sample rollouts; above 0, sampling overlaps updates "
        "(vLLM server only). 0: strictly on-policy and deterministic.",
    )
    max_tokens_per_pack: int | None = Field(
        16384,
        ge=128,
        description="Token budget of one forward and backward pass; null: estimated from the free memory "
        "(docs/planning.md).",
    )
    deepspeed: DeepSpeedConfig | None = Field(
        None, description="Shard the training state over ranks; null: every rank holds all of it."
    )
    sequence_parallel_size: int = Field(
        1,
        ge=1,
        description="Ranks that share each pack (Ulysses), for contexts too long for one GPU (docs/scaling.md).",
    )
    dist_timeout: int = Field(
        1800, ge=1, description="Seconds after which a rank that does not take part in a collective counts as lost."
    )
    max_skipped_updates: int = Field(
        3,
        ge=0,
        description="Consecutive updates that may be skipped because loss or gradient is not finite; one more stops the "
        "run.",
    )
    share_prefixes: bool = Field(
        True,
        description="Compute prefixes that a prompt's sequences share only once (docs/tree.md). False: for debugging.",
    )
    merge_rollouts: bool = Field(
        True,
        description="With share_prefixes: also merge equal beginnings of a prompt's rollouts. False: for debugging.",
    )
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate of AdamW.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Learning rate after warm-up; `linear` and `cosine` decay to 0 at the last step."
    )
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps of linear warm-up.")
    weight_decay: float = Field(
        0.0, ge=0, description="Weight decay of AdamW, for matrices only (not norms and biases)."
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of AdamW's first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of AdamW's second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Epsilon of AdamW.")
    max_grad_norm: float = Field(1.0, gt=0, description="Largest gradient norm; larger gradients are scaled down.")
    save_steps: int = Field(10, ge=1, description="Steps between checkpoints; the last step is always saved.")
    save_minutes: float | None = Field(
        None, gt=0, description="Minutes between checkpoints, instead of save_steps; checked after every step."
    )
    save_total_limit: int = Field(2, ge=1, description="Number of checkpoints to keep.")
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="Steps between evaluations; needs held-out tasks. null: only before and after training.",
    )
    eval_tasks: int = Field(200, ge=1, description="Held-out tasks per evaluation.")
    report_to: str | list[str] = Field(
        "tensorboard",
        description="Trackers that receive metrics, in addition to metrics.jsonl: `tensorboard`, `trackio`, `wandb`, "
        "your own tracker as `file.py:Class`, a list of these, or `none` (docs/tracking.md).",
    )
    log_completions: int = Field(4, ge=0, description="Rollouts printed as a table at each evaluation.")
    save_rollouts: int = Field(32, ge=0, description="Rollouts per step written to rollouts/, for `pact-fast view`.")
    keep_rollouts: int | None = Field(
        200,
        ge=1,
        description="Number of newest steps whose rollouts are kept; of older steps, every tenth is kept. null: all "
        "steps.",
    )

    @property
    def pack_tokens(self) -> int:
        """max_tokens_per_pack as a number. PactError for null, which only a training run resolves."""
        if self.max_tokens_per_pack is None:
            raise PactError(
                "trainer.max_tokens_per_pack=null is resolved by training runs only; give a number of tokens"
            )
        return self.max_tokens_per_pack


class PretrainConfig(Section):
    """SFT before RL, on noisy traces of lookup_chain (for the base model of the quickstart) or on complete traces.

    With noise, the base model learns syntax and copying but not the strategy, which RL can then improve. For other
    environments, the expert traces of the tasks are used unchanged, the final answer included.
    """

    steps: int = Field(800, ge=1, description="Optimizer steps.")
    batch_size: int = Field(16, ge=1, description="Traces per step.")
    user_steps: int = Field(
        0,
        ge=0,
        description="Optimizer steps of the model that plays the user (`rollout.user=model` without `rollout.user_model`): "
        "SFT of the base model on the user's side of the expert dialogues; 0: the base model itself plays the user.",
    )
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate; it decays linearly.")
    final_lr_ratio: float = Field(0.03, ge=0, le=1, description="Learning rate at the end, relative to its peak.")
    early_stop: float = Field(
        0.35, ge=0, lt=1, description="lookup_chain: probability per turn that the trace stops before its goal."
    )
    wrong_relation: float = Field(
        0.15, ge=0, lt=1, description="lookup_chain: probability per hop that the trace follows a wrong relation."
    )


class Config(Section):
    """Top-level settings of a run."""

    seed: int = Field(0, ge=0, lt=2**63, description="Seed of all random numbers.")
    output_dir: str = Field("runs/{recipe}", description="Run directory; `{recipe}` stands for the recipe's name.")
    resume: Literal["auto", "never"] = Field(
        "never",
        description="`auto` continues from the newest complete checkpoint of the run directory, if there is one. The last "
        "section lists the settings that may change at a resume.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto`: a GPU if there is one.")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; null: all cores.")
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    env: EnvConfig = Field(default_factory=EnvConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    pretrain: PretrainConfig | None = Field(
        None,
        description="Stage that trains the base model before RL; null: none.",
    )

    @model_validator(mode="after")
    def _coherent(self) -> Config:
        if (self.model.path is None) == (self.model.random_init is None):
            raise ValueError("set exactly one of model.path (a trained model) and model.random_init (random weights)")
        rollout = self.rollout
        if rollout.vllm_server_base_url and (rollout.engine, rollout.vllm_mode) != ("vllm", "server"):
            raise ValueError("rollout.vllm_server_base_url needs rollout.engine=vllm and rollout.vllm_mode=server")
        if self.trainer.max_off_policy_steps and (rollout.engine, rollout.vllm_mode) != ("vllm", "server"):
            raise ValueError(
                "trainer.max_off_policy_steps needs rollout.engine=vllm and rollout.vllm_mode=server: only an engine on "
                "devices of its own can sample during an update"
            )
        update, step = self.trainer.prompts_per_update, self.trainer.prompts_per_step
        if update is not None and step % update:
            raise ValueError(
                f"trainer.prompts_per_step ({step}) must be a multiple of trainer.prompts_per_update ({update})"
            )
        return self
