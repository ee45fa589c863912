"""Arguments of a call as a policy wrote them: bounded, and copied before foreign code gets them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MAX_CHARACTERS = 1_000_000  # of the arguments as JSON
MAX_DEPTH = 100  # levels of lists and objects, as in data rows


class BadCall(Exception):
    """A rejected call. The text is shown to the policy."""


def copy_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that shares nothing with `arguments`. BadCall names the problem if they are invalid."""
    if _depth(arguments) > MAX_DEPTH:
        raise BadCall(f"the arguments are nested more than {MAX_DEPTH} levels deep")
    try:
        text = json.dumps(arguments, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadCall("the arguments hold half of a surrogate pair, which is no text") from None
    except (TypeError, ValueError) as error:  # not JSON, or an integer with too many digits
        raise BadCall(f"the arguments are no JSON: {error}") from None
    if len(text) > MAX_CHARACTERS:
        raise BadCall(f"the arguments have {len(text):,} characters; at most {MAX_CHARACTERS:,} are allowed")
    return json.loads(text)


def known_arguments(name: str, arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`copy_arguments`, if all of them are declared and none is missing.

    Args:
        name: Of the tool, for messages.
        arguments: As the policy wrote them.
        parameters: JSON schema of an object with `properties` and `required`.

    Raises:
        BadCall: An argument is unknown or missing, or cannot be copied.
    """
    declared = parameters.get("properties") or {}
    unknown = [key for key in arguments if key not in declared]
    if unknown:
        raise BadCall(f"{name} takes no argument {unknown[0][:60]!r}; it takes: {', '.join(declared) or 'none'}")
    missing = [key for key in parameters.get("required") or () if key not in arguments]
    if missing:
        raise BadCall(f"{name} needs the argument {missing[0]!r}")
    return copy_arguments(arguments)


def _depth(value: Any) -> int:
    """Levels of lists and objects, without recursion; stops counting beyond MAX_DEPTH."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        inner = [v.values() if isinstance(v, Mapping) else v for v in level if isinstance(v, Mapping | list | tuple)]
        level = [item for items in inner for item in items]
        depth += bool(inner)
    return depth
