"""Tiny runs of PACT on any decoder of tests/support/models.py: two steps of one prompt, on both contexts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.support.models import DECODERS, SHAPE
from tests.support.runs import TINY_RUN

KINDS = {"qwen3_5_text": "linear_attention", "gpt_oss": "sliding_attention", "gemma3_text": "sliding_attention"}
"""Decoders of these runs, and their features that the embedded engine does not support."""
REWARD = """
def short(completions, **kwargs):
    return [-float(len(messages[-1]["content"])) for messages in completions]
"""
SETTINGS = [
    "algorithm.name=pact", "algorithm.anchor.mode=blend", "algorithm.sft.coef=1.0", "trainer.max_steps=2",
    "trainer.prompts_per_step=1", "trainer.eval_tasks=1", "trainer.log_completions=0", "trainer.learning_rate=1e-3",
    "trainer.report_to=none", "rollout.num_generations=3", "rollout.max_turn_tokens=5",
]  # fmt: skip


def recipe(folder: Path, kind: str, **changes: Any) -> list[str]:
    """Recipe file and settings; rewards differ from rollout to rollout, so that the policy loss has a gradient, too.

    `changes` are made to the model's configuration.
    """
    (folder / "rewards.py").write_text(REWARD)
    fixed = {"max_position_embeddings": 1024, "initializer_range": 0.3}
    model = {"model_type": kind, **SHAPE, **DECODERS[kind], **fixed, **changes}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(TINY_RUN | {"model": {**TINY_RUN["model"], "random_init": model}}))
    return [str(file), *SETTINGS, f"algorithm.reward.functions=[{folder / 'rewards.py'}:short]"]
