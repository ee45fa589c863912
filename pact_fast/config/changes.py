"""Settings that a resumed run may change, and the comparison with those that it was started with."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pact_fast.config.data_source import HUB, source_names
from pact_fast.config.load import load_config
from pact_fast.config.schema import Config
from pact_fast.errors import PactError
from pact_fast.text import SHOWN, short

# Key or section → may change when a run is resumed. Any other setting decides which data, weights or loss the earlier
# steps stand for, and must stay: with another value the run would be neither the old one nor a new one.
MAY_CHANGE = (
    # where it runs
    "output_dir", "resume", "device", "threads", "model.gradient_checkpointing",
    "trainer.deepspeed", "trainer.sequence_parallel_size", "trainer.max_tokens_per_pack", "trainer.share_prefixes",
    "trainer.merge_rollouts", "trainer.dist_timeout",
    # the engine and its placement; limits of prompts and time, which errors advise to raise
    "rollout.engine", "rollout.engine_timeout", "rollout.max_batch_size", "rollout.max_prompt_length",
    "rollout.tool_timeout", "rollout.trajectory_timeout", "rollout.vllm_mode", "rollout.vllm_server_base_url",
    "rollout.vllm_server_timeout", "rollout.vllm_gpu_memory_utilization", "rollout.vllm_tensor_parallel_size",
    "rollout.vllm_data_parallel_size", "rollout.vllm_enable_sleep_mode", "rollout.vllm_weight_transfer",
    "rollout.vllm_weights_dir", "rollout.verify_weights", "rollout.vllm_args",
    # where the model that plays the user is, and how it is asked
    "rollout.user_llm.base_url", "rollout.user_llm.api_key_env", "rollout.user_llm.vllm_args",
    "rollout.user_llm.server_timeout", "rollout.user_llm.timeout", "rollout.user_llm.total_timeout",
    "rollout.user_llm.max_retries", "rollout.user_llm.max_concurrency", "rollout.user_llm.token_budget",
    "rollout.user_llm.price", "rollout.user_llm.cache_dir", "rollout.user_llm.replay",
    # handling of bad rows, which in large files are found when they are drawn
    "data.on_bad_row",
    # code that is fixed or moved between two starts
    "algorithm.reward.functions",
    # the optimizer and the end of the run
    "trainer.max_steps", "trainer.learning_rate", "trainer.lr_scheduler_type", "trainer.warmup_steps",
    "trainer.weight_decay", "trainer.max_grad_norm", "trainer.max_skipped_updates", "trainer.max_off_policy_steps",
    # saving, evaluation and logging
    "trainer.save_steps", "trainer.save_minutes", "trainer.save_total_limit", "trainer.eval_steps", "trainer.eval_tasks",
    "trainer.log_completions", "trainer.save_rollouts", "trainer.keep_rollouts", "trainer.report_to",
)  # fmt: skip
DATA_FILES = ("data.train", "data.eval", "data.expert")  # a copy at another path is not a change


def check_resumed(config: Config, saved: Path) -> None:
    """Compare a configuration with that of the run which it resumes.

    Args:
        config: The new settings.
        saved: The run's config.yaml.

    Raises:
        PactError: A setting outside MAY_CHANGE differs; the message names key, old and new value. Or the file is missing.
    """
    if not saved.exists():
        raise PactError(
            f"{saved} is missing, so its settings cannot be compared with those of the run; restore the file"
        )
    changes = fixed_changes(load_config(str(saved)), config)
    if not changes:
        return
    named = ", ".join(f"{key} (was {_short(old)}, now {_short(new)})" for key, old, new in changes[:4])
    more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
    key, old, _ = changes[0]
    raise PactError(
        f"{saved.parent} cannot be resumed with other settings: {named}{more}; give the old values ({key}={_short(old)}), "
        "or start a new run in another output_dir="
    )


def fixed_changes(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of all settings that differ and may not change in a resumed run."""
    found = _differences(old.model_dump(), new.model_dump(), "")
    return [
        (key, before, after)
        for key, before, after in found
        if not any(f"{key}.".startswith(f"{free}.") for free in MAY_CHANGE)
        and not (key in DATA_FILES and _same_sources(source_names(before), source_names(after)))
    ]


def _same_sources(old: list[str], new: list[str]) -> bool:
    """Whether two lists of data sources hold the same rows in the same order."""
    return len(old) == len(new) > 0 and all(map(_same_source, old, new))


def _same_source(old: str, new: str) -> bool:
    """Whether a data file was copied or moved: equal content, or an equal name where the old one is gone.

    A dataset of the Hub is the same if repository, commit, config and split are.
    """
    if old == new:
        return True
    if old.startswith(HUB) or new.startswith(HUB):
        return False
    before, after = Path(old), Path(new)
    if not before.is_file():
        return before.name == after.name
    return after.is_file() and filecmp.cmp(before, after, shallow=False)


def _differences(old: Any, new: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Differing leaves of two nested mappings. A section that only one side has counts as one."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    elif old != new:
        yield key, old, new


def _short(value: Any) -> str:
    """A value as it is written on the command line, cut to 60 characters; the name of a dataset is needed whole."""
    if isinstance(value, str):
        text = value
    else:
        text = json.dumps(value) if value is None or isinstance(value, bool) else short(value)
    limit = 160 if text.startswith(HUB) else SHOWN
    return text if len(text) <= limit else text[: limit - 1] + "…"
