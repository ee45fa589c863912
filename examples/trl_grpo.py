"""TRL's GRPO trainer on these kernels: one pass over the logits, and a prompt computed once for all of its completions.

    pip install pact-fast trl
    python examples/trl_grpo.py Qwen/Qwen3-0.6B

Two lines are not TRL's own: the import and `install`.
"""

from __future__ import annotations

import sys
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from pact_fast.integrations.trl import install


def near_forty(completions: list[str], **_: Any) -> list[float]:
    """Completions of 40 characters are best."""
    return [-abs(40 - len(text)) / 40 for text in completions]


def main(model: str, **settings: Any) -> GRPOTrainer:
    prompts = Dataset.from_dict({"prompt": [f"The number after {n} is" for n in range(64)]})
    options = {"per_device_train_batch_size": 8, "num_generations": 8, "max_completion_length": 32, "max_steps": 10}
    trainer = GRPOTrainer(model, near_forty, GRPOConfig("trl_grpo", **options | settings), prompts)
    installed = install(trainer, "tree")
    print("served:", installed.served, "left to TRL:", installed.reasons)
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1])
