"""The environment that plays an instance of a domain: the agent's tools, the user, and the verdict of the checker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pact_fast.data.types import ExpertTrace, Message, Task, ToolCall, ToolSchema, Trajectory
from pact_fast.envs.domain.base import Domain, make_domain
from pact_fast.envs.domain.checker import Sandbox, Verdict, initial_state, judge
from pact_fast.envs.domain.database import Database
from pact_fast.envs.domain.instance import Instance
from pact_fast.envs.domain.tools import call_tool
from pact_fast.envs.domain.user import DomainUser
from pact_fast.envs.domain.user_quality import user_flaws
from pact_fast.envs.domain.user_side import call_as_user, user_dialogue, user_prompt, user_schemas
from pact_fast.envs.python_tools.pool import SandboxPool
from pact_fast.envs.registry import environment
from pact_fast.errors import DataError, PactError

OVER = "error: the conversation is over"


@environment("domain")
class DomainEnvironment:
    """Plays instances of one domain. `task.env_args` is an instance (`Instance.to_json`).

    domain    the domain
    instance  the task under way; valid after `reset` or `start`
    user      the user of the episode

    Args:
        domain: A registered name, or `file.py:Class`.
        sandbox: Runs checkers that are Python functions; None: such instances are refused.
    """

    blocking = False

    def __init__(self, domain: str = "", sandbox: Sandbox | None = None):
        if not domain:
            raise PactError("env.args.domain is missing: name a domain, for example env.args.domain=helpdesk")
        self.domain, self._sandbox = make_domain(domain), sandbox

    @classmethod
    def of(cls, domain: Domain, sandbox: Sandbox | None = None) -> DomainEnvironment:
        """The environment of a domain that is loaded already."""
        made = DomainEnvironment.__new__(DomainEnvironment)
        made.domain, made._sandbox = domain, sandbox
        return made

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Callable[[], DomainEnvironment]:
        """Environments that share the domain, and the sandbox if `args.functions` is true."""
        options = dict(args)
        sandbox = SandboxPool(timeout=tool_timeout) if options.pop("functions", False) else None
        try:
            cls(**options, sandbox=sandbox)
        except TypeError as error:
            raise PactError(f"env.args do not fit the environment {cls.__name__}: {error}") from None
        return lambda: cls(**options, sandbox=sandbox)

    def reset(self, task: Task) -> str | None:
        """DataError if the task is not an instance of the domain."""
        self.start(self._read(task))
        return None

    def start(self, instance: Instance) -> None:
        """Begin an episode: the initial state, and a user who has said the opening."""
        self.instance = instance
        self._db: Database = initial_state(self.domain, instance)
        self.user = DomainUser(self.domain, instance, self._db)
        self._said: list[str] = []
        self._over = False

    def _read(self, task: Task) -> Instance:
        instance = Instance.from_json(task.env_args)
        if instance.domain != self.domain.name:
            raise DataError(
                f"task {task.id} is of the domain {instance.domain!r}, and the environment plays {self.domain.name!r}; "
                "set env.args.domain",
                field="env_args",
            )
        if instance.checker.function is not None and self._sandbox is None:
            raise DataError(f"task {task.id}: its checker is a function; set env.args.functions=true", field="env_args")
        return instance

    @staticmethod
    def check_task(task: Task) -> None:
        """DataError if the task's env_args are not an instance."""
        Instance.from_json(task.env_args)

    @property
    def tools(self) -> list[ToolSchema]:
        return self.domain.schemas

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        if self._over:
            return OVER
        text, carried_out = call_tool(self.domain.agent, self._db, name, arguments)
        if carried_out and name in self.domain.ends_dialogue:
            self._over = True
        return text

    def respond(self, text: str) -> str | None:
        """The user's answer to the agent's message; None when the conversation is over."""
        self._said.append(text)
        reply = None if self._over else self.user.reply(text)
        self._over = reply is None
        return reply

    # -- a model as the user -----------------------------------------------------------------------------------------

    def user_prompt(self) -> str:
        """The system prompt of a policy that plays the user."""
        return user_prompt(self.instance)

    @property
    def user_tools(self) -> list[ToolSchema]:
        return user_schemas(self.domain, self.instance)

    def call_as_user(self, name: str, arguments: dict[str, Any]) -> str:
        return call_as_user(self.domain, self.instance, self._db, name, arguments)

    def user_messages(self, task: Task) -> list[Message]:
        """Return the task's expert dialogue after the question, from the user's side; empty without a dialogue."""
        return user_dialogue(self.domain, self.instance, task.expert) if task.expert else []

    def judge_user(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """Flaws of a policy that played the user (`user_flaws`). `trajectory`: its side."""
        return user_flaws(self.domain, self.instance, trajectory, self._over)

    # -- the verdict -------------------------------------------------------------------------------------------------

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """`success`: the checker's verdict, 0 where a limit ended the episode. `state`, `assertions`, `said`: its parts."""
        if not self._said:  # nobody has asked for a response: a model plays the user, or nobody does
            self._said = [turn.content for turn in trajectory.turns if not turn.attempts]
        verdict = self.verdict()
        return {
            "success": float(verdict.passed and not trajectory.stop_reason.is_truncated),
            "state": float(verdict.difference is None),
            "assertions": float(not verdict.failed),
            "said": float(not verdict.unsaid),
        }

    def verdict(self) -> Verdict:
        """The checker's verdict on the current state and the agent's messages."""
        return judge(self.domain, self.instance, self._db, self._said, sandbox=self._sandbox)

    def close(self) -> None:
        """Stop the sandbox."""
        close = getattr(self._sandbox, "close", None)
        if close:
            close()


def instance_task(
    domain: Domain, instance: Instance, env: str = "domain", dialogue: Sequence[Message] | None = None
) -> Task:
    """The task of an instance: policy and opening message as the prompt, gold calls of the agent as reference calls.

    Args:
        domain: The domain of the instance.
        instance: The task.
        env: Name of the environment that plays it.
        dialogue: A dialogue that solves it, prompt included: the expert trace, in which the user speaks, too.
    """
    prompt: list[Message] = [
        {"role": "system", "content": domain.policy},
        {"role": "user", "content": instance.user.opening},
    ]
    return Task(
        id=instance.id,
        prompt=prompt,
        tools=domain.schemas,
        expert=ExpertTrace.from_messages(dialogue[len(prompt) :]) if dialogue else None,
        reference_calls=[ToolCall(step.name, dict(step.arguments)) for step in instance.gold if step.by == "agent"],
        env=env,
        env_args=instance.to_json(),
    )


def closing_text(instance: Instance) -> str:
    """The last message of the scripted agent: everything that must be told."""
    told: Mapping[str, None] = dict.fromkeys(instance.checker.say)
    return f"All done. {' '.join(f'It is {text}.' for text in told)}".strip()
