"""Worlds of data and code that tasks are played in: tools on a database, a policy, and a user with tools of its own.

database   the state of an episode: records are copied at first touch
tools      tools are typed Python functions; their schemas are derived
base       Domain, which a user brings, and the registry of domains
instance   a task of a domain as data: initial state, user, gold calls, checker
checker    executes a checker: final state, assertions, required statements
controls   replays that a checker must pass or reject, and the cause to blame otherwise
user       the scripted user
user_side  the user's side of an instance, for a policy or a model that plays the user
user_quality
           flaws of a policy or a model that plays the user
env        the environment that plays an instance
"""

from pact_fast.envs.domain.base import Domain, Issue, IssueDraft, UserAction, domain
from pact_fast.envs.domain.database import Database
from pact_fast.envs.domain.env import DomainEnvironment
from pact_fast.envs.domain.instance import Assertion, Checker, Instance, Step, User
from pact_fast.envs.domain.tools import ToolError

__all__ = [
    "Assertion", "Checker", "Database", "Domain", "DomainEnvironment", "Instance", "Issue", "IssueDraft", "Step",
    "ToolError", "User", "UserAction", "domain",
]  # fmt: skip
