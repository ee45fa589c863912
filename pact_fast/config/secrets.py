"""Secrets among settings, which are written to config.yaml and the report, shown in process lists and sent to trackers.

A file or command line with one is refused. Settings that code has made reach trackers without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pact_fast.errors import PactError

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = {
    *("password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey", "authorization"),
}
_KEY_OF = {"api", "access", "private", "secret", "auth", "ssh", "signing", "encryption"}  # … key
_TOKEN_OF = {
    "hf",
    "api",
    "access",
    "auth",
    "bearer",
    "secret",
    "hub",
    "wandb",
    "github",
    "refresh",
    "session",
}  # … token
_URL_PASSWORD = re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s@]*:[^/\s@]+@", re.IGNORECASE)
_URL_PARAMETER = re.compile(
    r"([?&](?:api_?key|access_?token|token|password|secret|sig(?:nature)?)=)[^&\s]+", re.IGNORECASE
)
HIDDEN = "(hidden)"
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[A-Z0-9]{16}"
    r"|xox[abpr]-[A-Za-z0-9-]{10,}|glpat-[\w-]{16,})"
)


def check_secrets(settings: dict[str, Any]) -> None:
    """PactError, without the value, for a setting that is a secret by its name, or holds one that can be recognised."""
    for key, name, value in _leaves(settings, ""):
        if isinstance(value, str) and _URL_PASSWORD.search(value):
            what = "has a password in its URL"
        elif isinstance(value, str) and (_TOKEN.search(value) or _URL_PARAMETER.search(value)):
            what = "holds an access token"
        elif _is_secret(name) and value not in (None, "", False, True):
            what = "is a secret"
        else:
            continue
        raise PactError(
            f"'{key}' {what}, and settings are written to config.yaml and the report; remove it, and set "
            f"{_variable(key)} in the environment"
        )


def without_secrets(value: Any, name: str = "") -> Any:
    """JSON data with `(hidden)` in place of every text that `check_secrets` refuses; a user in a URL is left out."""
    if isinstance(value, dict):
        return {key: without_secrets(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_secrets(inner, name) for inner in value]
    if not isinstance(value, str):
        return value
    if _is_secret(name):
        return HIDDEN
    shown = _URL_PASSWORD.sub(r"\1", _TOKEN.sub(HIDDEN, value))
    return _URL_PARAMETER.sub(rf"\1{HIDDEN}", shown)


def _leaves(value: Any, key: str, name: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted key, the last name in it, value) of everything that is not a mapping or list."""
    if isinstance(value, dict):
        for part, inner in value.items():
            yield from _leaves(inner, f"{key}.{part}" if key else str(part), str(part))
            if isinstance(part, str):
                yield key or "settings", "", part  # a URL may stand on the left
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _leaves(inner, key, name)
    else:
        yield key, name, value


def _is_secret(name: str) -> bool:
    """Whether the name of a setting says that its value is a secret: api_key, hfToken, but not eos_token or max_tokens."""
    words = [word.lower() for word in _WORDS.findall(name)]
    if _SECRET_WORDS.intersection(words):
        return True
    if not words:
        return False
    before = words[-2] if len(words) > 1 else ""
    last = words[-1]
    return (last in ("key", "keys") and before in _KEY_OF) or (last == "token" and (not before or before in _TOKEN_OF))


def _variable(key: str) -> str:
    """The environment variable that is read in the setting's place."""
    if key.startswith("rollout.vllm") and "hf" not in key.lower():
        return "VLLM_API_KEY"
    if key.startswith(("model", "data")) or "hf" in key.lower():
        return "HF_TOKEN"
    return f"{re.sub(r'[^A-Z0-9]+', '_', key.split('.')[-1].upper()) or 'a variable'} (which your code reads itself)"
