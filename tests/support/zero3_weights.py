"""Run in two ranks by test_weights_zero3.py: a ZeRO-3 model's weights, gathered bucket by bucket, and its
gradients through a tree.
"""

import copy
import json
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from transformers import AutoConfig, AutoModelForCausalLM

from pact_fast.model import weights
from pact_fast.tree import TokenTree, pack, tree_forward

deepspeed.init_distributed("gloo")
torch.manual_seed(0)
settings = AutoConfig.for_model(
    "qwen3", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
)  # fmt: skip
plain = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
engine, *_ = deepspeed.initialize(
    model=copy.deepcopy(plain),
    config={
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    },
)
weights.BUCKET = 1  # a layer at a time
expected = {name: weights.fingerprint(tensor) for name, tensor in weights.checkpoint_weights(plain)}
found, live = {}, []
sent = weights.WeightSnapshot(engine.module)
announced = [tuple(shape) for shape in sent.metadata()]
sent.check_available()  # nobody has gone through them
seen = []
for name, tensor in sent:
    found[name] = weights.fingerprint(tensor)
    seen.append((name, tensor.dtype, tuple(tensor.shape)))
    live.append(sum(parameter.numel() for parameter in engine.module.parameters()))
try:
    iter(sent)
    again = True
except weights.WeightsUnavailable:
    again = False


tree = TokenTree()
prompt = tree.add(np.arange(9))
for start in range(3):
    tree.add(np.arange(start, start + 5), prompt)
(batch,) = pack([tree], max_tokens=512)
tree_forward(plain, batch).square().sum().backward()
engine.backward(tree_forward(engine.module, batch).square().sum())
errors = [
    float((safe_get_full_grad(a) - b.grad).norm() / b.grad.norm())
    for a, b in zip(engine.module.parameters(), plain.parameters(), strict=True)
    if b.grad is not None
]
result = {
    "gradient": max(errors),
    "equal": found == expected,
    "announced": announced == seen,
    "again": again,
    "largest": max(live),
    "total": sum(parameter.numel() for parameter in plain.parameters()),
    "left": sum(parameter.numel() for parameter in engine.module.parameters()),
}
with open(f"{sys.argv[1]}/{torch.distributed.get_rank()}.json", "w") as file:
    json.dump(result, file)
