"""Placement: which ranks have an engine, on which GPUs servers run, and how a launcher's environment is read."""

import os

import pytest

from pact_fast.config import parse_config
from pact_fast.distributed import world as worlds
from pact_fast.distributed.world import World, init_world
from pact_fast.errors import PactError
from pact_fast.rollout.vllm.builder import VllmBuilder, server_devices


def config(**rollout):
    return parse_config({"model": {"path": "m"}, "rollout": {"engine": "vllm", "vllm_mode": "server", **rollout}})


@pytest.mark.parametrize(
    "size, servers, expected", [(1, 1, [0]), (4, 1, [0]), (8, 2, [0, 4]), (4, 4, [0, 1, 2, 3]), (5, 2, [0, 2])]
)
def test_servers_are_spread_over_the_processes(size, servers, expected):
    assert VllmBuilder(config(vllm_data_parallel_size=servers)).engine_ranks(World(0, size)) == expected


def test_every_process_has_an_engine_unless_there_are_servers():
    assert VllmBuilder(config(vllm_mode="colocate")).engine_ranks(World(1, 3)) == [0, 1, 2]
    with pytest.raises(PactError, match="vllm_data_parallel_size=3, but only 2 processes"):
        VllmBuilder(config(vllm_data_parallel_size=3)).engine_ranks(World(0, 2))


def test_two_nodes_of_eight_gpus_train_on_four_and_serve_on_four(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    servers = VllmBuilder(config(vllm_data_parallel_size=2)).engine_ranks(World(0, 8))
    for rank in servers:
        assert server_devices(World(rank, 8, rank % 4), servers, 4, 8) == [4, 5, 6, 7]


def test_servers_of_one_node_share_its_free_gpus(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [server_devices(World(r, 4, r), [0, 2], 2, 8) for r in (0, 2)] == [[4, 5], [6, 7]]
    with pytest.raises(PactError, match=r"8 GPUs are too few for 4 training processes .* on GPUs 7 to 9"):
        server_devices(World(1, 4, 1), [0, 1], 3, 8)
    assert server_devices(World(), [0], 1, 0) is None and server_devices(World(), [0], 1, 1) is None


def test_without_a_launcher_there_is_one_process():
    assert worlds.launcher_environment({}) == {}
    assert worlds.launcher_environment({"WORLD_SIZE": "1"}) == {}  # torchrun --nproc-per-node 1


def launched(monkeypatch, **variables: str) -> None:
    """For `init_world`: these variables and no others of a launcher's, until the test ends."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in worlds.LAUNCHER_VARIABLES and "SLURM" not in name
    }
    monkeypatch.setattr(os, "environ", kept | variables)


def test_a_sequence_cannot_be_shared_by_one_process(monkeypatch):
    launched(monkeypatch)
    with pytest.raises(PactError, match="sequence_parallel_size=2 needs at least 2 ranks; start with torchrun"):
        init_world("cpu", timeout=1, sequence_parallel=2)


def test_a_launchers_environment_is_read(monkeypatch):
    with pytest.raises(PactError, match="WORLD_SIZE=4, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        worlds.launcher_environment({"WORLD_SIZE": "4", "RANK": "3"})
    whole = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "5"}
    assert worlds.launcher_environment(whole | {"HOME": "/"}) == whole
    launched(monkeypatch, **whole)
    with pytest.raises(PactError, match="sequence_parallel_size=3 does not divide the number of ranks, 4"):
        init_world("cpu", timeout=1, sequence_parallel=3)


@pytest.mark.slow
def test_slurm_steps_are_joined_and_its_batch_script_is_not(monkeypatch):
    script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}
    assert worlds.launcher_environment(script) == {}
    step = script | {
        "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123",
        "SLURM_STEP_NODELIST": "gpu[3-4]",
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        with pytest.raises(PactError, match=r"SLURM node list 'gpu\[3-4\]' with scontrol; set MASTER_ADDR"):
            worlds.launcher_environment(step)
    monkeypatch.setattr(worlds, "_first_host", lambda nodes: "gpu3")
    expected = {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu3", "MASTER_PORT": "29623",
    }  # fmt: skip
    assert worlds.launcher_environment(step) == expected
    assert worlds.launcher_environment(step | {"MASTER_ADDR": "b", "MASTER_PORT": "7"}) == expected | {
        "MASTER_ADDR": "b",
        "MASTER_PORT": "7",
    }


def test_a_peer_that_does_not_come_is_an_error_within_the_deadline(monkeypatch):
    launched(monkeypatch, WORLD_SIZE="2", RANK="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="9")
    with pytest.raises(worlds.PeerLost, match=r"rank 1 of 2 .* waited for the other ranks to start"):
        init_world("cpu", timeout=2)
