"""Validation of answers of a vLLM server. An unexpected answer is an EngineError, even one sent by a proxy."""

from __future__ import annotations

import math
from typing import Any

from pact_fast.errors import EngineError
from pact_fast.rollout.vllm.transport import TurnOutput, TurnRequest
from pact_fast.text import short


def read_completion(engine: str, response: Any, turn: TurnRequest) -> TurnOutput:
    """The turn in the response of the completions endpoint. Token ids in the vocabulary are checked by VllmEngine.

    Raises:
        EngineError: It has another shape or another context, or its ids are not integers, its log-probs not finite
            numbers, their counts differ, or there are more than were asked for.
    """
    choices = _field(engine, response, "choices", list)
    if len(choices) != 1:
        raise EngineError(engine, f"it answers {len(choices)} completions to a request for one")
    choice = choices[0]
    ids = _field(engine, choice, "token_ids", list)
    logprobs = _field(engine, _field(engine, choice, "logprobs", dict), "token_logprobs", list)
    if response.get("prompt_token_ids", choice.get("prompt_token_ids", turn.ids)) != turn.ids:
        raise EngineError(engine, "it reports another context than it was given")
    for token in ids:
        if type(token) is not int:
            raise EngineError(engine, f"{short(token)} came back as token id")
    for value in logprobs:
        if type(value) not in (int, float) or not _is_finite(value):
            raise EngineError(engine, f"a log-prob of {short(value)} came back")
    return TurnOutput(turn.key, ids, logprobs, _cached_tokens(engine, response, len(turn.ids)))


def read_served_model(engine: str, response: Any) -> str:
    """The name of the served model in the response of /v1/models. EngineError if it has another shape."""
    models = _field(engine, response, "data", list)
    if not models:
        raise EngineError(engine, "/v1/models names no model")
    return _field(engine, models[0], "id", str)


def read_results(engine: str, method: str, response: Any) -> list[Any]:
    """The workers' results in the response of /collective_rpc; none if the server reports none. EngineError as above."""
    if response is None:
        return []
    if not isinstance(response, dict) or not isinstance(response.get("results", []), list):
        raise EngineError(engine, f"its response to {method} has no list of 'results': {short(response)}")
    return response.get("results", [])


def read_reports(engine: str, results: list[Any]) -> list[dict[str, Any]]:
    """Reports of weights for `merge_reports`. EngineError if one is not {version, shards} or {error}."""
    for report in results:
        if not isinstance(report, dict):
            raise EngineError(engine, f"a worker reports its weights as {short(report)}")
        if "error" in report:
            continue
        if type(report.get("version")) is not int:
            raise EngineError(engine, f"a worker reports {short(report.get('version'))} as version of its weights")
        for shard in _field(engine, report, "shards", list):
            if not _is_shard(shard):
                raise EngineError(engine, f"a worker reports {short(shard)} as part of its weights")
    return results


def read_world_size(engine: str, response: Any) -> int:
    """The number of workers in the response of /get_world_size. EngineError if it has another shape."""
    size = response.get("world_size") if isinstance(response, dict) else None
    if type(size) is not int or size < 1:
        raise EngineError(engine, f"/get_world_size answers {short(size)}, which is not a number of workers")
    return size


def _field(engine: str, value: Any, name: str, kind: type) -> Any:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        got = short(found) if isinstance(value, dict) else f"{short(value)} instead of an object"
        raise EngineError(engine, f"its response has no {kind.__name__} '{name}' (but {got})")
    return found


def _is_shard(shard: Any) -> bool:
    """Whether a value is a WeightShard as JSON."""
    return (
        isinstance(shard, list)
        and len(shard) == 6
        and isinstance(shard[0], str)
        and all(type(number) is int for number in shard[1:])
    )


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of a float
        return False


def _cached_tokens(engine: str, response: dict[str, Any], context: int) -> int | None:
    """Tokens of the prompt that the server found in its prefix cache; None unless it reports them."""
    usage = response.get("usage") or {}
    details = (usage.get("prompt_tokens_details") or {}) if isinstance(usage, dict) else None
    if not isinstance(details, dict):
        raise EngineError(engine, f"it reports {short(response['usage'])} as usage")
    cached = details.get("cached_tokens")
    if details and cached is None:
        return 0
    if cached is not None and (type(cached) is not int or not 0 <= cached <= context):
        raise EngineError(engine, f"it reports {short(cached)} cached tokens of a context of {context}")
    return cached
