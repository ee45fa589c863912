"""rollout.verify_weights: when the engine's weights are compared with the trainer's. A stand-in for vLLM holds copies."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pact_fast.config import load_config
from pact_fast.errors import EngineDied, PactError
from pact_fast.kernels.fingerprint import fingerprint
from pact_fast.model.weights import WeightMismatch, WeightShard
from pact_fast.rollout.engine_check import EngineSmokeTest
from pact_fast.rollout.vllm.engine import VllmEngine
from tests.support.models import make


class StandIn:
    """Stand-in for vLLM. `fault` is called on the tensors as they arrive; calls named in `dies` kill the engine."""

    name, synchronous = "the engine", True

    def __init__(self) -> None:
        self.held: dict[str, torch.Tensor] = {}
        self.version, self.reports, self.resets = -1, 0, 0
        self.fault: Any = None
        self.dies: list[str] = []

    def load_weights(self, weights, version: int) -> None:
        self._sent = {name: tensor.clone() for name, tensor in weights}, version
        if "load" in self.dies:
            self.dies.remove("load")
            raise EngineDied(self.name, "killed")
        self._load()

    def _load(self) -> None:
        self.held, self.version = {name: tensor.clone() for name, tensor in self._sent[0].items()}, self._sent[1]
        if self.fault:
            self.fault(self.held)

    def load_adapter(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        self._adapter, self.version, self._sent = tensors, version, (self._sent[0], version)
        if "adapter" in self.dies:
            self.dies.remove("adapter")
            raise EngineDied(self.name, "killed")

    def report_adapter(self) -> tuple[int, list[WeightShard]]:
        return self.version, [WeightShard(n, 0, 0, *t.shape, fingerprint(t)) for n, t in self._adapter.items()]

    def restart(self) -> None:
        self._load()

    def report_weights(self) -> tuple[int, list[WeightShard]]:
        self.reports += 1
        return self.version, [
            WeightShard(name, 0, 0, len(t), t.numel() // len(t), fingerprint(t)) for name, t in self.held.items()
        ]

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def wake(self) -> None: ...


def flip(held: dict[str, torch.Tensor]) -> None:
    held["model.norm.weight"].view(torch.int32)[3] ^= 1


@pytest.fixture(scope="module")
def model():
    return make("qwen3").float()


def make_engine(when: str) -> tuple[VllmEngine, StandIn]:
    vllm = StandIn()
    return VllmEngine(vllm, [1], deadline=5, verify_weights=when), vllm  # type: ignore[arg-type]


def test_the_default_is_always_and_the_setting_reaches_the_engine():
    assert load_config("quickstart").rollout.verify_weights == "always"
    assert load_config("quickstart", ["rollout.verify_weights=first"]).rollout.verify_weights == "first"
    with pytest.raises(PactError, match=r"rollout\.verify_weights"):
        load_config("quickstart", ["rollout.verify_weights=sometimes"])


@pytest.mark.parametrize(("when", "reports"), [("always", [1, 3, 5]), ("first", [1, 1, 1]), ("never", [0, 0, 0])])
def test_how_often_weights_are_read_back(model, when, reports):
    engine, vllm = make_engine(when)
    for version, expected in enumerate(reports):
        engine.update_weights(model, version)
        assert (vllm.reports, vllm.resets >= version + 1, engine.version) == (expected, True, version)
        verified = when == "always" or (when == "first" and version == 0)
        assert (engine.sync_report.verify_seconds is not None) == verified
        assert engine.sync_report.bytes == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(("when", "caught_at"), [("always", 0), ("first", 0), ("never", None)])
def test_an_engine_that_loads_wrongly(model, when, caught_at):
    engine, vllm = make_engine(when)
    vllm.fault = flip
    if caught_at is None:
        engine.update_weights(model, 0)
        return
    with pytest.raises(WeightMismatch, match=r"model\.norm\.weight"):
        engine.update_weights(model, 0)
    assert engine.version == -1  # nothing can be sampled


@pytest.mark.parametrize("when", ["always", "first"])
def test_a_later_transfer_that_is_damaged(model, when):
    engine, vllm = make_engine(when)
    engine.update_weights(model, 0)
    vllm.fault = flip
    if when == "always":
        with pytest.raises(WeightMismatch):
            engine.update_weights(model, 1)
    else:
        engine.update_weights(model, 1)
        assert engine.version == 1


def test_weights_that_change_between_two_updates(model):
    engine, vllm = make_engine("always")
    engine.update_weights(model, 0)
    flip(vllm.held)
    with pytest.raises(WeightMismatch, match=r"model\.norm\.weight"):
        engine.update_weights(model, 1)


def test_a_restarted_engine_is_verified_again(model):
    engine, vllm = make_engine("first")
    engine.update_weights(model, 0)
    vllm.dies = ["load"]
    engine.update_weights(model, 1)
    assert (vllm.reports, engine.restarts) == (2, 1)
    engine.update_weights(model, 2)
    assert vllm.reports == 2
    vllm.dies, vllm.fault = ["load"], flip
    with pytest.raises(WeightMismatch):
        engine.update_weights(model, 3)


@pytest.mark.parametrize("when", ["always", "first"])
def test_an_adapter_whose_engine_restarts_is_verified_with_the_weights_under_it(model, when, monkeypatch):
    """The frozen weights are sent once only, but a restarted engine has loaded them again."""
    adapter = {"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 32)}
    monkeypatch.setattr("pact_fast.rollout.vllm.engine.engine_adapter", lambda *args: adapter)
    engine, vllm = make_engine(when)
    engine.update_weights(model, 0)
    before = vllm.reports
    vllm.dies = ["adapter"]
    engine.update_weights(model, 1)
    assert vllm.reports == before + (2 if when == "always" else 1)
    vllm.dies, vllm.fault = ["adapter"], flip
    with pytest.raises(WeightMismatch):
        engine.update_weights(model, 2)


def test_never_is_a_line_in_the_log(caplog):
    with caplog.at_level(logging.WARNING):
        make_engine("always"), make_engine("first")
        assert not caplog.records
        make_engine("never")
    assert [record.message.count("\n") for record in caplog.records] == [0]
    assert "rollout.verify_weights=never" in caplog.text


@pytest.mark.parametrize(("when", "words"), [("always", "every tensor verified in"), ("never", "not verified")])
def test_doctor_says_whether_it_verified(model, when, words, monkeypatch):
    engine, _ = make_engine(when)
    monkeypatch.setattr("pact_fast.rollout.engine_check.make_engine", lambda *args: engine)
    check = EngineSmokeTest.__new__(EngineSmokeTest)
    check.config, check.model, check.renderer = SimpleNamespace(), model, None  # type: ignore[assignment]
    assert words in check.engine()
