"""The model of a run: loaded from a checkpoint or the hub, or built with random weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pact_fast.config import Config, ModelConfig
from pact_fast.errors import PactError
from pact_fast.model import lora
from pact_fast.model.deepspeed import deepspeed_config, import_deepspeed
from pact_fast.model.device import pick_device
from pact_fast.model.modes import update_mode

transformers.logging.disable_progress_bar()  # the run shows its own progress


def make_model(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    path: str | Path | None = None,
    device: torch.device | str = "cpu",
    partition: bool = False,
) -> PreTrainedModel:
    """The model of a run without adapters, in fp32: bf16 computation is left to `device.precision`.

    Args:
        config: The run's configuration.
        tokenizer: Determines the vocabulary size and special tokens of a model with random weights.
        path: Where to load the model from. None: as `config.model` says, from its path or with random weights.
        device: Where to put the model.
        partition: Whether ZeRO-3, if the run uses it, partitions parameters while they are read, so that no rank ever
            holds all of them. For training.

    Raises:
        PactError: The model cannot be loaded, or `model.random_init` is invalid.
    """
    source = str(path) if path else config.model.path
    if source is None:
        model_config = _random_init_config(
            config.model,
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
        torch.manual_seed(config.seed)
        model = model_of(model_config, torch.float32)
    else:
        with zero3_init(config) if partition else nullcontext():
            model = from_pretrained(AutoModelForCausalLM, source, "model", dtype=torch.float32)
    if config.model.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    torch.nn.Module.to(model, device)  # in place
    return model


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Uses the API of transformers ≥ 5.24, or the older one, which later versions deprecate."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def make_policy(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: str | Path | None = None,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
    partition: bool = False,
) -> PreTrainedModel:
    """The policy of a run: with the weights of a checkpoint, or as training begins.

    Args:
        config: The run's configuration.
        tokenizer: See `make_model`.
        base: Folder of the run's base model, if the run has made one.
        checkpoint: Model folder of a checkpoint. With LoRA it holds only the adapters, which are put on the base model.
        device: Where to put the model.
        partition: See `make_model`.
    """
    if config.model.lora is None:
        return make_model(config, tokenizer, path=checkpoint or base, device=device, partition=partition)
    model = make_model(config, tokenizer, path=base, device=device, partition=partition)
    lora.attach(model, config.model.lora, config.seed)
    if checkpoint:
        lora.load(model, checkpoint)
    return model


def check_context(config: Config, model: PreTrainedModel) -> None:
    """Raise PactError if the longest prompt and completion do not fit into the model's context."""
    context_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = config.rollout.max_prompt_length + config.rollout.max_completion_length
    if context_length and longest > context_length:
        raise PactError(
            f"rollout.max_prompt_length + rollout.max_completion_length = {longest} exceed the model's context of "
            f"{context_length} tokens; lower one of them"
        )


@contextmanager
def zero3_init(config: Config) -> Iterator[None]:
    """While the context lasts, transformers partitions the models that it loads, if the run uses ZeRO-3."""
    trainer = config.trainer
    if trainer.deepspeed is None or trainer.deepspeed.stage < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    import_deepspeed(pick_device(config))
    # transformers holds only a weak reference: the partitioning ends with this object
    enabled = HfDeepSpeedConfig(deepspeed_config(trainer, config.model.dtype))
    yield
    del enabled


def from_pretrained(factory, source: str, what: str, **kwargs):
    """factory.from_pretrained(source, **kwargs) with one-line errors, which call the result `what`."""
    try:
        return factory.from_pretrained(source, **kwargs)
    except (OSError, ValueError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PactError(f"cannot load the {what} from '{source}': {first[:300]}") from None


def architecture(model: ModelConfig) -> PretrainedConfig:
    """The model's transformers configuration; weights are not read."""
    if model.path:
        return from_pretrained(AutoConfig, model.path, "model")
    return _random_init_config(model)


def _random_init_config(model: ModelConfig, vocab_size: int | None = None, **token_ids: int | None) -> PretrainedConfig:
    """The configuration of `model.random_init` with the tokenizer's vocabulary size and special tokens, if given."""
    settings = dict(model.random_init or {})
    model_type = settings.pop("model_type", "qwen3")
    if vocab_size is not None:
        settings["vocab_size"] = vocab_size
    try:
        config = AutoConfig.for_model(model_type, **settings, **token_ids)
    except Exception as error:  # also errors of huggingface_hub's validation, which are no ValueErrors
        raise PactError(f"model.random_init: {_line(error)}") from None
    _check_sizes(config, settings)
    return config


def _check_sizes(config: PretrainedConfig, given: Collection[str]) -> None:
    """PactError for sizes that do not fit together, where transformers fails in the first forward pass.

    A size that is not `given` is the family's default, which is meant for large models.
    """
    values = config.get_text_config()

    def named(key: str) -> str:
        return f"{key}={getattr(values, key)}{'' if key in given else f' (the default of {config.model_type})'}"

    heads, shared = (getattr(values, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise PactError(
            f"model.random_init: {named('num_attention_heads')} is no multiple of {named('num_key_value_heads')}; set "
            f"num_key_value_heads to {heads} or a divisor of it"
        )
    chosen = getattr(values, "num_experts_per_tok", None)
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        count = getattr(values, key, None)
        if isinstance(chosen, int) and isinstance(count, int) and 0 < count < chosen:
            raise PactError(
                f"model.random_init: num_experts_per_tok={chosen} exceeds {key}={count}; set num_experts_per_tok to at most "
                f"{count}"
            )


def model_of(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A causal LM with random weights. PactError, one line, if transformers cannot build one of this configuration."""
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        kind = type(error).__name__
        raise PactError(
            f"cannot build a causal LM of model type '{config.model_type}': {kind}: {_line(error)}"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def meta_model(config: Config, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The policy as training builds it, adapters included, on the meta device: shapes and dtypes without storage."""
    with torch.device("meta"):
        model = model_of(architecture(config.model), dtype)
        if config.model.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        if config.model.lora:
            lora.attach(model, config.model.lora, config.seed)
    update_mode(model)
    return model
