"""The model of a run: loaded from a checkpoint or the hub, or built with random weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pact_fast.config import Config, ModelConfig
from pact_fast.errors import PactError, foreign_errors
from pact_fast.model import lora
from pact_fast.model.deepspeed import deepspeed_config, import_deepspeed
from pact_fast.model.device import pick_device
from pact_fast.model.modes import update_mode
from pact_fast.text import short

MAX_LAYERS = 2000
MAX_CONFIG_BYTES = 10_000_000

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
        model = from_config(model_config, "model.random_init")
    else:
        with zero3_init(config) if partition else nullcontext():
            model = _load_model(source)
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
    """factory.from_pretrained(source, **kwargs) with one-line errors, which call the result `what`.

    Code in the model folder is never run, not even if the user confirms it at the terminal.
    """
    _check_config_file(source)
    problem, cure = f"cannot load the {what} from '{source}'", f"check that it is a complete {what} for transformers"
    try:
        with foreign_errors(problem, cure):
            return factory.from_pretrained(source, trust_remote_code=False, **kwargs)
    except PactError as error:
        if "trust_remote_code" not in str(error.__cause__):
            raise
        raise PactError(
            f"{problem}: it needs code of its own, which is never run; use a model whose class transformers has"
        ) from None


def _load_model(source: str) -> PreTrainedModel:
    """The model of a folder or hub name. PactError if a part of it has no weights there, and would be random."""
    model, info = from_pretrained(AutoModelForCausalLM, source, "model", dtype=torch.float32, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise PactError(
            f"cannot load the model from '{source}': it has no weights for {', '.join(missing[:3])}{more}, which would be "
            "random; use a complete checkpoint of this architecture"
        )
    return model


def architecture(model: ModelConfig) -> PretrainedConfig:
    """The model's transformers configuration; weights are not read."""
    if model.path:
        return from_pretrained(AutoConfig, model.path, "model")
    return _random_init_config(model)


def from_config(config: PretrainedConfig, source: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with random weights. `source` names the configuration in errors."""
    with foreign_errors(f"{source}: transformers cannot build this model", "correct its configuration"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _random_init_config(model: ModelConfig, vocab_size: int | None = None, **token_ids: int | None) -> PretrainedConfig:
    """The configuration of `model.random_init` with the tokenizer's vocabulary size and special tokens, if given."""
    settings = dict(model.random_init or {})
    model_type = settings.pop("model_type", "qwen3")
    if vocab_size is not None:
        settings["vocab_size"] = vocab_size
    _check_layers(settings, "model.random_init")
    with foreign_errors("model.random_init", "correct the setting"):
        config = AutoConfig.for_model(model_type, **settings, **token_ids)
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


def _check_config_file(source: str) -> None:
    """PactError for a config.json that would make transformers build a model without end."""
    with contextlib.suppress(OSError, ValueError, RecursionError):  # transformers says what is wrong with it
        path = Path(source) / "config.json"
        if path.is_file() and path.stat().st_size < MAX_CONFIG_BYTES:
            _check_layers(json.loads(path.read_text(encoding="utf-8")), str(path))


def _check_layers(settings: Any, source: str) -> None:
    """PactError if a number of layers, here or in a nested configuration, is beyond any model's."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if isinstance(value, dict):
            _check_layers(value, source)
        elif "layers" in str(key) and isinstance(value, int | float) and value > MAX_LAYERS:
            raise PactError(f"{source}: {key} is {short(value)}, and no model has more than {MAX_LAYERS:,}; correct it")


def meta_model(config: Config, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The policy as training builds it, adapters included, on the meta device: shapes and dtypes without storage."""
    with torch.device("meta"):
        model = from_config(architecture(config.model), config.model.path or "model.random_init", dtype)
        if config.model.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        if config.model.lora:
            lora.attach(model, config.model.lora, config.seed)
    update_mode(model)
    return model
