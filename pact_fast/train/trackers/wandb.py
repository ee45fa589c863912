"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pact_fast.errors import PactError
from pact_fast.train.trackers.base import TrackedRun, Tracker
from pact_fast.train.trackers.registry import tracker

FINISH_SECONDS = 60.0  # for uploads at the end; without a network, W&B would wait for ever


@tracker("wandb")
class WandbTracker(Tracker):
    """A W&B run whose x-axis is the metric `step`. WANDB_PROJECT, WANDB_NAME, WANDB_MODE and the others count.

    W&B's own step cannot decrease, but a resumed run repeats lost steps, so metrics have an x-axis of our own.
    """

    requires = "wandb"

    @classmethod
    def check(cls) -> None:
        """Raise PactError if wandb is missing, or would ask for an API key in the middle of the start."""
        super().check()
        import wandb

        if wandb.setup().settings.mode != "online":
            return
        try:
            logged_in = wandb.login(prompt=False, verify=False)
        except TypeError:  # a version that cannot be asked without asking the user
            return
        if not logged_in:
            raise PactError(
                "trainer.report_to: wandb has no API key; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"
            )

    def __init__(self, run: TrackedRun):
        import wandb

        super().__init__(run)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "pact_fast"),
            name=os.environ.get("WANDB_NAME", run.name),
            id=os.environ.get("WANDB_RUN_ID", run.id),
            resume="allow",
            dir=str(run.folder),
            settings=wandb.Settings(finish_timeout=FINISH_SECONDS),
        )
        self._run.config.update(dict(run.config), allow_val_change=True)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)
