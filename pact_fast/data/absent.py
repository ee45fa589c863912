"""Values that stand for "no value" in data rows, and reference answers as text."""

from __future__ import annotations

import math
from typing import Any


def is_absent(value: Any) -> bool:
    """Whether a value of a row stands for "none": null, NaN, text without a visible character, or the JSON text `null`.

    pandas writes NaN for a missing value, CSV files an empty text, and `json.dumps(None)` the text `null`.
    """
    if value is None:
        return True
    if isinstance(value, str):
        # zero-width characters (categories Cf and Cc, such as a byte-order mark) are not printable
        return value.strip() == "null" or not any(c.isprintable() and not c.isspace() for c in value)
    return isinstance(value, float) and math.isnan(value)


def answer_text(value: str | int | float | None) -> str | None:
    """A reference answer as text; None if it is absent. A whole number has no decimals: 42.0 becomes "42"."""
    if value is None or is_absent(value):
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value)
