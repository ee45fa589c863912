"""The models of a run: the base model and the user model, trained if need be; policy and reference policy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pact_fast.algorithms.base import Algorithm
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import Config
from pact_fast.data.sources import TaskSource
from pact_fast.data.types import Task
from pact_fast.distributed.world import World
from pact_fast.envs.base import Environment
from pact_fast.files import atomic_save_pretrained
from pact_fast.model.build import check_context, make_model, make_policy
from pact_fast.model.logit_check import check_run
from pact_fast.rollout.registry import EngineBuilder
from pact_fast.train.pretrain import pretrain
from pact_fast.train.progress import Progress
from pact_fast.train.seeds import seed_generators
from pact_fast.train.shutdown import GracefulShutdown
from pact_fast.train.user_model import USER_FOLDER, UserSide, trains_user


@dataclass(frozen=True)
class ModelLoader:
    """Loads the models of a run, after training those that no earlier process has left in the run directory.

    config                        the run's configuration
    run                           the run directory
    tokenizer, renderer           of the run
    tasks                         whose expert traces the base model is trained on
    make_env                      makes the environment of a task, for the user's side of the traces
    algorithm                     states whether a reference policy is needed
    engine_builder                checks the model for the engine
    device                        where the models go
    world                         the ranks; rank 0 trains the base model
    progress                      shows the training
    shutdown                      is suspended on ranks that wait for rank 0
    """

    config: Config
    run: Path
    tokenizer: PreTrainedTokenizerBase
    renderer: ChatRenderer
    tasks: TaskSource
    make_env: Callable[[Task], Environment]
    algorithm: Algorithm
    engine_builder: EngineBuilder
    device: torch.device
    world: World
    progress: Progress
    shutdown: GracefulShutdown

    def load(self, newest: Path | None) -> tuple[PreTrainedModel, PreTrainedModel | None]:
        """The policy, and the frozen reference policy if there is a KL term (the policy itself if it has adapters).

        Args:
            newest: The checkpoint whose weights the policy gets; None: those of the base model.

        Raises:
            PactError: A model cannot be loaded, or trainer or engine cannot compute its own logits.
        """
        config, base_dir = self.config, self.run / "base"
        if config.pretrain:
            with nullcontext() if self.world.is_main else self.shutdown.suspended():
                self.world.run_on_main(lambda: self._pretrain(base_dir), "the base model")
        base, several = base_dir if config.pretrain else None, self.world.size > 1
        weights = newest and newest / "model"
        model = make_policy(
            config, self.tokenizer, base=base, checkpoint=weights, device=self.device, partition=several
        )
        check_context(config, model)
        self._check(model)
        if not self.algorithm.requirements(self.engine_builder.sampler_differs).reference:
            return model, None
        if config.model.lora:
            return model, model
        reference = make_model(config, self.tokenizer, path=base, device=self.device, partition=several)
        return model, reference.eval().requires_grad_(False)

    def _check(self, model: PreTrainedModel) -> None:
        """Raise PactError if trainer or engine cannot compute the model's own logits."""
        self.engine_builder.check_model(model)
        check_run(self.config, model, self.tokenizer, self.engine_builder.logprobs, self.device)

    def _pretrain(self, target: Path) -> None:
        """Train and save the base model, and the model that plays the user if there is one, unless they are there."""
        config = self.config
        assert config.pretrain is not None
        self._pretrain_one(target, "base model", self.tasks, config.pretrain.steps)
        if trains_user(config):
            side = UserSide(self.tasks, self.make_env)
            self._pretrain_one(self.run / USER_FOLDER, "user model", side, config.pretrain.user_steps, start=target)

    def _pretrain_one(
        self, target: Path, name: str, tasks: TaskSource, steps: int, *, start: Path | None = None
    ) -> None:
        """Train a model on the expert traces of tasks, and save it, unless a complete one is there."""
        config = self.config
        if (target / "config.json").exists():
            return
        seed_generators(config.seed)
        model = make_model(config, self.tokenizer, path=start, device=self.device)
        self._check(model)
        seed_generators(config.seed)
        with self.progress.phase(name, steps) as advance:
            pretrain(config, model, self.renderer, tasks, lambda step, loss: advance(f"loss {loss:.3f}"), steps=steps)
        atomic_save_pretrained([model, self.tokenizer], target)
