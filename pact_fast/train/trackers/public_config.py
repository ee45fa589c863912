"""The settings of a run as they may leave the machine: without secrets."""

from __future__ import annotations

import re
from typing import Any

from pact_fast.config import Config

HIDDEN = "(hidden)"
_SECRET_WORDS = frozenset((
    "key", "apikey", "token", "secret", "password", "passwd", "credential", "credentials", "auth", "authorization", "bearer",
))  # fmt: skip
_TOKEN = re.compile(r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|AKIA|xox[abp]-)[A-Za-z0-9_-]{12,}")
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"([?&][^=&\s]*(?:key|token|secret|password|auth)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def public_config(config: Config) -> dict[str, Any]:
    """The settings as JSON data, with `(hidden)` in place of secrets.

    A secret is a text under a key such as `api_key` or `hf_token` in a free mapping (`env.args`, `algorithm.args`, …), a
    text in the form of a well-known access token, a user in a URL, or a key in its query.
    """
    return {key: _public(value, "") for key, value in config.model_dump(mode="json").items()}


def _public(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _public(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_public(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if _SECRET_WORDS & set(_words(key)):
        return HIDDEN
    return _QUERY.sub(rf"\1{HIDDEN}", _USER_IN_URL.sub("", _TOKEN.sub(HIDDEN, value)))


def _words(key: str) -> list[str]:
    """The words of `apiKey`, `api_key`, `api-key`, in lower case."""
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())
