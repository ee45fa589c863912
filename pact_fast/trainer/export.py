"""`pact-fast export`: a run's newest model as one Hugging Face folder, adapters merged into the weights."""

from __future__ import annotations

from pathlib import Path

from pact_fast.config import load_config
from pact_fast.errors import PactError
from pact_fast.trainer import lora, setup
from pact_fast.trainer.inference import run_weights
from pact_fast.trainer.rundir import save_whole


def export(run: Path, out: Path) -> Path:
    """Write weights (float32), configuration and tokenizer to `out`, which appears when it is complete."""
    if not (run / "config.yaml").exists():
        raise PactError(f"{run} is no run directory: it has no config.yaml")
    if out.exists():
        raise PactError(f"{out} exists already; name a new folder")
    base, checkpoint = run_weights(run)
    if checkpoint is None:
        raise PactError(f"{run} has no complete checkpoint yet; wait for the first one (trainer.save_steps)")
    config = load_config(str(run / "config.yaml"))
    tokenizer = setup.make_tokenizer(config.model, setup.make_tasks(config), run / "tokenizer")
    model = setup.make_policy(config, tokenizer, base=base, checkpoint=checkpoint)
    lora.merge(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_whole([model, tokenizer], out)
    return out
