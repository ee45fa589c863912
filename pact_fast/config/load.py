"""Reads a configuration: a recipe or YAML file and `key=value` overrides. Errors name the key and the nearest known one."""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pact_fast.config.schema import Config, Section
from pact_fast.config.secrets import check_secrets
from pact_fast.config.settings_file import MAX_CHARACTERS, load_yaml
from pact_fast.errors import PactError
from pact_fast.text import SHOWN, short

RECIPES = Path(__file__).parent.parent / "recipes"


def load_config(source: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read and validate a configuration.

    Args:
        source: Name of a shipped recipe, or a YAML file.
        overrides: `key=value` settings with dotted keys and YAML values.

    Raises:
        PactError: A key or value is wrong; the message is one line with the cure.
    """
    path = _find(source)
    data = _read(path) or {}
    if not isinstance(data, dict):
        raise PactError(f"{path}: the file must hold a mapping of settings, found {type(data).__name__}")
    config = config_from(data, overrides, str(path))
    return config.model_copy(update={"output_dir": config.output_dir.replace("{recipe}", path.stem)})


def read_settings(source: str) -> dict[str, Any]:
    """The settings of a recipe or a YAML file as they stand there, not validated. PactError as `load_config`."""
    data = _read(_find(source)) or {}
    if not isinstance(data, dict):
        raise PactError(f"{source}: the file must hold a mapping of settings, found {type(data).__name__}")
    return data


def config_from(data: dict[str, Any], overrides: list[str] | tuple[str, ...] = (), name: str = "config") -> Config:
    """Validate a mapping, which `key=value` settings override in place. `name`: its source, for messages."""
    for override in overrides:
        _apply(data, override)
    return parse_config(data, name)


def parse_config(data: dict[str, Any], name: str = "config") -> Config:
    """Validate a mapping. `name`: its source, for messages. PactError lists the first three problems."""
    try:
        check_secrets(data)
    except PactError as error:
        raise PactError(f"{name}: {error}") from None
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise PactError(f"{name}: " + "; ".join(_explain(item) for item in error.errors()[:3])) from None


def recipes() -> dict[str, Path]:
    """Files of the shipped recipes by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All dotted keys of a section, with `prefix` in front."""
    keys: list[str] = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        section = section_of(info.annotation)
        if section:
            keys += known_keys(section, f"{prefix}{name}.")
    return keys


def section_of(annotation: Any) -> type[Section] | None:
    """The section class in an annotation such as `TrainerConfig` or `PretrainConfig | None`; None if there is none."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _read(path: Path) -> Any:
    """The value of a YAML file. PactError with the file's name."""
    try:
        if path.stat().st_size > 4 * MAX_CHARACTERS:  # before it is read
            raise PactError(
                f"has {path.stat().st_size:,} bytes; settings are at most {MAX_CHARACTERS:,} characters long"
            )
        return load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PactError(f"{path}: cannot read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise PactError(f"{path}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    except PactError as error:
        raise PactError(f"{path}: {error}") from None


def _find(source: str) -> Path:
    shipped = recipes()
    if source in shipped:
        return shipped[source]
    path = Path(source)
    with contextlib.suppress(OSError, ValueError):  # a name that is too long, or no name
        if path.is_file():
            return path
    close = difflib.get_close_matches(source, shipped, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"recipes: {', '.join(shipped) or 'none'}"
    raise PactError(f"no recipe and no file named {_cut(source)}; {hint} (`pact-fast recipes` lists them)")


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise PactError(f"{_cut(override)} is not a setting; write key=value, for example trainer.max_steps=10")
    try:
        value = load_yaml(text)
    except PactError as error:
        raise PactError(f"'{key}': the value {_cut(text)} {error}; quote it if it holds special characters") from None
    if isinstance(value, str):
        value = _number(value)
    *parents, leaf = key.split(".")
    node = data
    for parent in parents:
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    node[leaf] = value


def _number(text: str) -> Any:
    """The number that a string such as 1e-6 stands for (YAML 1.1 requires 1.0e-6), or the string."""
    try:
        return float(text)
    except ValueError:
        return text


def _explain(item: Any) -> str:
    """One pydantic error as text, with the nearest known key for an unknown one."""
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.5)
        leaf = difflib.get_close_matches(key.split(".")[-1], [k.split(".")[-1] for k in known_keys()], n=1, cutoff=0.75)
        if not close and leaf:
            close = [k for k in known_keys() if k.split(".")[-1] == leaf[0]][:1]
        return f"unknown key '{key}'" + (f"; did you mean '{close[0]}'?" if close else "; see docs/configuration.md")
    message = item["msg"].removeprefix("Value error, ")
    return f"'{key}': {message} (found {short(item['input'])})" if key else message


def _cut(text: str) -> str:
    """Text of the command line in quotes, cut to 60 characters."""
    return f"'{text}'" if len(text) <= SHOWN else f"'{text[:SHOWN]}…'"
