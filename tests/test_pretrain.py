"""The pretraining stage: its optimizer settings and its precision are those of the run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import load_config
from pact_fast.envs.registry import make_tasks
from pact_fast.model.tokenizer import train_tokenizer
from pact_fast.train import pretrain as stage


class Recorder:
    """Stands for the learner: records its arguments, and the weights of the tokens that it gets."""

    def __init__(self, model, trainer, algorithm, *, total_updates, autocast):
        self.trainer, self.autocast, self.total = trainer, autocast, total_updates
        self.weights: list[float] = []
        self.rates: list[float] = []
        Recorder.last = self

    def update(self, batches, lr_scale):
        self.weights.append(sum(float(s.sft_weight.sum()) for batch in batches for s in batch.scored))
        self.rates.append(lr_scale)
        return SimpleNamespace(loss=0.0)


@pytest.fixture
def learner(monkeypatch):
    """Runs the stage with settings; returns the recorder."""
    monkeypatch.setattr(stage, "Learner", Recorder)

    def run(*settings: str) -> Recorder:
        config = load_config("quickstart", ["pretrain.batch_size=2", *settings])
        tasks = make_tasks(config)
        renderer = ChatRenderer(train_tokenizer(tasks.train(0, 20), 512))
        model = SimpleNamespace(device=torch.device("cpu"))
        stage.pretrain(config, model, renderer, tasks, lambda step, loss: None)
        return Recorder.last

    return run


def test_packs_are_no_larger_than_those_of_the_run(learner):
    assert learner("pretrain.steps=1", "trainer.max_tokens_per_pack=1024").trainer.max_tokens_per_pack == 1024


@pytest.mark.parametrize(("dtype", "computed"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_it_computes_in_the_dtype_of_the_run(learner, dtype, computed):
    made = learner("pretrain.steps=1", f"model.dtype={dtype}")
    x = torch.ones(2, 2)
    with made.autocast:
        assert (x @ x).dtype == computed


@pytest.mark.parametrize(("steps", "warmup"), [(1, 1), (6, 1), (30, 3)])
def test_a_short_stage_reaches_its_peak_learning_rate(learner, steps, warmup):
    made = learner(f"pretrain.steps={steps}", "pretrain.learning_rate=0.5")
    assert (made.trainer.learning_rate, made.trainer.warmup_steps, made.total) == (0.5, warmup, steps)
    assert made.rates[0] == 1.0 and made.rates == sorted(made.rates, reverse=True)
    assert made.weights == pytest.approx([1.0] * steps)
