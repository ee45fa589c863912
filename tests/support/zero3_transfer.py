"""Run in two ranks by test_vllm_transfer.py: a ZeRO-3 model's weights by vLLM's weight transfer API."""

import copy
import json
import os
import signal
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch

from pact_fast.distributed.world import World
from pact_fast.model.weights import WeightsUnavailable
from pact_fast.rollout.registry import make_engine
from tests.support.gloo_transfer import Group, native
from tests.support.vllm_engines import largest_gap, make_policy, perturb, prompts, sample

deepspeed.init_distributed("gloo")
rank = torch.distributed.get_rank()
folder = Path(sys.argv[1])
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
result = {"gaps": [], "broadcasts": 0, "error": ""}


def count(tensor):
    result["broadcasts"] += 1


def train() -> None:
    """The first process says what the weights are now."""
    perturb(plain)
    parameters = list(split.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0), torch.no_grad():
        for parameter, new in zip(parameters, plain.parameters(), strict=True):
            parameter.copy_(new)


with native():
    Group.before_broadcast = staticmethod(count)
    engine = make_engine(policy.config, split.module, policy.renderer, folder=folder, world=World(rank, 2, rank))
    for version in range(3):
        train()
        if rank == 0 and version == 2:
            os.killpg(engine.transport.pid, signal.SIGKILL)
        engine.update_weights(split.module, version)
        if rank == 0:
            contexts = prompts(len(policy.renderer.tokenizer))
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
