"""A model that plays the user in the rollouts of an agent: its SFT before the run, and its place beside the policy."""

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
from pact_fast.model.build import from_pretrained, make_model
from pact_fast.rollout.engine import Engine
from pact_fast.rollout.registry import make_engine
from pact_fast.rollout.self_play import user_example
from pact_fast.rollout.user_engine import WithUserModel

USER_FOLDER = "user"  # of the run directory


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


def with_user_model(
    engine: Engine,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    renderer: ChatRenderer,
    run: Path | None,
    *,
    device: torch.device,
    autocast: AbstractContextManager | None,
) -> Engine:
    """The engine, beside one of the model that plays the user where `rollout.user=model`.

    Args:
        engine: The policy's engine.
        config: The run's configuration.
        tokenizer: The policy's, which the user's model must have, too.
        renderer: For stop tokens.
        run: The run directory, which holds the user's model if the run has trained it; None: the run has not begun, and the
            user has the weights that its training would start from.
        device: Where to put the model.
        autocast: Precision context of the forward pass.

    Raises:
        PactError: The model is not there, or has another tokenizer.
    """
    if config.rollout.user != "model":
        return engine
    own = run / USER_FOLDER if run else None
    source = config.rollout.user_model or (str(own) if own and (own / "config.json").exists() else None)
    if source is None and config.pretrain is None:
        raise PactError(
            "rollout.user=model: there is no model to play the user; set rollout.user_model, or train one in the section "
            "pretrain (user_steps)"
        )
    if config.rollout.user_model:
        other = from_pretrained(AutoTokenizer, config.rollout.user_model, "tokenizer")
        if other.get_vocab() != tokenizer.get_vocab():
            raise PactError(
                f"rollout.user_model: the tokenizer of {config.rollout.user_model} differs from the policy's; choose a model "
                "with the same one, or set model.tokenizer to it where the policy starts from random weights"
            )
    model = make_model(config, tokenizer, path=source, device=device).eval().requires_grad_(False)
    return WithUserModel(engine, make_engine(config, model, renderer, autocast=autocast))
