"""Segmentation of reasoning by a language model, with the rules of `chat/segments.py` as the fallback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pact_fast.data.types import ExpertTrace, Message
from pact_fast.llm import Completion, InvalidAnswer, LLMClient
from pact_fast.llm.request import Request

SCHEMA = {
    "type": "object",
    "properties": {"segments": {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}},
    "required": ["segments"],
    "additionalProperties": False,
}
PROMPT = (
    "Split the text into its steps of thought. A step is one complete thought: what is known, what is missing, what to do "
    "next. Copy the text exactly, in order, without leaving anything out; do not cut inside a sentence."
)
REPAIRS = 1


def segment_ends(reasoning: str, parts: Sequence[str]) -> tuple[int, ...] | None:
    """Ends of the parts in the reasoning, in characters, with the blanks after them; None unless they tile it."""
    ends: list[int] = []
    at = 0
    for part in parts:
        text = part.strip()
        if not text or not reasoning.startswith(text, at):
            return None
        at += len(text)
        while at < len(reasoning) and reasoning[at].isspace():
            at += 1
        ends.append(at)
    return tuple(ends) if at == len(reasoning) and ends else None


def with_model_segments(traces: Sequence[ExpertTrace], client: LLMClient) -> tuple[list[ExpertTrace], dict[str, int]]:
    """The traces with segments by a model, and how many reasonings were segmented by `model` and by `rules`.

    Raises:
        LLMError: Of the endpoint; an answer that cannot be used is left to the rules.
    """
    texts = list(dict.fromkeys(turn.reasoning for trace in traces for turn in trace.turns if turn.reasoning))
    answers = client.map([_request(text) for text in texts])
    found = {text: _ends(text, answer) for text, answer in zip(texts, answers, strict=True)}
    made = [
        replace(trace, turns=tuple(replace(turn, segments=found.get(turn.reasoning)) for turn in trace.turns))
        for trace in traces
    ]
    reasonings = [turn.reasoning for trace in traces for turn in trace.turns if turn.reasoning]
    by_model = sum(found[text] is not None for text in reasonings)
    return made, {"model": by_model, "rules": len(reasonings) - by_model}


def _request(text: str) -> Request:
    def problem(value: Any) -> str | None:
        if segment_ends(text, value["segments"]) is None:
            return "the segments, one after the other, are not the text; copy it exactly"
        return None

    messages: list[Message] = [{"role": "system", "content": PROMPT}, {"role": "user", "content": text}]
    return Request(messages, schema=SCHEMA, temperature=0.0, repairs=REPAIRS, check=problem)


def _ends(text: str, answer: Completion | InvalidAnswer) -> tuple[int, ...] | None:
    return None if isinstance(answer, InvalidAnswer) else segment_ends(text, answer.value["segments"])
