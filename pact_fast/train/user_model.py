"""A frozen model that plays the other side in rollouts: a user's SFT before the run, and its place beside the policy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import Config
from pact_fast.data.sources import FileTasks, TaskSource
from pact_fast.data.types import Task
from pact_fast.envs.base import Environment
from pact_fast.errors import PactError
from pact_fast.model import lora
from pact_fast.model.build import from_pretrained, make_model
from pact_fast.rollout.engine import Engine
from pact_fast.rollout.registry import make_engine
from pact_fast.rollout.self_play import user_example
from pact_fast.rollout.user_engine import WithFrozenModel

USER_FOLDER = "user"  # of the run directory
ADAPTER = "adapter_config.json"  # tells the folder of a LoRA adapter from that of a model


class UserSide:
    """The tasks of a source from the user's side, with the user's part of their expert dialogues.

    Args:
        tasks: Tasks of the agent.
        make_env: Makes the environment of a task, which knows the user's side.
    """

    def __init__(self, tasks: TaskSource, make_env: Callable[[Task], Environment]):
        self._tasks, self._make_env = tasks, make_env

    @property
    def from_files(self) -> bool:
        return isinstance(self._tasks, FileTasks)

    def train(self, step: int, count: int) -> list[Task]:
        return [self._example(task) for task in self._tasks.train(step, count)]

    def held_out(self, count: int) -> list[Task]:
        return [self._example(task) for task in self._tasks.held_out(count)]

    def _example(self, task: Task) -> Task:
        env = self._make_env(task)
        env.reset(task)
        return user_example(task, env)


class BothSides:
    """The tasks of either side: a new tokenizer learns the words of both."""

    def __init__(self, agent: TaskSource, user: TaskSource):
        self._sides = (agent, user)

    def train(self, step: int, count: int) -> list[Task]:
        return [task for side in self._sides for task in side.train(step, count)]

    def held_out(self, count: int) -> list[Task]:
        return [task for side in self._sides for task in side.held_out(count)]


def trains_user(config: Config) -> bool:
    """Whether the run trains the model that plays the user."""
    return config.rollout.user == "model" and config.rollout.user_model is None


def tokenizer_tasks(config: Config, tasks: TaskSource, make_env: Callable[[Task], Environment]) -> TaskSource:
    """The tasks that a new tokenizer is trained on."""
    return BothSides(tasks, UserSide(tasks, make_env)) if trains_user(config) else tasks


def with_frozen_model(
    engine: Engine,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    renderer: ChatRenderer,
    run: Path | None,
    *,
    device: torch.device,
    autocast: AbstractContextManager | None,
) -> Engine:
    """The engine, beside one of the frozen model that plays the other side, if one does.

    Args:
        engine: The policy's engine.
        config: The run's configuration: `rollout.user=model`, or `rollout.agent_model`.
        tokenizer: The policy's, which the frozen model must have, too.
        renderer: For stop tokens.
        run: The run directory, which holds the user's model if the run has trained it; None: the run has not begun, and the
            user has the weights that its training would start from.
        device: Where to put the model.
        autocast: Precision context of the forward pass.

    Raises:
        PactError: The model is not there, or has another tokenizer.
    """
    rollout = config.rollout
    if rollout.user != "model" and rollout.agent_model is None:
        return engine
    key = "agent_model" if rollout.agent_model else "user_model"
    given = rollout.agent_model or rollout.user_model
    if given:
        _check_tokenizer(given, key, tokenizer)
    base = _saved(run, "base")
    if given and (Path(given) / ADAPTER).exists():  # on the weights that the policy started from
        model = make_model(config, tokenizer, path=base, device=device)
        lora.merge_saved(model, Path(given))
    else:
        source = given or _saved(run, USER_FOLDER)
        if source is None and config.pretrain is None:
            raise PactError(
                "rollout.user=model: there is no model to play the user; set rollout.user_model, or train one in the section "
                "pretrain (user_steps)"
            )
        model = make_model(config, tokenizer, path=source, device=device)
    frozen = make_engine(config, model.eval().requires_grad_(False), renderer, autocast=autocast)
    return WithFrozenModel(engine, frozen, plays_user=rollout.agent_model is None)


def _saved(run: Path | None, name: str) -> Path | None:
    """A model that the run has trained before its first step."""
    return run / name if run and (run / name / "config.json").exists() else None


def _check_tokenizer(source: str, key: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """PactError if a model has another tokenizer than the policy; an adapter may have none."""
    folder = Path(source)
    if (folder / ADAPTER).exists() and not (folder / "tokenizer_config.json").exists():
        return
    other = from_pretrained(AutoTokenizer, source, "tokenizer")
    if other.get_vocab() != tokenizer.get_vocab():
        raise PactError(
            f"rollout.{key}: the tokenizer of {source} differs from the policy's; choose a model with the same one, or set "
            "model.tokenizer to it where the policy starts from random weights"
        )
