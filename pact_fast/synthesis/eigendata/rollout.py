"""The scripted agent, with or without errors, in dialogue with the scripted user: the environment's own code plays both sides.

With errors (`AgentErrors`) the agent is a reference policy of known weakness, whose pass rate measures how difficult a task is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from pact_fast.data.types import Message
from pact_fast.envs.domain import Domain, DomainEnvironment, Instance, Step
from pact_fast.envs.domain.env import closing_text
from pact_fast.synthesis.eigendata.roles import Rollout
from pact_fast.synthesis.eigendata.versions import Version


@dataclass(frozen=True)
class AgentErrors:
    """Errors of a scripted agent, as probabilities per gold step."""

    skip: float = 0.0
    wrong_argument: float = 0.0
    stop: float = 0.0  # say that all is done


REFERENCE_POLICIES = {
    "careful": AgentErrors(skip=0.02, wrong_argument=0.02, stop=0.01),
    "average": AgentErrors(skip=0.08, wrong_argument=0.06, stop=0.03),
    "weak": AgentErrors(skip=0.2, wrong_argument=0.12, stop=0.08),
}

Act = str | Step  # a message to the user, or a call


class ScriptedPlayer:
    """Plays the gold calls of an instance. Calls of the user are asked for in words, which the user has to understand."""

    def __init__(self, errors: AgentErrors | None = None):
        self._errors = errors or AgentErrors()

    def play(self, domain: Domain, instance: Instance, version: Version, rng: random.Random) -> Rollout:
        limit = version.settings("workflow.yaml")["max_messages"]
        return play(domain, instance, _with_errors(domain, instance, self._errors, rng), limit)


def play(
    domain: Domain,
    instance: Instance,
    acts: Iterator[Act],
    max_messages: int = 200,
    *,
    env: DomainEnvironment | None = None,
    messages: list[Message] | None = None,
) -> Rollout:
    """Play a dialogue: the acts of an agent, and the responses of environment and user.

    Args:
        domain: The domain.
        instance: The task.
        acts: What the agent does, in order; the dialogue ends when they do, or when the user leaves.
        max_messages: Messages of all parties; more end the dialogue without success.
        env: Plays the task; None: with the scripted user.
        messages: An empty list that gets the dialogue as it grows, for agents that read it; None: a new one.
    """
    env = env or DomainEnvironment.of(domain)
    env.start(instance)
    messages = [] if messages is None else messages
    messages += [
        {"role": "system", "content": domain.policy},
        {"role": "user", "content": instance.user.opening},
    ]
    cut = False
    for act in acts:
        if len(messages) >= max_messages:
            cut = True
            break
        if isinstance(act, Step):
            call = {"type": "function", "function": {"name": act.name, "arguments": dict(act.arguments)}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "name": act.name, "content": env.call(act.name, dict(act.arguments))})
            continue
        messages.append({"role": "assistant", "content": act})
        reply = env.respond(act)
        if reply is None:
            break
        messages.append({"role": "user", "content": reply})
    verdict = env.verdict()
    user_did = [(step.name, dict(step.arguments)) for step in env.user.steps]
    missed = [step.name for step in instance.gold if step.by == "user" and not _take(user_did, step)]
    passed = verdict.passed and not cut
    reason = verdict.reason or ("" if passed else f"cut after {max_messages} messages")
    return Rollout(messages, passed, reason, env.user.gave_up, not cut, missed)


def gold_acts(domain: Domain, instance: Instance) -> Iterator[Act]:
    """The perfect agent: asks for missing facts, makes the gold calls, asks the user for the user's, and closes."""
    asked = {value: name for name, value in instance.user.knows.items() if value not in instance.user.opening}
    for step in instance.gold:
        if step.by == "user":
            yield request_text(domain, step)
            continue
        for value in step.arguments.values():
            name = asked.pop(str(value), None)
            if name:
                yield f"What is your {name}?"
        yield step
    yield closing_text(instance)


def request_text(domain: Domain, step: Step) -> str:
    """The words that ask the user for a step. A step that the domain has no words for is asked for by its name."""
    for action in domain.user_actions:
        if action.name == step.name and dict(action.arguments) == dict(step.arguments):
            return action.request
    return f"Please do this: {step.name.replace('_', ' ')}."


def _with_errors(domain: Domain, instance: Instance, errors: AgentErrors, rng: random.Random) -> Iterator[Act]:
    """The gold acts with errors. The last one, which ends the dialogue, is always made."""
    acts = list(gold_acts(domain, instance))
    for act in acts[:-1]:
        if rng.random() < errors.stop:
            break
        if rng.random() < errors.skip:
            continue
        if isinstance(act, Step) and rng.random() < errors.wrong_argument:
            act = _with_wrong_argument(act, rng)
        yield act
    yield acts[-1]


def _with_wrong_argument(step: Step, rng: random.Random) -> Step:
    """The step with one wrong argument."""
    if not step.arguments:
        return step
    name = rng.choice(sorted(step.arguments))
    value = step.arguments[name]
    wrong = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else f"{str(value)[:-1]}0"
    return Step(step.name, {**step.arguments, name: wrong}, step.by)


def _take(found: list[tuple[str, dict]], step: Step) -> bool:
    item = (step.name, dict(step.arguments))
    if item in found:
        found.remove(item)
        return True
    return False
