"""Updates on uneven packs, in this process or in several ranks (test_distributed.py)."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pact_fast.algorithms.registry import algorithm, make_algorithm
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import AlgorithmConfig, TrainerConfig
from pact_fast.distributed.world import World, init_world
from pact_fast.train.learner import Learner
from tests.support.groups import make_groups, step_context_of
from tests.support.processes import deepspeed_on_gloo
from tests.support.runs import TOKENIZERS

STEPS = 3
OFFLOAD = {"offload_optimizer": "cpu"}
BACKENDS: dict[str, dict[str, Any]] = {
    "replicated": {},
    "zero1": {"deepspeed": {"stage": 1}},
    "zero2": {"deepspeed": {"stage": 2}},
    "zero3": {"deepspeed": {"stage": 3, "args": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}},
    "zero2-cpu": {"deepspeed": {"stage": 2, **OFFLOAD}},
    "zero3-cpu": {"deepspeed": {"stage": 3, **OFFLOAD}},
}
PACKS = {
    "whole": 100_000,
    "small": 300,
}  # "whole": fewer packs than processes; "small": many a step, and not evenly many


@functools.cache
def loaded_renderer() -> ChatRenderer:
    """Each rank would train a tokenizer of its own first."""
    return ChatRenderer(AutoTokenizer.from_pretrained(TOKENIZERS["tiny"]))


def run(case: str, world: World) -> dict[str, np.ndarray]:
    """`case`: backend/packs/model, for example zero3/small/llama; further words: kl, sequence, dropped, an algorithm."""
    backend, packs, kind, *more = case.split("/")
    torch.manual_seed(0)
    renderer = loaded_renderer()
    settings: dict[str, Any] = dict(
        vocab_size=len(renderer.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=2048, tie_word_embeddings=kind == "qwen3",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    config = AlgorithmConfig(
        name=next((word for word in more if word in algorithm.names()), "pact"), anchor={"mode": "blend"},
        entropy_coef=0.01, beta=0.5 if "kl" in more else 0.0,
    )  # fmt: skip
    trainer = TrainerConfig(
        learning_rate=1e-3, max_tokens_per_pack=PACKS[packs], max_grad_norm=0.1, **BACKENDS[backend]
    )
    learner = Learner(
        model, trainer, make_algorithm(config), total_updates=STEPS, temperature=0.8, updates_per_batch=2, world=world,
        reference=reference_of(model) if "kl" in more else None,
    )  # fmt: skip
    if learner.reference is not None and backend.startswith("zero3"):
        assert all(hasattr(p, "ds_id") for p in learner.reference.parameters())  # split, too
    if "dropped" in more and world.rank == 1:
        learner._backward = losing_one(learner._backward)
    groups = make_groups(renderer, config, prompts=3, rollouts=2)
    rule = make_algorithm(config)
    losses, norms, gradient = [], [], np.zeros(0)
    for step in range(STEPS):
        update = step_context_of(renderer, config, groups, step=step, world=world)
        own = [group for group in groups if world.owner_of(group.prompt_index, len(groups)) == world.rank]
        batches = rule.prompt_batches(own, update)
        learner.prepare(batches)
        result = learner.accumulate(batches)
        if step == 0:
            gradient = whole_gradient(learner)
        norms.append(learner.step())
        losses.append(result.loss)
    return {"losses": np.array(losses), "norms": np.array(norms), "gradient": gradient}


def reference_of(model: PreTrainedModel) -> PreTrainedModel:
    """Another model, so that the KL is not 0 at the start."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    for parameter in reference.parameters():
        parameter.mul_(1.1)
    return reference


def whole_gradient(learner: Learner) -> np.ndarray:
    parameters = list(learner.model.parameters())
    if learner.backend.lockstep:
        from deepspeed.utils import safe_get_full_grad

        return np.concatenate([safe_get_full_grad(p).float().flatten().numpy() for p in parameters])
    learner.backend.reduce_gradients()
    found = np.concatenate([p.grad.flatten().numpy() for p in parameters])
    for p in parameters:
        p.grad /= learner.world.size  # `step` sums again
    return found


def losing_one(backward):
    """Return a backward pass that silently drops one micro-batch, a fault reported for DeepSpeed's CPU offload."""
    lost = []

    def faulty(batch, scored, result, last):
        if not lost and len(batch):
            lost.append(batch)
            scored = []
        return backward(batch, scored, result, last)

    return faulty


def main(out: Path, cases: list[str]) -> None:
    """Runs the cases one after the other; rank 0 writes their results to `out`."""
    torch.set_num_threads(1)
    if any(case.startswith("zero") for case in cases):
        deepspeed_on_gloo()
    found: dict[str, np.ndarray] = {}
    worlds: dict[int, World] = {}
    for case in cases:
        parallel = 2 if "sequence" in case else 1
        if parallel not in worlds:
            worlds[parallel] = init_world("cpu", timeout=120, sequence_parallel=parallel)
        world = worlds[parallel]
        found |= {f"{case}:{key}": value for key, value in run(case, world).items()}
    if world.is_main:
        np.savez(out, **found)
    world.close()
