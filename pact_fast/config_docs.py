"""Writes docs/configuration.md from the configuration models: `python -m pact_fast.config_docs > docs/configuration.md`."""

from __future__ import annotations

import json
import sys
import types
import typing
from typing import Any, Literal

from pydantic.fields import FieldInfo

from pact_fast.config import Config, Section, section_of

INTRODUCTION = """\
# Configuration

<!-- Made from pact_fast/config.py by `python -m pact_fast.config_docs > docs/configuration.md`. Edit the source, not this page. -->

A run is described by one YAML file, a recipe, of the settings below. Any of them can be replaced on the command line by its dotted
key and a YAML value: `pact-fast train quickstart trainer.max_steps=20 algorithm.anchor.mode=blend`. An unknown key is an error that names
the nearest known one. A setting that is not given has the default shown here; the run directory's `config.yaml` holds all of them.

Names are TRL's where the meaning is the same. "Method" is [the method](method.md).
"""

NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def configuration_page() -> str:
    """The page as Markdown: one table for each section."""
    parts = [INTRODUCTION, *_section(Config, "")]
    return "\n".join(parts)


def _section(section: type[Section], prefix: str) -> list[str]:
    """The section's table, then those of the sections inside it."""
    heading = f"`{prefix.rstrip('.')}`" if prefix else "Top level"
    lines = [
        f"## {heading}\n",
        f"{section.__doc__}\n",
        "| key | value | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    inner: list[str] = []
    for name, field in section.model_fields.items():
        nested = section_of(field.annotation)
        if nested:
            inner += _section(nested, f"{prefix}{name}.")
        else:
            cells = (f"`{prefix}{name}`", _value(field), _default(field), field.description or "")
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    optional = [
        name for name, field in section.model_fields.items() if section_of(field.annotation) and field.default is None
    ]
    lines += [f"\n`{prefix}{name}` is left out by default." for name in optional]
    return [*lines, "", *inner]


def _value(field: FieldInfo) -> str:
    """What may stand there: a type with its bounds, or the words that are allowed."""
    bounds = [
        f"{sign} {getattr(bound, name)}"
        for bound in field.metadata
        for name, sign in BOUNDS.items()
        if hasattr(bound, name)
    ]
    return " ".join([_type(field.annotation), ", ".join(bounds)]).strip()


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type(part) for part in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    return NAMES[annotation]


def _default(field: FieldInfo) -> str:
    return f"`{json.dumps(field.get_default(call_default_factory=True))}`"


if __name__ == "__main__":
    sys.stdout.write(configuration_page())
