"""Settings of a client for a language model. Importable without openai."""

from __future__ import annotations

import os
import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator

from pact_fast.config.schema import Section
from pact_fast.config.secrets import check_secrets
from pact_fast.errors import PactError

_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
SHORTEST_KEY = 8  # characters; a shorter one is a placeholder, and could not be told from ordinary text


class Price(Section):
    """Price of a model, in any currency per million tokens."""

    input: float = Field(0.0, ge=0, description="Of a million prompt tokens.")
    output: float = Field(0.0, ge=0, description="Of a million completion tokens.")


class LLMConfig(Section):
    """A language model behind an OpenAI-compatible endpoint, or in a vLLM server that is started for it (docs/llm.md)."""

    model: str = Field(description="Name of the model at the endpoint; without `base_url`, a folder or hub name.")
    base_url: str | None = Field(
        None, description="Endpoint (https://api.openai.com/v1); null: a vLLM server is started with `model`."
    )
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the endpoint's key; null: no key is sent."
    )
    vllm_args: dict[str, Any] = Field(
        default_factory=dict, description="Engine arguments of the vLLM server that is started (max_model_len, …)."
    )
    server_timeout: float = Field(240.0, gt=0, description="Seconds within which that server must start.")
    temperature: float | None = Field(0.7, ge=0, description="Sampling temperature; null: the server's default.")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus sampling; null: the server's default.")
    max_tokens: int = Field(2048, ge=1, description="Longest answer, in tokens.")
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="Name of that limit in requests; OpenAI's reasoning models want the second one."
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="Further fields of every request (top_k, chat_template_kwargs, …)."
    )
    structured_outputs: bool = Field(
        True,
        description="Send JSON schemas as `response_format`; false: for servers that refuse it. Answers are checked in "
        "either case.",
    )
    seed: int = Field(0, ge=0, description="Seeds of requests are derived from it and from the sample's index.")
    send_seed: bool = Field(True, description="Send seeds; false: for servers that refuse them.")
    timeout: float = Field(120.0, gt=0, description="Seconds per request.")
    total_timeout: float = Field(600.0, gt=0, description="Seconds per call: waiting, retries and repairs included.")
    max_retries: int = Field(6, ge=0, description="Retries of a request that has failed for a passing reason.")
    max_concurrency: int = Field(8, ge=1, description="Requests at a time.")
    max_answer_bytes: int = Field(8 << 20, ge=1024, description="Longest answer of the server, in bytes.")
    token_budget: int | None = Field(
        None,
        ge=1,
        description="Tokens of all answers together, cached ones included; no call that could exceed it begins.",
    )
    price: Price | None = Field(None, description="For the cost in the report.")
    cache_dir: str | None = Field(None, description="Folder of the answer cache; null: answers are not kept.")
    replay: bool = Field(False, description="Answer from the cache only; a missing answer is an error.")

    @classmethod
    def read(cls, values: dict[str, Any], name: str = "llm") -> LLMConfig:
        """Settings from plain data. PactError, one line without any value, that lists the first three problems."""
        try:
            check_secrets(values)
            return cls.model_validate(values)
        except PactError as error:
            raise PactError(f"{name}: {error}") from None
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, item['loc'])) or name}: {item['msg']}" for item in error.errors()[:3]]
        raise PactError(f"{name}: " + "; ".join(problems))

    @field_validator("base_url")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is not None and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).hostname):
            raise ValueError("it must be a URL with http:// or https://")
        return value

    @field_validator("api_key_env")
    @classmethod
    def _is_variable(cls, value: str | None) -> str | None:
        if value is not None and not _VARIABLE.fullmatch(value):  # the value may be the key itself, and is not shown
            raise ValueError(
                "it is not the name of an environment variable (OPENAI_API_KEY); write the key there, not here"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, values: Any) -> Any:
        if isinstance(values, dict):
            try:
                check_secrets({key: value for key, value in values.items() if isinstance(key, str)})
            except PactError as error:
                raise ValueError(str(error)) from None
        return values

    @model_validator(mode="after")
    def _consistent(self) -> LLMConfig:
        if self.replay and self.cache_dir is None:
            raise ValueError("replay=true needs cache_dir, the folder with the answers")
        return self

    def decisive(self) -> dict[str, Any]:
        """The settings that affect the answers, without those of endpoint, speed and cache."""
        names = {"model", "temperature", "top_p", "max_tokens", "extra_body", "seed"}
        return self.model_dump(include=names)

    def api_key(self) -> str | None:
        """The key, from the environment; None if the endpoint needs none. PactError if the variable is not set."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise PactError(
                f"the environment variable {self.api_key_env} is not set; it holds the key of {self.base_url}"
            )
        return key
