"""Writes the page of all settings: `python -m pact_fast.config.docs > docs/configuration.md`."""

from __future__ import annotations

import inspect
import json
import sys
import types
import typing
from typing import Any, Literal

from pydantic.fields import FieldInfo

from pact_fast.config import Config, Section, section_of

INTRODUCTION = """\
# Configuration

<!-- Made by `python -m pact_fast.config.docs > docs/configuration.md`. Edit pact_fast/config/schema.py, not this page. -->

A run is described by one YAML file of the settings below; the shipped ones are called recipes. On the command line, any
of them can be replaced by its dotted key and a YAML value:

    pact-fast train quickstart trainer.max_steps=20 algorithm.anchor.mode=blend

An unknown key is an error that names the nearest known one. What is not given has the default shown here; `config.yaml`
in the run directory holds the settings that a run really had.

Names are TRL's where the meaning is the same. "Method" is [the method](method.md).
"""

NAMES = {str: "text", int: "integer", float: "number", bool: "true or false"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def configuration_page() -> str:
    """The page as Markdown: one table for each section."""
    return "\n".join([INTRODUCTION, *_section(Config, "")])


def _section(section: type[Section], prefix: str) -> list[str]:
    """The section's table, then those of the sections inside it."""
    heading = f"`{prefix.rstrip('.')}`" if prefix else "Top level"
    table = [
        f"## {heading}\n",
        f"{inspect.getdoc(section)}\n",
        "| key | value | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    inner: list[str] = []
    for name, field in section.model_fields.items():
        key = prefix + name
        nested = section_of(field.annotation)
        if nested is None:
            table.append(_row(f"`{key}`", _value(field), _default(field), field.description or ""))
            continue
        inner += _section(nested, f"{key}.")
        if field.default is None:  # otherwise the section's own keys say all
            table.append(_row(f"`{key}`", "section or null", "`null`", field.description or ""))
    return [*table, "", *inner]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(field: FieldInfo) -> str:
    """What may stand there: the words that are allowed, or a type with its bounds."""
    bounds = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in BOUNDS.items()
        if hasattr(limit, name)
    ]
    union = typing.get_origin(field.annotation) in (types.UnionType, typing.Union)
    parts = typing.get_args(field.annotation) if union else (field.annotation,)
    text = " or ".join(_type(part) for part in parts if part is not types.NoneType)
    return " ".join([text, ", ".join(bounds)]).rstrip() + (" or null" if types.NoneType in parts else "")


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    return "mapping" if origin is dict else NAMES[annotation]


def _default(field: FieldInfo) -> str:
    return f"`{json.dumps(field.get_default(call_default_factory=True))}`"


if __name__ == "__main__":
    sys.stdout.write(configuration_page())
