"""A language model as reflector: it proposes changes of settings and prompts from the failures of a round."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from pact_fast.llm import InvalidAnswer, LLMClient
from pact_fast.synthesis.eigendata.roles import Candidate, Revision
from pact_fast.synthesis.eigendata.versions import CHOICES, Version

EXAMPLES = 3  # of failures, for each control

REVISIONS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "revisions": {
            "type": "array",
            "maxItems": 6,
            "items": {
                "type": "object",
                "properties": {
                    "file": {"type": "string"},
                    "key": {"type": "string"},
                    "value": {},
                    "reason": {"type": "string"},
                    "control": {"type": "string"},
                },
                "required": ["file", "key", "value", "reason", "control"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["revisions"],
    "additionalProperties": False,
}


class ModelReflector:
    """Asks a model for revisions of settings and prompts. Those that make no sense are rejected by the engine."""

    def __init__(self, client: LLMClient):
        self._client = client.with_role("reflection")

    def reflect(
        self, version: Version, candidates: Sequence[Candidate], rejected: Sequence[Revision]
    ) -> list[Revision]:
        """No revisions if the model's answer cannot be used."""
        prompt = version.prompt(
            "reflection.md",
            choices=json.dumps(CHOICES, default=lambda kind: kind.__name__, indent=1),
            files="\n".join(f"--- {name}\n{text}" for name, text in version.files.items() if name != "reflection.md"),
            failures=_failures(candidates) or "none",
            rejected="\n".join(json.dumps(revision.changes) for revision in rejected) or "none",
        )
        try:
            answer = self._client.complete([{"role": "user", "content": prompt}], schema=REVISIONS, repairs=1)
        except InvalidAnswer:
            return []
        return [
            Revision({item["file"]: {item["key"]: item["value"]}}, item["reason"], item["control"])
            for item in answer.value["revisions"]
        ]


def _failures(candidates: Sequence[Candidate]) -> str:
    """Controls that failed, with counts and a few examples, the most frequent first."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for candidate in candidates:
        for finding in candidate.findings[:1]:
            found[finding.control, finding.blame].append(finding.detail)
    ranked = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return "\n".join(
        f"{len(details)} x {control} (to blame: {blame}): {'; '.join(dict.fromkeys(details[:EXAMPLES]))}"
        for (control, blame), details in ranked
    )
