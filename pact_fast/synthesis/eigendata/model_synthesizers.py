"""A language model as synthesizer: it gives a composed task its words, or finds its solution with the tools.

The composer decides what a task consists of: the initial state, and the assertions of its issues. So a task is solvable and
its checker right by construction, or the controls reject it. Prompts are files of the version, which reflection may rewrite.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

from pact_fast.data.types import ToolCall
from pact_fast.envs.domain import Domain, Instance, Step
from pact_fast.envs.domain.checker import initial_state, run_step
from pact_fast.envs.domain.user_side import user_schemas
from pact_fast.llm import InvalidAnswer, LLMClient
from pact_fast.synthesis.eigendata.actor import JsonActor
from pact_fast.synthesis.eigendata.compose import RulesSynthesizer, with_id
from pact_fast.synthesis.eigendata.roles import Synthesizer, TaskPlan
from pact_fast.synthesis.eigendata.versions import Version

MAX_CALLS = 12  # of a solution, those that failed included
MAX_MESSAGE = 2_000  # characters


class _ModelRevision(ABC):
    """A synthesizer that lets a model revise one part of the tasks that another synthesizer composes.

    role    the model's role, in reports
    prompt  file of the version that holds the model's prompt

    Args:
        client: The model.
        composer: Composes the tasks; None: the rules.
    """

    role: ClassVar[str]
    prompt: ClassVar[str]

    def __init__(self, client: LLMClient, composer: Synthesizer | None = None):
        self._client, self._composer = client.with_role(self.role), composer or RulesSynthesizer()

    def synthesize(
        self, domain: Domain, plan: TaskPlan, subject: str, version: Version, rng: random.Random
    ) -> Instance | None:
        """A revised task; None if the composer has none, or the model gives nothing that can be used.

        Raises:
            LLMError: Of any other kind than InvalidAnswer. It ends the run, which can be continued.
        """
        composed = self._composer.synthesize(domain, plan, subject, version, rng)
        if composed is None:
            return None
        revised = self._revise(domain, plan, composed, version, rng.randrange(2**31))
        if revised is None:
            return None
        return with_id(replace(revised, versions={**composed.versions, self.prompt: version.label(self.prompt)}))

    @abstractmethod
    def _revise(self, domain: Domain, plan: TaskPlan, task: Instance, version: Version, sample: int) -> Instance | None:
        """The task with the model's part in it. `sample`: index of the sample of the model's answer."""


class ModelWording(_ModelRevision):
    """Replaces the user's first message by a model's words."""

    role, prompt = "wording", "wording.md"

    def _revise(self, domain: Domain, plan: TaskPlan, task: Instance, version: Version, sample: int) -> Instance | None:
        prompt = version.prompt(self.prompt, wishes=task.user.goal, style=plan.style)
        try:
            answer = self._client.complete(
                [{"role": "user", "content": prompt}], sample=sample, repairs=1, check=_check_message
            )
        except InvalidAnswer:
            return None
        return replace(task, user=replace(task.user, opening=answer.text.strip()))


class ModelSynthesizer(_ModelRevision):
    """Replaces the gold calls by a model's: it is given the wishes and the tools of both sides, and tries them.

    Calls that were carried out become the gold calls; without any, there is no task.
    """

    role, prompt = "synthesizer", "solving.md"

    def _revise(self, domain: Domain, plan: TaskPlan, task: Instance, version: Version, sample: int) -> Instance | None:
        known = "; ".join(f"{name}: {value}" for name, value in task.user.knows.items())
        prompt = version.prompt(self.prompt, policy=domain.policy, wishes=task.user.goal, known=known)
        tools = [*domain.schemas, *user_schemas(domain, task)]
        actor = JsonActor(self._client, prompt, tools, sample=sample, speaks=False)
        actor.observe("Begin.")
        db, gold = initial_state(domain, task), list[Step]()
        for _ in range(MAX_CALLS):
            call = actor.act()
            if not isinstance(call, ToolCall):
                break
            step = Step(call.name, call.arguments, "agent" if call.name in domain.agent else "user")
            text, carried_out = run_step(domain, task, db, step)
            if carried_out:
                gold.append(step)
            actor.observe(text)
        return replace(task, gold=tuple(gold)) if gold else None


def _check_message(text: str) -> str | None:
    if not text.strip():
        return "it is empty"
    return None if len(text) <= MAX_MESSAGE else f"it has more than {MAX_MESSAGE} characters"
