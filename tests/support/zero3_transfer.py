"""Run in two ranks by test_vllm_transfer.py: a ZeRO-3 model's weights by vLLM's weight transfer API."""

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch

from pact_fast.distributed.world import World
from pact_fast.model.weights import WeightsUnavailable
from pact_fast.rollout.registry import make_engine
from tests.support.gloo_transfer import Group, native
from tests.support.processes import deepspeed_on_gloo
from tests.support.vllm_engines import largest_gap, make_policy, perturb, prompts, sample
from tests.support.vllm_servers import forked_servers


def run(folder: Path) -> None:
    """In each rank; rank 0 writes result.json."""
    deepspeed_on_gloo()
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    policy = make_policy("rollout.vllm_mode=server", trained=False)
    plain = copy.deepcopy(policy.model)
    split, *_ = deepspeed.initialize(
        model=policy.model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        },
    )
    result: dict[str, Any] = {"gaps": [], "broadcasts": 0, "error": ""}

    def count(tensor):
        result["broadcasts"] += 1

    with native(), forked_servers():
        Group.before_broadcast = staticmethod(count)
        engine = make_engine(policy.config, split.module, policy.renderer, folder=folder, world=World(rank, 2, rank))
        contexts = prompts(len(policy.renderer.tokenizer))
        for version in range(3):
            train(plain, split.module)
            if rank == 0 and version == 2:
                os.killpg(engine.transport.pid, signal.SIGKILL)
            engine.update_weights(split.module, version)
            if rank == 0:
                result["gaps"].append(largest_gap(plain, contexts, sample(engine, contexts, 16, version)))
        torch.distributed.barrier()
        if rank == 0:
            os.killpg(engine.transport.pid, signal.SIGKILL)
            result["restarts"] = engine.restarts
            try:
                sample(engine, contexts, 16, 3)
            except WeightsUnavailable as error:
                result["error"] = str(error)
            (folder / "result.json").write_text(json.dumps(result))
        engine.shutdown()
        torch.distributed.barrier()


def train(plain: torch.nn.Module, split: torch.nn.Module) -> None:
    """The first process reports the current weights."""
    perturb(plain)
    parameters = list(split.parameters())
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0), torch.no_grad():
        for parameter, new in zip(parameters, plain.parameters(), strict=True):
            parameter.copy_(new)
