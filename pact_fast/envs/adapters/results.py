"""Conversion of return values of third-party code to the text of an observation."""

from __future__ import annotations

import json
from typing import Any

from pact_fast.errors import error_line

MAX_OUTPUT = 65_536  # characters, as in python_tools; rollout.max_observation_tokens applies afterwards


def result_text(result: Any) -> str:
    """A text as it is, a dict or list as JSON, None as "ok", anything else as `str`."""
    if isinstance(result, str):
        return result
    if result is None:
        return "ok"
    if isinstance(result, dict | list | tuple):
        return json.dumps(result, ensure_ascii=False, default=str)
    return str(result)


def failure(error: BaseException) -> str:
    """The observation of a tool that raised."""
    return f"error: {type(error).__name__}: {error_line(error)}"


def cut(text: str, limit: int = MAX_OUTPUT) -> str:
    """At most `limit` characters, and a note where there were more."""
    return text if len(text) <= limit else f"{text[:limit]}\n[cut: {len(text):,} characters]"
