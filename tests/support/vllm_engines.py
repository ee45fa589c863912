"""A small policy that makes tool calls, and helpers shared by vLLM tests. Real vLLM; no GPU needed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pact_fast.chat.rendering import ChatRenderer, make_renderer
from pact_fast.config import Config, load_config
from pact_fast.config.filters import UNFILTERED
from pact_fast.data.sources import TaskSource
from pact_fast.envs.registry import EnvironmentFactory, make_tasks
from pact_fast.errors import EngineError
from pact_fast.model.build import make_model
from pact_fast.model.filters import filtered
from pact_fast.model.tokenizer import make_tokenizer
from pact_fast.model.weights import WeightMismatch
from pact_fast.rollout.agent import AgentLoop
from pact_fast.rollout.engine import Request
from pact_fast.rollout.vllm import process
from pact_fast.rollout.vllm.colocated import WORKER_EXTENSION
from pact_fast.train.pretrain import pretrain

SETTINGS = [
    "device=cpu",
    "rollout.engine=vllm",
    "rollout.engine_timeout=60",
    "pretrain.steps=60",
    "pretrain.batch_size=8",
    "model.random_init.num_hidden_layers=2",
    "model.random_init.hidden_size=64",
    "model.random_init.intermediate_size=128",
]


@dataclasses.dataclass
class Policy:
    config: Config
    tasks: TaskSource
    renderer: ChatRenderer
    model: torch.nn.Module

    def loop(self, engine) -> AgentLoop:
        return AgentLoop(engine, self.renderer, EnvironmentFactory(self.config), self.config.rollout)


def make_policy(*settings: str, trained: bool = True) -> Policy:
    config = load_config("quickstart", [*SETTINGS, *settings])
    tasks = make_tasks(config)
    tokenizer = make_tokenizer(config.model, tasks)
    renderer = make_renderer(config.model, tokenizer)
    model = make_model(config, tokenizer)
    if trained:
        pretrain(config, model, renderer, tasks, lambda step, loss: None)
    return Policy(config, tasks, renderer, model)


@contextlib.contextmanager
def running_server(policy: Policy, folder: Path, *flags: str, extension: str = WORKER_EXTENSION) -> Iterator[str]:
    """The URL of a stock `vllm serve` with the policy's first weights."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    policy.model.config.architectures = [type(policy.model).__name__]
    policy.model.save_pretrained(folder / "model")
    policy.renderer.tokenizer.save_pretrained(folder / "model")
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model"), "--port", str(port),
        "--dtype", "float32", "--host", "127.0.0.1", "--max-model-len", "640", "--enforce-eager",
        "--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048", "--logprobs-mode", "processed_logprobs",
        "--generation-config", "vllm", "--worker-extension-cls", extension, *flags,
    ]  # fmt: skip
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with (folder / "server.log").open("wb") as log:
        server = process.launch(command, environment, log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def perturb(model: torch.nn.Module, size: float = 0.01) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=size)


def prompts(vocab: int, count: int = 8, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, 20 + 5 * i) for i in range(count)]


def sample(engine, contexts: list[np.ndarray], tokens: int, key: int, temperature: float = 0.9, filters=UNFILTERED):
    """One turn after each context."""
    for i, ids in enumerate(contexts):
        engine.submit(Request(i, ids, tokens, (key, i), temperature, filters))
    done = []
    while len(done) < len(contexts):
        done += engine.step()
    for completion in done:
        engine.close(completion.session)
    return sorted(done, key=lambda completion: completion.session)


def caught(engine, model, match: str) -> None:
    """An update whose fault is seen, after which nothing can be sampled."""
    with pytest.raises(WeightMismatch, match=match):
        engine.update_weights(model, 102)
    with pytest.raises(EngineError, match="no weights yet"):
        engine.submit(Request(0, np.arange(5), 4))


@torch.no_grad()
def largest_gap(model, contexts, completions, temperature: float = 0.9, filters=UNFILTERED) -> float:
    """max |engine's log-prob − the model's own| over all sampled tokens; infinite if the filters do not keep one."""
    worst = 0.0
    model.set_attn_implementation("sdpa")  # trees and the embedded engine set their own
    for ids, completion in zip(contexts, completions, strict=True):
        full = torch.tensor(np.concatenate([ids, completion.ids]))[None]
        logits = model(full).logits[0, len(ids) - 1 : -1].float() / (temperature or 1.0)
        own = filtered(logits, filters).log_softmax(-1).gather(1, full[0, len(ids) :, None])[:, 0]
        worst = max(worst, float((own - torch.tensor(completion.logprobs)).abs().max()))
    return worst
