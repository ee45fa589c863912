"""The token budget of packs: trainer.max_tokens_per_pack, estimated where it is null, and lowered after out of memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pact_fast.config import Config
from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.estimate.memory import fitting_pack_tokens
from pact_fast.files import write_text
from pact_fast.model.device import free_memory

FILE = (
    "max_tokens_per_pack"  # in the run directory: upper bound of the budget, after an earlier process ran out of memory
)


def with_pack_budget(
    config: Config, run: Path, world: World, device: torch.device, note: Callable[[str], None]
) -> Config:
    """The configuration with a number for trainer.max_tokens_per_pack. All ranks call it and get the same number.

    Args:
        config: The run's configuration; null is replaced by the estimate that fits into the free memory.
        run: The run directory. A budget that ran out of memory before is not tried again.
        world: All ranks.
        device: This rank's device.
        note: Tells the user about an estimated budget.
    """
    file, budget = run / FILE, config.trainer.max_tokens_per_pack
    if file.exists():
        try:
            limit = int(file.read_text(encoding="utf-8"))
        except ValueError:
            raise PactError(f"{file} does not hold a number of tokens; delete it") from None
        budget = min(limit, budget or limit)
    if budget is None:
        local = fitting_pack_tokens(config, world.size, device.type, free_memory(device))
        budget = min(world.all_gather(local, "the size of packs"))
        note(f"packs have at most {budget} tokens (trainer.max_tokens_per_pack=null)")
    trainer = config.trainer.model_copy(update={"max_tokens_per_pack": budget})
    return config.model_copy(update={"trainer": trainer})


def lower_pack_budget(run: Path, tokens: int) -> None:
    """Remember a lower budget for the process that resumes this run."""
    write_text(run / FILE, str(tokens))
