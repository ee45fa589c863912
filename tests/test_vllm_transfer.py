"""Weights by vLLM's weight transfer API to real servers; gloo in place of NCCL, all else is vLLM's (gloo_transfer.py)."""

import json
import logging
import os
import signal

import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed; see docs/rollouts.md")

from pact_fast.config import LoraConfig
from pact_fast.errors import PactError
from pact_fast.model import lora
from pact_fast.model.weights import WeightSnapshot, WeightsUnavailable
from pact_fast.rollout.registry import make_engine
from pact_fast.rollout.vllm import weight_transfer
from pact_fast.rollout.vllm.weight_transfer import choose_transfer
from tests.support.gloo_transfer import EXTENSION, Group, native
from tests.support.processes import run_ranks
from tests.support.vllm_engines import caught, largest_gap, make_policy, perturb, prompts, running_server, sample

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
FLAGS = ["--weight-transfer-config", '{"backend": "nccl"}']


@pytest.fixture(scope="module", autouse=True)
def gloo():
    with native():
        yield


@pytest.fixture(scope="module")
def policy():
    return make_policy("rollout.vllm_mode=server", "rollout.engine_timeout=10", trained=False)


@pytest.fixture(scope="module")
def engine(policy):
    made = make_engine(policy.config, policy.model, policy.renderer)
    yield made
    made.shutdown()


class AtBroadcast:
    """Calls `act` at the n-th broadcast of an update."""

    def __init__(self, monkeypatch, at, act):
        self.seen, self.at, self.act = 0, at, act
        monkeypatch.setattr(Group, "before_broadcast", self)

    def __call__(self, tensor):
        self.seen += 1
        if self.seen == self.at:
            self.act(tensor)


def exact(engine, policy, version):
    contexts = prompts(len(policy.renderer.tokenizer))
    assert largest_gap(policy.model, contexts, sample(engine, contexts, 16, version)) <= 1e-4


def test_logprobs_equal_the_trainers_and_no_file_is_written(policy, engine, monkeypatch):
    for version in range(3):
        perturb(policy.model)
        broadcasts = AtBroadcast(monkeypatch, 0, None)
        engine.update_weights(policy.model, version)
        assert broadcasts.seen > 3
        assert engine.sync_report.bytes == sum(p.nbytes for p in policy.model.parameters())
        exact(engine, policy, version)
    assert not list(engine.transport.weight_files.folder.iterdir()) and engine.restarts == 0


def test_a_bit_that_changes_on_the_way_is_caught(policy, engine, monkeypatch):
    perturb(policy.model)
    AtBroadcast(monkeypatch, 2, lambda packed: packed[packed.numel() // 2].bitwise_xor_(1))
    caught(engine, policy.model, r"1 of \d+ tensors differ")


def test_a_tensor_that_is_left_out_is_caught(policy, engine, monkeypatch):
    perturb(policy.model)
    left_out = "model.layers.1.mlp.down_proj.weight"
    shapes, tensors = WeightSnapshot.metadata, WeightSnapshot.__iter__
    monkeypatch.setattr(WeightSnapshot, "metadata", lambda self: [m for m in shapes(self) if m.name != left_out])
    monkeypatch.setattr(
        WeightSnapshot, "__iter__", lambda self: (pair for pair in tensors(self) if pair[0] != left_out)
    )
    caught(engine, policy.model, left_out)


def test_a_server_that_died_gets_the_current_weights(policy, engine):
    perturb(policy.model)
    engine.update_weights(policy.model, 4)
    os.killpg(engine.transport.pid, signal.SIGKILL)
    exact(engine, policy, 4)
    os.killpg(engine.transport.pid, signal.SIGKILL)
    perturb(policy.model)
    engine.update_weights(policy.model, 5)
    exact(engine, policy, 5)


@pytest.mark.parametrize("fault", ["dies", "dies, and NCCL waits for it", "hangs"])
def test_a_server_that_dies_or_hangs_while_it_receives(policy, engine, monkeypatch, fault):
    perturb(policy.model)
    engine.update_weights(policy.model, 6)
    perturb(policy.model)
    before, server, waited = engine.restarts, engine.transport.pid, []

    def inject(packed):
        Group.given_up.clear()
        os.killpg(server, signal.SIGSTOP if fault == "hangs" else signal.SIGKILL)
        if "waits" in fault:  # as gloo does not
            waited.append(Group.given_up.wait(30))

    AtBroadcast(monkeypatch, 3, inject)
    engine.update_weights(policy.model, 7)
    assert all(waited) and engine.restarts > before and engine.transport.pid != server
    exact(engine, policy, 7)


def test_weights_that_are_unavailable_are_an_error_that_says_so(policy, engine, monkeypatch):
    engine.update_weights(policy.model, 8)
    os.killpg(engine.transport.pid, signal.SIGKILL)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(
        WeightsUnavailable, match=r"changed them since .*resume the run.*rollout.vllm_weight_transfer=files"
    ):
        exact(engine, policy, 8)
    for session in range(8):  # nobody waits for these turns any more
        engine.close(session)
    engine.update_weights(policy.model, 9)  # new ones can be sent
    exact(engine, policy, 9)


def test_the_weights_under_an_adapter(tmp_path):
    pytest.importorskip("peft", reason="needs the extra lora: pip install 'pact-fast[lora]'")
    policy = make_policy("rollout.vllm_mode=server", "model.lora.r=4", trained=False)
    lora.attach(policy.model, policy.config.model.lora or LoraConfig(), 0)
    engine = make_engine(policy.config, policy.model, policy.renderer, folder=tmp_path)
    for version in range(2):
        engine.update_weights(policy.model, version)
        exact(engine, policy, version)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if ".lora_" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    engine.update_weights(policy.model, 2)
    os.killpg(engine.transport.pid, signal.SIGKILL)
    exact(engine, policy, 2)
    engine.shutdown()


def test_a_running_server_and_two_trainers_one_after_the_other(policy, tmp_path):
    config = policy.config.model_copy(deep=True)
    with running_server(policy, tmp_path, *FLAGS, extension=EXTENSION) as config.rollout.vllm_server_base_url:
        for trainer in range(2):
            engine = make_engine(config, policy.model, policy.renderer, folder=tmp_path / str(trainer))
            for version in range(2):
                perturb(policy.model)
                engine.update_weights(policy.model, version)
                exact(engine, policy, version)
            assert not list(engine.transport.weight_files.folder.iterdir())
            engine.shutdown()


def test_a_running_server_that_was_not_started_for_it(policy, tmp_path, caplog):
    config = policy.config.model_copy(deep=True)
    with running_server(policy, tmp_path) as config.rollout.vllm_server_base_url:
        config.rollout.vllm_weight_transfer = "nccl"
        with pytest.raises(
            PactError, match=r"not started with --weight-transfer-config '\{\"backend\": \"nccl\"\}'; restart it with"
        ):
            make_engine(config, policy.model, policy.renderer, folder=tmp_path)
        config.rollout.vllm_weight_transfer = "auto"
        with caplog.at_level(logging.WARNING):
            engine = make_engine(config, policy.model, policy.renderer, folder=tmp_path)
        assert "its weights go through files in" in caplog.text
        perturb(policy.model)
        engine.update_weights(policy.model, 0)
        assert [path.name for path in engine.transport.weight_files.folder.iterdir()] == ["weights-0"]
        exact(engine, policy, 0)
        engine.shutdown()


def test_which_transfer_is_chosen(policy, monkeypatch):
    config = policy.config.model_copy(deep=True, update={"device": "auto"})

    def way(wanted="auto", separate=True):
        config.rollout.vllm_weight_transfer = wanted
        return choose_transfer(config, policy.model, separate_devices=separate)

    assert way() == way("files") == "files"
    with pytest.raises(PactError, match="nccl does not work here: the trainer has no GPU; use auto or files"):
        way("nccl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert way() == way("nccl") == "nccl" and way("files") == way(separate=False) == "files"
    with pytest.raises(PactError, match="share a GPU"):
        way("nccl", separate=False)
    config.trainer.max_off_policy_steps = 1  # while the next steps are sampled, the weights change
    assert way() == "files" and way("nccl") == "nccl"
    config.model.lora = LoraConfig()  # those under an adapter do not
    assert way() == "nccl"
    monkeypatch.setattr(weight_transfer, "needs_all_ranks", lambda model: True)
    assert way() == "files" and way("nccl") == "nccl"


def test_a_dying_server_does_not_start_while_its_weights_cannot_be_sent(policy, engine, monkeypatch):
    """Under ZeRO-3, processes that gather go through the weights once."""
    monkeypatch.setattr("pact_fast.model.weights.needs_all_ranks", lambda model: True)
    engine.update_weights(policy.model, 10)
    os.killpg(engine.transport.pid, signal.SIGKILL)
    with pytest.raises(WeightsUnavailable, match="ZeRO-3 has partitioned them"):
        exact(engine, policy, 10)
    assert engine.transport.pid is None


def test_weights_that_zero3_has_split(tmp_path):
    """Two processes gather them; a server that died before that is started first, one that dies later ends the run."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    from tests.support import zero3_transfer

    run_ranks(zero3_transfer.run, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["gaps"]) == 3 and max(result["gaps"]) <= 1e-4 and result["restarts"] == 1
    assert result["broadcasts"] > 3 and "ZeRO-3 has partitioned them" in result["error"]
