"""Limits of the cost of one call. A call above a limit gets an error text; ground-truth calls stay far below."""

from __future__ import annotations

import math
from typing import Any

MAX_TEXT = 100_000  # characters of all texts of a call
MAX_ITEMS = 10_000  # values in lists and dicts of a call
MAX_DIGITS = 4300  # of an integer: more cannot be printed (Python's own limit)
MAX_PRECISION = 1000  # decimal digits of mathematical functions
MAX_NODES = 20_000  # files and folders of a file system, by path; more arise by copying folders into each other only
DIGITS_ERROR = (
    "Exceeds the limit (4300 digits) for integer string conversion; "
    "use sys.set_int_max_str_digits() to increase the limit"
)


def refusal(name: str, arguments: dict[str, Any]) -> str | None:
    """The reason why a call is not run, or None. Whole-number powers that cannot be printed get Python's own text."""
    text, items = _size(arguments)
    if text > MAX_TEXT:
        return f"the arguments have more than {MAX_TEXT:,} characters"
    if items > MAX_ITEMS:
        return f"the arguments have more than {MAX_ITEMS:,} values"
    if _too_long(arguments):
        return DIGITS_ERROR
    if name == "power" and _power_digits(arguments) > MAX_DIGITS:
        return DIGITS_ERROR
    for key in ("precision", "decimal_places"):
        value = arguments.get(key)
        if isinstance(value, int | float) and not abs(value) <= MAX_PRECISION:
            return f"{key} is beyond ±{MAX_PRECISION}"
    return None


def count_nodes(root: Any, limit: int = MAX_NODES) -> int:
    """Files and folders below a directory, by path (a folder in two places counts twice); stops above `limit`."""
    count, pending = 0, [root]
    while pending and count <= limit:
        folder = pending.pop()
        for item in getattr(folder, "contents", {}).values():
            count += 1
            if hasattr(item, "contents"):
                pending.append(item)
            if count > limit:
                break
    return count


def _size(value: Any) -> tuple[int, int]:
    """(characters, values) inside JSON data; counting stops beyond a limit."""
    text = items = 0
    pending = [value]
    while pending and items <= MAX_ITEMS:
        item = pending.pop()
        items += 1
        if isinstance(item, str):
            text += len(item)
        elif isinstance(item, dict):
            text += sum(len(key) for key in item if isinstance(key, str))
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item[: MAX_ITEMS + 1]
    return text, items


def _too_long(arguments: dict[str, Any]) -> bool:
    pending: list[Any] = [arguments]
    while pending:
        item = pending.pop()
        if isinstance(item, int) and item.bit_length() > MAX_DIGITS * 3.3219:
            return True
        if isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
    return False


def _power_digits(arguments: dict[str, Any]) -> float:
    """Decimal digits of base ** exponent, as far as it would be an integer."""
    base, exponent = arguments.get("base"), arguments.get("exponent")
    if not isinstance(base, int) or not isinstance(exponent, int) or exponent <= 0 or abs(base) < 2:
        return 0
    digits = math.log10(abs(base)) if abs(base) < 10**300 else base.bit_length() * math.log10(2)
    return min(exponent, 10**9) * digits
