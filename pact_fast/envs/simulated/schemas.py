"""JSON Schema checks of simulated calls and outputs, by the package jsonschema. Nothing is fetched."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from typing import Any

from pact_fast.errors import PactError
from pact_fast.text import short

# Keywords that are checked. Others are refused when a row is read: `$ref` could name an address, and `pattern` could be an
# expression that takes for ever.
KEYWORDS = frozenset(
    ("type", "properties", "required", "additionalProperties", "items", "enum", "const", "minimum", "maximum")
) | frozenset(("exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems", "uniqueItems"))
NOTES = frozenset(("title", "description", "default", "examples"))
TYPES = frozenset(("string", "integer", "number", "boolean", "array", "object", "null"))
MAX_DEPTH = 16


def unsupported(schema: Any) -> str | None:
    """The reason why a schema is not one that can be checked, or None: only KEYWORDS, no unknown type, bounded depth."""
    problem = not_json(schema)
    if problem is not None:
        return f"is no JSON schema: {problem}"
    return _unsupported(json.dumps(schema, sort_keys=True))


@functools.lru_cache(maxsize=4096)
def _unsupported(text: str) -> str | None:
    schema = json.loads(text)
    return _problem(schema, 0) or _malformed(schema)


def _problem(schema: Any, depth: int) -> str | None:
    if depth > MAX_DEPTH:
        return f"is nested deeper than {MAX_DEPTH} levels"
    if not isinstance(schema, dict):
        return f"holds {short(schema)} where a schema must stand"
    unknown = sorted(map(str, schema.keys() - KEYWORDS - NOTES))
    if unknown:
        return f"uses the keyword {short(unknown[0])}"
    declared = schema.get("type")
    for name in declared if isinstance(declared, list) else [declared] if "type" in schema else []:
        if not isinstance(name, str) or name not in TYPES:
            return f"has the unknown type {short(name)}"
    inner = schema.get("properties", {})
    if not isinstance(inner, dict):
        return "has 'properties' that are no object"
    extra = schema.get("additionalProperties", True)
    nested = [
        *inner.values(),
        *([schema["items"]] if "items" in schema else []),
        *([] if isinstance(extra, bool) else [extra]),
    ]
    return next((p for p in (_problem(one, depth + 1) for one in nested) if p), None)


def _malformed(schema: dict[str, Any]) -> str | None:
    try:
        _jsonschema().Draft202012Validator.check_schema(schema)
    except _jsonschema().SchemaError as error:
        return f"is no JSON schema ({short(error.message)})"
    return None


def schema_error(value: Any, schema: dict[str, Any]) -> str | None:
    """The reason why `value` does not fit `schema`, or None. The text names places and rules and repeats no value."""
    if (problem := not_json(value)) is not None:
        return problem
    errors = sorted(_validator(json.dumps(schema, sort_keys=True)).iter_errors(value), key=_order)
    return _message(errors[0]) if errors else None


def not_json(value: Any) -> str | None:
    """The reason why a value is not JSON data that can be written as UTF-8, or None."""
    for depth, item in _walk(value):
        if depth > MAX_DEPTH:
            return f"nested deeper than {MAX_DEPTH} levels"
        if isinstance(item, float) and not math.isfinite(item):
            return "a number is not finite"
        if not isinstance(item, str | int | float | bool | list | dict | type(None)):
            return f"a {type(item).__name__} is not JSON"
        if isinstance(item, int) and item.bit_length() > 1024:
            return "a number is too large"
        if isinstance(item, dict) and not all(isinstance(key, str) for key in item):
            return "a key is not text"
        if isinstance(item, str) and not _is_text(item):
            return "a text holds NUL or half of a surrogate pair"
    return None


def _walk(value: Any) -> Iterator[tuple[int, Any]]:
    pending = [(0, value)]
    while pending:
        depth, item = pending.pop()
        yield depth, item
        if depth > MAX_DEPTH:
            continue
        if isinstance(item, dict):
            pending += [(depth + 1, one) for pair in item.items() for one in pair]
        elif isinstance(item, list):
            pending += [(depth + 1, one) for one in item]


def _is_text(text: str) -> bool:
    if "\0" in text:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _order(error: Any) -> tuple[list[str], list[str]]:
    return [str(part) for part in error.absolute_path], [str(part) for part in error.absolute_schema_path]


def _message(error: Any) -> str:
    path = ".".join(short(part).strip("'") if isinstance(part, str) else str(part) for part in error.absolute_path)
    where = f"{path}: " if path else ""
    rule, wanted = error.validator, error.validator_value
    if rule == "type":
        return f"{where}must be {' or '.join(wanted) if isinstance(wanted, list) else wanted}"
    if rule == "required":
        missing = sorted(set(map(str, wanted)) - set(error.instance))
        return f"{where}missing {', '.join(missing[:5])}"
    if rule == "additionalProperties":
        known = ", ".join(map(str, error.schema.get("properties", {}))) or "none"
        return f"{where}unknown field; known: {known[:200]}"
    return f"{where}must fit {rule} {json.dumps(wanted, ensure_ascii=False)[:120]}"


@functools.lru_cache(maxsize=4096)
def _validator(schema: str) -> Any:
    return _jsonschema().Draft202012Validator(json.loads(schema), registry=_registry())


@functools.lru_cache(maxsize=1)
def _registry() -> Any:
    """Without any schema of others: a reference is an error, and nothing is fetched."""
    _jsonschema()
    from referencing import Registry

    return Registry()


@functools.lru_cache(maxsize=1)
def _jsonschema() -> Any:
    try:
        import jsonschema
    except ImportError:
        raise PactError("simulated tools are checked by the package jsonschema; pip install 'pact-fast[mtr]'") from None
    return jsonschema
