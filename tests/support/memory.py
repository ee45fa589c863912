"""Peak of the memory that torch allocates, including allocations inside our own operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM

from pact_fast.tree import TokenTree, pack, tree_forward


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of CPU tensors that `run` holds at once beyond those that exist already."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )  # fmt: skip
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def decoder_step(dtype: torch.dtype) -> Callable[[], None]:
    """One gradient pass of a small Qwen3 in which activations decide; it has run once."""
    config = Qwen3Config(
        vocab_size=97, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(dtype)
    tree = TokenTree()
    root = tree.add([1] * 300)
    for _ in range(3):
        tree.add([2] * 100, root)
    (batch,) = pack([tree], max_tokens=1000)

    def run() -> None:
        tree_forward(model, batch).sum().backward()
        model.zero_grad()

    run()
    return run
