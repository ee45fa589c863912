"""Build or load the model of a run."""

from __future__ import annotations

from collections.abc import Iterator
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

transformers.logging.disable_progress_bar()  # the run shows its own progress


def make_model(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    path: str | Path | None = None,
    device: torch.device | str = "cpu",
    split: bool = False,
) -> PreTrainedModel:
    """The policy in float32; bfloat16 is a matter of autocast, the weights keep full precision.

    From `path`, else as the configuration says: a trained model, or random weights from the seed. `split`: for training,
    where ZeRO-3 splits parameters over the processes as they are read, so that no process ever holds all of them.
    """
    source = str(path) if path else config.model.path
    if source is None:
        settings = dict(config.model.random_init or {})
        kind = settings.pop("model_type", "qwen3")
        settings["vocab_size"] = len(tokenizer)
        try:
            architecture = AutoConfig.for_model(
                kind,
                **settings,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
            )
        except (ValueError, TypeError, KeyError) as error:
            raise PactError(f"model.random_init: {' '.join(str(error).split())[:200]}") from None
        torch.manual_seed(config.seed)
        built = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
    else:
        with zero3_init(config) if split else nullcontext():
            built = from_pretrained(AutoModelForCausalLM, source, "model", dtype=torch.float32)
    if config.model.gradient_checkpointing:
        enable_gradient_checkpointing(built)
    torch.nn.Module.to(built, device)  # in place
    return built


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Gradient checkpointing, by its name since transformers 5.24 or, where that is not there, the old one, which warns."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def make_policy(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: str | Path | None = None,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
    split: bool = False,
) -> PreTrainedModel:
    """The policy of a run as a checkpoint's model folder holds it, else as training begins.

    `base`: where the run's base model is, if it has made one. With adapters, a checkpoint holds only them.
    """
    if config.model.lora is None:
        return make_model(config, tokenizer, path=checkpoint or base, device=device, split=split)
    model = make_model(config, tokenizer, path=base, device=device, split=split)
    lora.attach(model, config.model.lora, config.seed)
    if checkpoint:
        lora.load(model, checkpoint)
    return model


def check_context(config: Config, model: PreTrainedModel) -> None:
    """PactError if the lengths do not fit into the model's context."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = config.rollout.max_prompt_length + config.rollout.max_completion_length
    if window and longest > window:
        raise PactError(
            f"rollout.max_prompt_length + rollout.max_completion_length = {longest} exceed the model's context of {window} "
            "tokens; lower one of them"
        )


@contextmanager
def zero3_init(config: Config) -> Iterator[None]:
    """While this lasts, transformers reads a model into ZeRO-3's parts, if the run has them."""
    trainer = config.trainer
    if trainer.deepspeed is None or trainer.deepspeed.stage < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    import_deepspeed(pick_device(config))
    known = HfDeepSpeedConfig(
        deepspeed_config(trainer, config.model.dtype)
    )  # transformers keeps a weak reference to it
    yield
    del known


def from_pretrained(factory, source: str, what: str, **kwargs):
    try:
        return factory.from_pretrained(source, **kwargs)
    except (OSError, ValueError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PactError(f"cannot load the {what} from '{source}': {first[:300]}") from None


def architecture(model: ModelConfig) -> PretrainedConfig:
    """The model's transformers configuration; weights are not read."""
    if model.path:
        return from_pretrained(AutoConfig, model.path, "model")
    settings = dict(model.random_init or {})
    try:
        return AutoConfig.for_model(settings.pop("model_type", "qwen3"), **settings)
    except (ValueError, TypeError, KeyError) as error:
        raise PactError(f"model.random_init: {' '.join(str(error).split())[:200]}") from None


def meta_model(config: Config, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The policy as training makes it, on the meta device: shapes alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture(config.model), dtype=dtype)
        if config.model.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        if config.model.lora:
            lora.attach(model, config.model.lora, config.seed)
    return model.train()
