"""Dialogues in which a language model plays the agent, the user, or both; the environment and its checker are as ever."""

from __future__ import annotations

import random
from collections.abc import Iterator

from pact_fast.data.types import Message, ToolCall
from pact_fast.envs.domain import Domain, DomainEnvironment, Instance, Step
from pact_fast.envs.domain.user_side import call_as_user, user_prompt, user_schemas
from pact_fast.llm import LLMClient
from pact_fast.synthesis.eigendata.actor import JsonActor
from pact_fast.synthesis.eigendata.roles import Rollout
from pact_fast.synthesis.eigendata.rollout import Act, gold_acts, play
from pact_fast.synthesis.eigendata.versions import Version

MAX_CALLS = 8  # of a user between two messages


class ModelPlayer:
    """Plays a task with models.

    Args:
        agent: The model that plays the agent; None: the scripted one, which makes the gold calls.
        user: The model that plays the user; None: the scripted one.
    """

    def __init__(self, agent: LLMClient | None = None, user: LLMClient | None = None):
        self._agent = agent and agent.with_role("agent")
        self._user = user and user.with_role("user")

    def play(self, domain: Domain, instance: Instance, version: Version, rng: random.Random) -> Rollout:
        limit, sample = version.settings("workflow.yaml")["max_messages"], rng.randrange(2**31)
        messages: list[Message] = []
        acts = gold_acts(domain, instance)
        if self._agent is not None:
            prompt = version.prompt("agent.md", policy=domain.policy)
            acts = _agent_acts(JsonActor(self._agent, prompt, domain.schemas, sample=sample), messages)
        env = DomainEnvironment.of(domain)
        if self._user is not None:
            env = _WithModelUser(domain, self._user, sample)
        return play(domain, instance, acts, limit, env=env, messages=messages)


def _agent_acts(actor: JsonActor, messages: list[Message]) -> Iterator[Act]:
    """Yield the agent's acts. Before each act, it is shown all new messages of the dialogue except its own."""
    heard = 1  # the policy is in its prompt
    while True:
        for message in messages[heard:]:
            if message["role"] != "assistant":
                actor.observe(f"{'Customer: ' if message['role'] == 'user' else ''}{message['content']}")
        heard = len(messages)
        act = actor.act()
        if act is None:
            return
        yield Step(act.name, act.arguments) if isinstance(act, ToolCall) else act


class _WithModelUser(DomainEnvironment):
    """The environment of a domain whose user is a model. The calls that it makes are recorded as the scripted user's are."""

    def __init__(self, domain: Domain, client: LLMClient, sample: int):
        self.domain, self._sandbox = domain, None
        self._client, self._sample = client, sample

    def start(self, instance: Instance) -> None:
        super().start(instance)
        tools = user_schemas(self.domain, instance)
        self._actor = JsonActor(self._client, user_prompt(instance), tools, sample=self._sample)

    def respond(self, text: str) -> str | None:
        self._said.append(text)
        if self._over:
            return None
        self._actor.observe(text)
        for _ in range(MAX_CALLS):
            act = self._actor.act()
            if not isinstance(act, ToolCall):
                break
            self.user.steps.append(Step(act.name, act.arguments, "user"))
            self._actor.observe(call_as_user(self.domain, self.instance, self._db, act.name, act.arguments))
        else:
            act = None
        self._over = act is None
        return act
