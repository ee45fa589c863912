"""Build what a run needs from its configuration: model, tokenizer, renderer, tasks, environments."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pact_fast.config import Config, DataConfig, EnvConfig, ModelConfig
from pact_fast.data.formats import get_format
from pact_fast.data.readers import attach_traces, read_tasks, read_traces
from pact_fast.data.rendering import ChatRenderer
from pact_fast.data.types import Task
from pact_fast.envs.base import Environment
from pact_fast.envs.toolchain import ToolchainTasks
from pact_fast.errors import PactError
from pact_fast.trainer import lora
from pact_fast.trainer.tokenizer import train_tokenizer

transformers.logging.disable_progress_bar()  # the run has its own

TOKENIZER_TASKS = 1000  # tasks whose text a new tokenizer is trained on


class TaskSource(Protocol):
    def train(self, step: int, count: int) -> list[Task]:
        """The prompts of a step: a pure function of the step, so a resumed run sees the same data."""

    def held_out(self, count: int) -> list[Task]: ...


class GeneratedTasks:
    """Toolchain tasks, made on demand; never the same twice in training."""

    def __init__(self, seed: int, args: dict):
        try:
            self._train = ToolchainTasks("train", seed, **args)
            self._eval = ToolchainTasks("eval", seed, **args)
        except TypeError as error:
            raise PactError(f"env.args: {error}; toolchain takes hops, distractors, flaky and parallel") from None

    def train(self, step: int, count: int) -> list[Task]:
        return self._train.tasks(count, start=step * count)

    def held_out(self, count: int) -> list[Task]:
        return self._eval.tasks(count)


class FileTasks:
    """Tasks of a file, in a new order every epoch."""

    def __init__(self, data: DataConfig, seed: int):
        assert data.train is not None
        self._tasks = read_tasks(data.train, data.format, data.max_rows)
        self._eval = read_tasks(data.eval, data.format, data.max_rows) if data.eval else []
        if data.expert:
            known = {task.id for task in self._tasks}
            traces = read_traces(data.expert)
            # with max_rows the traces of rows left out are not an error
            attach_traces(self._tasks, {i: t for i, t in traces.items() if i in known} if data.max_rows else traces)
        self._seed, self._shuffle = seed, data.shuffle

    def train(self, step: int, count: int) -> list[Task]:
        return [self._at(place) for place in range(step * count, (step + 1) * count)]

    def held_out(self, count: int) -> list[Task]:
        return self._eval[:count]

    def _at(self, place: int) -> Task:
        epoch, index = divmod(place, len(self._tasks))
        if self._shuffle:
            index = int(np.random.default_rng((self._seed, epoch)).permutation(len(self._tasks))[index])
        return self._tasks[index]


def environment_name(env: EnvConfig, data: DataConfig) -> str:
    if env.name != "auto":
        return env.name
    return "python_tools" if data.train else "toolchain"


def make_tasks(config: Config) -> TaskSource:
    if config.data.train:
        return FileTasks(config.data, config.seed)
    if environment_name(config.env, config.data) == "toolchain":
        return GeneratedTasks(config.seed, config.env.args)
    raise PactError("data.train is not set: name a JSONL or parquet file of tasks (env.name=toolchain makes its own)")


def make_environments(config: Config) -> Callable[[], Environment]:
    """A factory: one environment per trajectory, heavy parts shared."""
    if environment_name(config.env, config.data) == "toolchain":
        from pact_fast.envs import toolchain

        return toolchain.factory(config.env.args)
    from pact_fast.envs import python_tools

    return python_tools.factory({"timeout": config.rollout.tool_timeout, **config.env.args})


def make_tokenizer(model: ModelConfig, tasks: TaskSource, saved: Path | None = None) -> PreTrainedTokenizerBase:
    """The run's tokenizer. `saved` is where a run keeps its own: it counts from then on, whatever the settings become."""
    source = model.tokenizer or model.path
    if saved and saved.is_dir():
        return from_pretrained(AutoTokenizer, str(saved), "tokenizer")
    if source is None:
        assert model.random_init is not None
        size = int(model.random_init.get("vocab_size", 512))
        return train_tokenizer(tasks.train(0, TOKENIZER_TASKS), size)
    tokenizer = from_pretrained(AutoTokenizer, source, "tokenizer")
    if model.chat_template:
        tokenizer.chat_template = _read(model.chat_template)
    return tokenizer


def make_renderer(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> ChatRenderer:
    return ChatRenderer(tokenizer, None if model.tool_format == "auto" else get_format(model.tool_format))


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
        with split_as_read(config) if split else nullcontext():
            built = from_pretrained(AutoModelForCausalLM, source, "model", dtype=torch.float32)
    if config.model.gradient_checkpointing:
        checkpoint_activations(built)
    torch.nn.Module.to(built, device)  # in place
    return built


def checkpoint_activations(model: PreTrainedModel) -> None:
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


def device_kind(config: Config) -> str:
    """cpu or cuda."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise PactError("device=cuda, but torch sees no GPU; use device=auto or install a CUDA build of torch")
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def pick_device(config: Config) -> torch.device:
    return torch.device(device_kind(config))


def free_memory(device: torch.device) -> int:
    """Bytes; on the CPU, this process's share of what the machine has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024 * int(available.split()[1]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def precision(config: Config, device: torch.device) -> AbstractContextManager:
    """bfloat16 is autocast on float32 weights; with ZeRO, the weights themselves are bfloat16, and float32 their masters."""
    if config.model.dtype == "bfloat16" and not splits_state(config):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def splits_state(config: Config) -> bool:
    return config.trainer.deepspeed is not None and config.trainer.deepspeed.stage > 0


@contextmanager
def split_as_read(config: Config) -> Iterator[None]:
    """While this lasts, transformers reads a model into ZeRO-3's parts, if the run has them."""
    trainer = config.trainer
    if trainer.deepspeed is None or trainer.deepspeed.stage < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    from pact_fast.trainer.zero import import_deepspeed, settings

    import_deepspeed(pick_device(config))
    known = HfDeepSpeedConfig(settings(trainer, config.model.dtype))  # transformers keeps a weak reference to it
    yield
    del known


def from_pretrained(factory, source: str, what: str, **kwargs):
    try:
        return factory.from_pretrained(source, **kwargs)
    except (OSError, ValueError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PactError(f"cannot load the {what} from '{source}': {first[:300]}") from None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise PactError(f"model.chat_template: cannot read '{path}': {error.strerror}") from None
