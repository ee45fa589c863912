"""A ZeRO-3 model in several ranks (test_weights_zero3.py): weights gathered and saved, gradients through a tree."""

from __future__ import annotations

import copy
import errno
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.files import write_bytes
from pact_fast.kernels.fingerprint import fingerprint
from pact_fast.model import shards, snapshot, weights
from pact_fast.model.sharded_weights import sharded_weights
from pact_fast.model.shards import write_file
from pact_fast.train import checkpoint_writer
from pact_fast.tree import TokenTree, pack, tree_forward
from tests.support.processes import deepspeed_on_gloo

SHAPE = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, max_position_embeddings=64,
)  # fmt: skip


# experts that transformers fuses, a tied head, and sizes that three ranks cannot divide
ODD = dict(
    vocab_size=95, hidden_size=32, intermediate_size=48, moe_intermediate_size=20, num_hidden_layers=3, num_experts=3,
    num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
)  # fmt: skip


def partitioned(plain: PreTrainedModel, persistence: int = 0) -> Any:
    """DeepSpeed's engine with a copy of the model; parameters of fewer elements than `persistence` stay gathered."""
    deepspeed_on_gloo()
    import deepspeed

    deepspeed.init_distributed("gloo")
    engine, *_ = deepspeed.initialize(
        model=copy.deepcopy(plain),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": persistence},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        },
    )
    return engine


def save(folder: Path, failing: tuple[str, ...]) -> None:
    """Saves a partitioned model after a step, in small files, and the gathered model to `folder`/gathered.

    Before, for each of `failing`, to a folder of that name: rank 1 cannot write the files whose names begin with it, and the
    save must fail on all. What each rank was told is in RANK.json of that folder.
    """
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **ODD), dtype=torch.float32)
    engine = partitioned(plain, persistence=40)
    engine.backward(engine(input_ids=torch.arange(12)[None]).logits.square().sum())
    engine.step()
    world = World(torch.distributed.get_rank(), torch.distributed.get_world_size())
    snapshot.SHARD_BYTES, weights.BUCKET = 20_000, 1
    for name in failing:
        if world.rank == 1:
            shards.write_file = functools.partial(full_disk, name, write_file)
            checkpoint_writer.write_bytes = functools.partial(full_disk, name, write_bytes)
        try:
            save_to(folder / name, engine.module, world)
            told = ""
        except PactError as error:
            told = str(error)
        (folder / name / f"{world.rank}.json").write_text(json.dumps(told))
    shards.write_file, checkpoint_writer.write_bytes = write_file, write_bytes
    save_to(folder, engine.module, world)
    gathered = {name: tensor.clone() for name, tensor in weights.checkpoint_weights(engine.module)}
    if world.is_main:
        write_file(gathered, folder / "gathered")


def save_to(folder: Path, model: PreTrainedModel, world: World) -> None:
    sharded = sharded_weights(model, world.rank)
    assert sharded is not None
    checkpoint_writer.save(
        folder, 1, tensors={}, state={}, write_model=lambda path: path.mkdir(), weights=sharded, keep=1, world=world
    )


def full_disk(name: str, write: Callable[..., Any], *args: Any) -> Any:
    """Of the arguments of `write`, one is the path."""
    (path,) = (argument for argument in args if isinstance(argument, Path))
    if path.name.startswith(name):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(*args)


def main(folder: Path) -> None:
    """Writes this rank's observations to `folder`/RANK.json."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **SHAPE), dtype=torch.float32)
    engine = partitioned(plain)
    result = {
        **gather(engine.module, plain),
        "gradient": largest_error(engine, plain),
        "total": sum(parameter.numel() for parameter in plain.parameters()),
        "left": sum(parameter.numel() for parameter in engine.module.parameters()),
    }
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(result))


def gather(split: torch.nn.Module, plain: PreTrainedModel) -> dict[str, object]:
    """Goes through the weights of the partitioned model once."""
    weights.BUCKET = 1  # a layer at a time
    expected = {name: fingerprint(tensor) for name, tensor in weights.checkpoint_weights(plain)}
    found, live, seen = {}, [], []
    sent = weights.WeightSnapshot(split)
    announced = [tuple(shape) for shape in sent.metadata()]
    sent.check_available()  # nobody has gone through them
    for name, tensor in sent:
        found[name] = fingerprint(tensor)
        seen.append((name, tensor.dtype, tuple(tensor.shape)))
        live.append(sum(parameter.numel() for parameter in split.parameters()))
    try:
        iter(sent)
        again = True
    except weights.WeightsUnavailable:
        again = False
    return {"equal": found == expected, "announced": announced == seen, "again": again, "largest": max(live)}


def largest_error(engine, plain: PreTrainedModel) -> float:
    """Of the gradients of all parameters, relative to those of the whole model."""
    from deepspeed.utils import safe_get_full_grad

    tree = TokenTree()
    prompt = tree.add(np.arange(9))
    for start in range(3):
        tree.add(np.arange(start, start + 5), prompt)
    (batch,) = pack([tree], max_tokens=512)
    tree_forward(plain, batch).square().sum().backward()
    engine.backward(tree_forward(engine.module, batch).square().sum())
    return max(
        float((safe_get_full_grad(a) - b.grad).norm() / b.grad.norm())
        for a, b in zip(engine.module.parameters(), plain.parameters(), strict=True)
        if b.grad is not None
    )
