"""Back-ends with a language model for words: the user's first message, and reflection.

A task stays composed of issues, so that it is solvable and its checker right by construction; the model gives it words.
Prompts are files of the version (`wording.md`, `reflection.md`), which reflection may rewrite, too.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from string import Template
from typing import Any

from pact_fast.envs.domain import Domain, Instance
from pact_fast.errors import PactError
from pact_fast.llm import InvalidAnswer, LLMClient
from pact_fast.synthesis.eigendata.compose import RulesSynthesizer, with_id
from pact_fast.synthesis.eigendata.roles import Candidate, Plan, Revision, Synthesizer
from pact_fast.synthesis.eigendata.versions import CHOICES, START, Version

EXAMPLES = 3  # of failures, for each control
LONGEST_MESSAGE = 2_000  # characters

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


class ModelWording:
    """A synthesizer whose tasks another one composes, and whose users speak a model's words.

    Args:
        client: The model.
        composer: Makes the tasks.
    """

    def __init__(self, client: LLMClient, composer: Synthesizer | None = None):
        self._client, self._composer = client.with_role("wording"), composer or RulesSynthesizer()

    def synthesize(
        self, domain: Domain, plan: Plan, subject: str, version: Version, rng: random.Random
    ) -> Instance | None:
        """None if the model's answer cannot be used. LLMError of any other kind ends the run, which can be continued."""
        made = self._composer.synthesize(domain, plan, subject, version, rng)
        if made is None:
            return None
        prompt = prompt_of(version, "wording.md", wishes=made.user.goal, style=plan.style)
        try:
            answer = self._client.complete(
                [{"role": "user", "content": prompt}], sample=rng.randrange(2**31), repairs=1, check=_check_message
            )
        except InvalidAnswer:
            return None
        versions = {**made.versions, "wording.md": version.label("wording.md")}
        return with_id(replace(made, user=replace(made.user, opening=answer.text.strip()), versions=versions))


class ModelReflector:
    """Asks a model for revisions of settings and prompts. Those that make no sense are rejected by the engine."""

    def __init__(self, client: LLMClient):
        self._client = client.with_role("reflection")

    def reflect(
        self, version: Version, candidates: Sequence[Candidate], rejected: Sequence[Revision]
    ) -> list[Revision]:
        """No revisions if the model's answer cannot be used."""
        prompt = prompt_of(
            version,
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


def prompt_of(version: Version, file: str, **values: str) -> str:
    """A prompt of the version with its $names filled in. PactError if the version has no such file."""
    if file not in version.files:
        raise PactError(f"version {version.number} of prompts and workflow has no {file}; copy it from {START / file}")
    return Template(version.files[file]).safe_substitute(values)


def _check_message(text: str) -> str | None:
    if not text.strip():
        return "it is empty"
    return None if len(text) <= LONGEST_MESSAGE else f"it has more than {LONGEST_MESSAGE} characters"


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
