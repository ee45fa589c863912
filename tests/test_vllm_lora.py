"""vLLM under LoRA: after each update it samples from exactly the adapter that was sent, in this process and as a server."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed; see docs/rollouts.md")
pytest.importorskip("peft", reason="needs the extra lora: pip install 'pact-fast[lora]'")

from pact_fast.config import LoraConfig
from pact_fast.model import lora
from pact_fast.model.adapter import adapter_tensors
from pact_fast.rollout.registry import make_engine
from tests.support.vllm_engines import caught, largest_gap, make_policy, prompts, sample

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def adapted_policy(*settings: str):
    """A base model with new adapters, which change nothing yet. The rank is none of vLLM's, so buffers are padded."""
    policy = make_policy("model.lora.r=4", "model.lora.alpha=12", *settings, trained=False)
    lora.attach(policy.model, policy.config.model.lora or LoraConfig(), 0)
    return policy


def perturb_adapter(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)


@pytest.fixture(scope="module", params=["all-linear", "[q_proj,down_proj]"])
def policy(request):
    return adapted_policy(f"model.lora.target_modules={request.param}")


@pytest.fixture(scope="module")
def engine(policy):
    made = make_engine(policy.config, policy.model, policy.renderer)
    yield made
    made.shutdown()


def test_logprobs_equal_the_trainers_after_each_of_ten_updates(policy, engine, monkeypatch):
    contexts, loads, load = prompts(len(policy.renderer.tokenizer)), [], engine.transport.load_weights
    monkeypatch.setattr(
        engine.transport, "load_weights", lambda weights, version: (loads.append(version), load(weights, version))
    )
    ids = set()
    for version in range(10):
        engine.update_weights(policy.model, version)
        for temperature in (0.9, 0.0):
            done = sample(engine, contexts, 16, 0, temperature)
            assert largest_gap(policy.model, contexts, done, temperature) <= 1e-4
            ids.add(tuple(np.concatenate([d.ids for d in done]).tolist()))
        assert engine.transport.adapter_name == f"pact-{version}"
        perturb_adapter(policy.model)
    assert loads == [0]  # the weights under the adapter went over once
    assert len(ids) > 10  # and the adapters made a difference
    moved = sum(tensor.nbytes for tensor in adapter_tensors(policy.model).values())
    assert engine.sync_report.bytes == moved


class TestFaults:
    """Each one is caught before a token is sampled, and the next good update heals it."""

    @pytest.fixture
    def model(self, policy, engine):
        engine.update_weights(policy.model, 100)
        perturb_adapter(policy.model)
        yield policy.model
        engine.update_weights(policy.model, 101)
        assert largest_gap(policy.model, [np.arange(9)], sample(engine, [np.arange(9)], 8, 0)) <= 1e-4

    def test_one_number_corrupted_on_the_way(self, engine, model, monkeypatch):
        load = engine.transport.load_adapter

        def corrupt(tensors, version):
            name = next(name for name in tensors if name.endswith("1.mlp.down_proj.lora_B.weight"))
            changed = tensors[name].clone()
            changed.view(torch.int32)[3, 1] ^= 1  # the last bit of one number
            load(tensors | {name: changed}, version)

        monkeypatch.setattr(engine.transport, "load_adapter", corrupt)
        caught(engine, model, r"1 of \d+ tensors differ \(model.layers.1.mlp.down_proj.lora_B.weight\)")
        monkeypatch.undo()

    def test_a_dropped_layer(self, engine, model, monkeypatch):
        load = engine.transport.load_adapter
        kept = lambda tensors: {k: t for k, t in tensors.items() if "0.self_attn.q_proj" not in k}  # noqa: E731
        monkeypatch.setattr(engine.transport, "load_adapter", lambda tensors, version: load(kept(tensors), version))
        caught(engine, model, r"2 of \d+ tensors differ \(model.layers.0.self_attn.q_proj")
        monkeypatch.undo()

    def test_a_dropped_update(self, engine, model, monkeypatch):
        rpc = engine.transport.llm_engine.collective_rpc
        monkeypatch.setattr(
            engine.transport, "load_adapter", lambda tensors, version: rpc("pact_finish_loading", args=(version,))
        )
        caught(engine, model, "tensors differ")
        monkeypatch.undo()

    def test_an_adapter_on_the_embedding(self, engine, model, monkeypatch):
        """vLLM has room for one there; the trainer has none, so its contents must be detected."""
        load = engine.transport.load_adapter

        def more(tensors, version):
            load(tensors, version)
            worker = engine.transport.llm_engine.engine_core.engine_core.model_executor.driver_worker
            manager = worker.model_runner.get_model().lora_manager
            manager.modules["model.embed_tokens"].lora_b_stacked[0, 0, 2, 1] = 1.0

        monkeypatch.setattr(engine.transport, "load_adapter", more)
        caught(engine, model, "embed_tokens.lora .unknown to the trainer")
        monkeypatch.undo()


def test_a_server_takes_adapters_and_gets_them_again_when_it_was_killed():
    policy = adapted_policy("rollout.vllm_mode=server")
    engine = make_engine(policy.config, policy.model, policy.renderer)
    try:
        contexts = prompts(len(policy.renderer.tokenizer), 4)
        for version in range(3):
            perturb_adapter(policy.model)
            engine.update_weights(policy.model, version)
            done = sample(engine, contexts, 16, version)
            assert largest_gap(policy.model, contexts, done) <= 1e-4
        os.killpg(engine.transport.pid, signal.SIGKILL)
        done = sample(engine, contexts, 16, 5)
        assert engine.restarts == 1 and largest_gap(policy.model, contexts, done) <= 1e-4
        perturb_adapter(policy.model)
        engine.update_weights(policy.model, 3)
        assert largest_gap(policy.model, contexts, sample(engine, contexts, 16, 6)) <= 1e-4
    finally:
        engine.shutdown()
