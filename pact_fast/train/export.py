"""`pact-fast export`: write a run's newest model as one Hugging Face folder, adapters merged into the weights."""

from __future__ import annotations

from pathlib import Path

from pact_fast.config import load_config
from pact_fast.envs.registry import make_tasks
from pact_fast.errors import PactError
from pact_fast.files import atomic_save_pretrained
from pact_fast.model import lora
from pact_fast.model.build import make_policy
from pact_fast.model.tokenizer import make_tokenizer
from pact_fast.train.checkpoint import run_weights


def export(run: Path, out: Path) -> Path:
    """Write weights (float32), configuration and tokenizer to the new folder `out`. Returns it.

    Raises:
        PactError: `run` is not a run directory or has no checkpoint, or `out` exists.
    """
    if not (run / "config.yaml").exists():
        raise PactError(f"{run} is not a run directory: it has no config.yaml")
    if out.exists():
        raise PactError(f"{out} exists already; name a new folder")
    base, checkpoint = run_weights(run)
    if checkpoint is None:
        raise PactError(f"{run} has no complete checkpoint yet; wait for the first one (trainer.save_steps)")
    config = load_config(str(run / "config.yaml"))
    tokenizer = make_tokenizer(config.model, make_tasks(config), run / "tokenizer")
    model = make_policy(config, tokenizer, base=base, checkpoint=checkpoint)
    lora.merge(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_save_pretrained([model, tokenizer], out)
    return out
