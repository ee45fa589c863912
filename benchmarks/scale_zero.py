"""A save under DeepSpeed ZeRO, in two gloo processes: part `zero` of `benchmarks.scale`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RANKS = 2
STAGES = (2, 3)
MB = 1 << 20


def measure_saves(megabytes: int) -> tuple[float, dict[str, float]]:
    """CPU time of the training thread of rank 0 until it continues, at stage 2; and by stage, per GB of fp32 weights,
    that of the thread, that of the process (gathering has threads of its own), and wall time."""
    found = {stage: _run(megabytes, stage) for stage in STAGES}
    gb = megabytes * MB / 1e9
    more = {
        f"stage {stage} {what} s/GB": found[stage][what] / gb
        for stage in STAGES
        for what in ("thread", "process", "wall")
    }
    return found[STAGES[0]]["thread"], more


def _run(megabytes: int, stage: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "found.json")
        shared = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        command = [sys.executable, "-m", "benchmarks.scale_zero", str(megabytes), str(stage), folder]
        ranks = [
            subprocess.Popen(
                command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"},
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(RANKS)
        ]  # fmt: skip
        errors = [rank.communicate()[1] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise RuntimeError(f"a rank of the save under stage {stage} failed: {errors[0][-2000:]}")
        return json.loads(found.read_text())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(megabytes: int, stage: int, folder: Path) -> None:
    """In each rank: save twice, of which the second counts: pages and sockets are warm."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}  # it would try the compiler for all of its operators
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pact_fast.algorithms.registry import make_algorithm
    from pact_fast.config import AlgorithmConfig, TrainerConfig
    from pact_fast.distributed.world import init_world
    from pact_fast.model.sharded_weights import sharded_weights
    from pact_fast.model.weights import checkpoint_weights
    from pact_fast.train.checkpoint_writer import start_save
    from pact_fast.train.learner import Learner

    torch.set_num_threads(1)
    world = init_world("cpu", timeout=600)
    width = 512
    layer = 4 * (4 * width * width + 3 * width * 4 * width)  # bytes: attention and MLP
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "llama", vocab_size=256, hidden_size=width, intermediate_size=4 * width, num_attention_heads=8,
        num_key_value_heads=8, num_hidden_layers=max(1, megabytes * MB // layer), tie_word_embeddings=True,
    ), dtype=torch.float32)  # fmt: skip
    trainer = TrainerConfig(deepspeed={"stage": stage})
    learner = Learner(
        model,
        trainer,
        make_algorithm(AlgorithmConfig()),
        total_updates=1,
        temperature=1.0,
        updates_per_batch=1,
        world=world,
    )
    for step in (1, 2):
        began = time.thread_time(), time.process_time(), time.monotonic()
        pending = start_save(
            folder / "checkpoints", step, tensors={}, state={}, keep=1,
            sharded={"optimizer": learner.backend.state()},
            write_model=lambda path: path.mkdir(), weights=sharded_weights(model, world.rank) or checkpoint_weights(model),
            live=learner.backend.changed_by_step(), world=world, budget=1 << 40,
        )  # fmt: skip
        taken = time.thread_time() - began[0], time.process_time() - began[1], time.monotonic() - began[2]
        pending.finish()
    if world.is_main:
        weights = sum(getattr(p, "ds_numel", p.numel()) * 4 for p in model.parameters())
        scale = megabytes * MB / weights
        names = ("thread", "process", "wall")
        (folder / "found.json").write_text(json.dumps({name: scale * s for name, s in zip(names, taken, strict=True)}))


if __name__ == "__main__":
    _rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
