"""One update by the real learner in a process of its own: its peak of resident memory, its seconds and its amounts."""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import gc
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.measure import MALLOC, PeakMemory, resident_bytes
from pact_fast.algorithms.base import PromptBatch
from pact_fast.algorithms.registry import make_algorithm
from pact_fast.batch.loss_table import ScoredTokens
from pact_fast.config import Config, parse_config
from pact_fast.distributed.world import World, init_world
from pact_fast.estimate import hardware
from pact_fast.kernels import LossContext, release_memory
from pact_fast.model import lora
from pact_fast.model.build import architecture, enable_gradient_checkpointing
from pact_fast.model.device import precision
from pact_fast.train.learner import Learner, UpdateResult
from pact_fast.tree import Node, TokenTree
from tests.support.processes import deepspeed_on_gloo, run_ranks

TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 300}
WARM_UP = (64, 32, 16, 2)


def probe(
    config: dict[str, Any], lengths: tuple[int, int, int, int], prompts: int = 1, *, rates: bool = False, ranks: int = 1
) -> dict[str, Any]:
    """An update of `config`'s model in fresh processes.

    Args:
        config: sections of a configuration, as in YAML.
        lengths: tokens of prompt, trace and response, and rollouts per prompt.
        prompts: prompts of the update.
        rates: also measure this machine's rates right before and after the update.
        ranks: processes that share the update.

    Returns:
        peak, beyond: resident bytes, in all and on top of what was held before the update; seconds; rates; tokens,
        packs and flops of the update.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        run_ranks(main, out, config, lengths, prompts, rates, ranks=ranks)
        return json.loads(out.read_text())


def fix_malloc() -> None:
    """Apply measure.MALLOC to a forked process, so that freed memory is returned to the system."""
    libc = ctypes.CDLL(None)
    for parameter, name in ((-3, "MMAP_THRESHOLD_"), (-1, "TRIM_THRESHOLD_"), (-8, "ARENA_MAX")):
        assert libc.mallopt(parameter, int(MALLOC[f"MALLOC_{name}"])) == 1


def main(out: Path, config: dict[str, Any], lengths: tuple[int, int, int, int], prompts: int, rates: bool) -> None:
    faulthandler.dump_traceback_later(280, exit=True)  # a hang says where
    fix_malloc()
    if "deepspeed" in config["trainer"]:
        deepspeed_on_gloo()
    world = init_world("cpu", timeout=250)
    parsed, small = parse_config(config), parse_config(config)
    assert parsed.model.random_init and small.model.random_init
    small.model.random_init |= TINY
    warm = learner(small, world)
    warm.update(prompt_batches(WARM_UP, 1, TINY["vocab_size"]))  # libraries have finished lazy loading
    del warm
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    baseline = resident_bytes("VmRSS")
    subject, vocab = learner(parsed, world), parsed.model.random_init["vocab_size"]
    subject.update(prompt_batches(WARM_UP, 1, vocab))  # AdamW has its states from here on
    release_memory()  # memory that the head keeps counts as the update's
    all_batches = enumerate(prompt_batches(lengths, prompts, vocab))
    data = [batch for i, batch in all_batches if world.owner_of(i, prompts) == world.rank]
    found = [_rates(parsed)] if rates else []
    with PeakMemory(torch.device("cpu")) as memory:
        result = subject.update(data)
    found += [_rates(parsed)] if rates else []
    assert baseline is not None
    if world.is_main:
        out.write_text(json.dumps(report(memory, baseline, result, found)))
    if world.size > 1:
        world.any(False, "the end")  # waits until every rank is here
        os._exit(0)  # closing the connections of several processes is not measured


def report(memory: PeakMemory, baseline: int, result: UpdateResult, rates: list[dict[str, Any]]) -> dict[str, Any]:
    assert memory.before is not None and memory.bytes is not None
    return {
        "peak": memory.before + memory.bytes - baseline,
        "beyond": memory.bytes,  # memory held before the update
        "seconds": sum(result.seconds.values()),
        "rates": rates,
        "tokens": result.tokens,
        "packs": result.packs,
        "flops": result.flops,
    }


def _rates(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(hardware.measured(architecture(config.model), torch.float32, 16384))


def learner(config: Config, world: World) -> Learner:
    torch.manual_seed(0)
    assert config.model.random_init is not None
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.model.random_init), dtype=torch.float32)
    if config.model.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if config.model.lora:
        lora.attach(model, config.model.lora, 0)
    autocast = precision(config, torch.device("cpu"))
    return Learner(
        model,
        config.trainer,
        make_algorithm(config.algorithm),
        total_updates=10,
        autocast=autocast,
        world=world,
        dtype=config.model.dtype,
    )


def prompt_batches(lengths: tuple[int, int, int, int], prompts: int, vocab: int) -> list[PromptBatch]:
    """Both contexts of every prompt, all rollout tokens and the whole trace supervised."""
    prompt, trace, response, rollouts = lengths
    rng = np.random.default_rng(0)
    made = []
    for _ in range(prompts):
        tree = TokenTree()
        x = tree.add(rng.integers(vocab, size=prompt))
        h = tree.add(rng.integers(vocab, size=trace), x)
        scored = [_scored(h, LossContext.EXPERT, None)]
        for context, parent in ((LossContext.PROMPT, x), (LossContext.TRACE, h)):
            for k in range(rollouts):
                node = tree.add(rng.integers(vocab, size=response), parent)
                scored.append(_scored(node, context, k))
        made.append(PromptBatch(None, "blend", [tree], scored))  # type: ignore[arg-type]
    return made


def _scored(node: Node, context: LossContext, rollout: int | None) -> ScoredTokens:
    n = len(node.ids)
    index, component = np.arange(n), np.zeros(n, np.int64)
    if rollout is None:
        return ScoredTokens.of_expert(node, prompt=0, index=index, component=component, weight=np.full(n, 1e-4))
    return ScoredTokens.of_rollout(
        node, context, prompt=0, rollout=rollout, index=index, component=component,
        advantage=np.full(n, 1.0 if context == LossContext.TRACE else -1.0, np.float32), weight=1e-4,
        sampler_logprob=np.full(n, np.nan, np.float32),
    )  # fmt: skip
