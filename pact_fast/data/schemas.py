"""JSON schemas of tools, as far as reading data needs them: null values and parameters written without a schema."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

# Keywords of a JSON schema of type object. Without any of them, `parameters` maps the names of arguments to schemas.
_KEYWORDS = frozenset((
    "type", "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
    "maxProperties", "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "$ref",
    "$defs", "$schema", "$id", "$comment", "definitions", "anyOf", "oneOf", "allOf", "not", "if", "then", "else",
    "enum", "const", "default", "description", "title", "examples", "nullable", "strict",
))  # fmt: skip


def drop_nulls(value: Any, keep: str | None = None) -> Any:
    """The value without null entries of objects: exporters give every object the keys of all others.

    `keep`: a key whose null is meant, such as `default` in a schema that was written as text.
    """
    if isinstance(value, dict):
        return {key: drop_nulls(item, keep) for key, item in value.items() if item is not None or key == keep}
    if isinstance(value, list):
        return [drop_nulls(item, keep) for item in value]
    return value


def accepts_null(schema: Mapping[str, Any]) -> bool:
    """Whether null fits the schema: `nullable` (OpenAPI, transformers), or null among its types or alternatives."""
    declared = schema.get("type")
    if schema.get("nullable") is True or declared in ("null", "none"):
        return True
    if isinstance(declared, list) and any(one in ("null", "none", None) for one in declared):
        return True
    if isinstance(schema.get("enum"), list) and None in schema["enum"]:
        return True
    alternatives = [schema.get(key) for key in ("anyOf", "oneOf")]
    return any(
        isinstance(one, Mapping) and accepts_null(one)
        for listed in alternatives
        if isinstance(listed, list)
        for one in listed
    )


def clean_arguments(value: Any, schema: Any) -> Any:
    """The arguments of a call without padding: null stays only where the schema requires the argument and accepts null.

    `schema`: of the value; anything but an object: none is known, and no null stays.
    """
    schema = schema if isinstance(schema, Mapping) else {}
    if isinstance(value, list):
        return [clean_arguments(item, schema.get("items")) for item in value]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties") if isinstance(schema.get("properties"), Mapping) else {}
    required = schema.get("required") if isinstance(schema.get("required"), list) else []
    clean = {}
    for name, item in value.items():
        of_item = properties.get(name)
        if item is not None:
            clean[name] = clean_arguments(item, of_item)
        elif name in required and isinstance(of_item, Mapping) and accepts_null(of_item):
            clean[name] = None
    return clean


def object_schema(parameters: dict[str, Any]) -> dict[str, Any]:
    """`parameters` as a JSON schema of type object; {name: schema} becomes its properties.

    Raises ValueError if a keyword is misspelt, so that the arguments would be lost.
    """
    if not parameters:
        return {"type": "object", "properties": {}}
    if not _KEYWORDS & parameters.keys() and all(isinstance(item, dict) for item in parameters.values()):
        return {"type": "object", "properties": parameters}
    for key in parameters.keys() - _KEYWORDS:
        close = difflib.get_close_matches(str(key), ("properties", "required"), n=1, cutoff=0.8)
        if close and close[0] not in parameters:
            raise ValueError(f"'parameters' has the unknown key {str(key)[:40]!r}; did you mean '{close[0]}'?")
    return parameters
