"""The option --llm of commands that ask a language model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pact_fast.llm import LLMConfig


def add_llm(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add --llm, which may be given several times: a YAML file, or one setting each."""
    parser.add_argument(
        "--llm", metavar="FILE|KEY=VALUE", action="append", default=[],
        help=f"{help_text}: a YAML file, or one setting each (model, base_url, api_key_env, …; docs/llm.md)",
    )  # fmt: skip


def llm_config(items: list[str], out: Path) -> LLMConfig:
    """Merge the settings given by --llm; later ones override earlier ones. `cache_dir` is `out/answers` by default.

    Raises:
        PactError: A file cannot be read, or a setting is wrong.
    """
    from pact_fast.config.load import read_settings
    from pact_fast.llm import LLMConfig

    values: dict[str, Any] = {"cache_dir": str(out / "answers")}
    for item in items:
        is_file = "=" not in item and Path(item).suffix in (".yaml", ".yml")
        values |= read_settings(item) if is_file else _setting(item)
    return LLMConfig.read(values, "--llm")


def _setting(item: str) -> dict[str, Any]:
    import yaml

    from pact_fast.errors import PactError

    key, given, value = item.partition("=")
    if not given:  # the text may be a key of an endpoint: not shown
        raise PactError("--llm: write a key and a value, for example model=NAME, or name a .yaml file")
    try:
        return {key: yaml.safe_load(value)}
    except yaml.YAMLError:
        raise PactError(f"--llm {key}: the value is not YAML") from None
