"""A ZeRO-3 model in two ranks (test_weights_zero3.py): weights gathered bucket by bucket, gradients through a tree."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pact_fast.kernels.fingerprint import fingerprint
from pact_fast.model import weights
from pact_fast.tree import TokenTree, pack, tree_forward
from tests.support.processes import deepspeed_on_gloo

SHAPE = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, max_position_embeddings=64,
)  # fmt: skip


def main(folder: Path) -> None:
    """Writes what this rank saw to `folder`/RANK.json."""
    deepspeed_on_gloo()
    import deepspeed

    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **SHAPE), dtype=torch.float32)
    engine, *_ = deepspeed.initialize(
        model=copy.deepcopy(plain),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        },
    )
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
