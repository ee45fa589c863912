"""The helpdesk as a domain, and the environment that plays it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from pact_fast.envs.domain.base import Domain, Introduction, domain
from pact_fast.envs.domain.checker import Sandbox
from pact_fast.envs.domain.database import Database
from pact_fast.envs.domain.env import DomainEnvironment
from pact_fast.envs.domain.instance import Rule, Step
from pact_fast.envs.helpdesk import desk, faults, orders, phone
from pact_fast.envs.helpdesk.world import base
from pact_fast.envs.registry import environment


def account_field(db: Database, account: str, field: str) -> Any:
    """A field of an account."""
    return db["accounts"].peek(account)[field]


def handset_field(db: Database, line: str, field: str) -> Any:
    """A field of the phone itself."""
    return db["handsets"].peek(line)[field]


def order_field(db: Database, order: str, field: str) -> Any:
    """A field of an order."""
    return db["orders"].peek(order)[field]


@domain("helpdesk")
class Helpdesk(Domain):
    """Accounts, phones and orders of 240 customers; 14 tools of the agent, 6 of the customer, 12 kinds of issues."""

    name = "helpdesk"
    policy = (Path(__file__).parent / "policy.md").read_text(encoding="utf-8")
    base = base()
    agent_tools = desk.TOOLS
    user_tools = phone.TOOLS
    user_actions = phone.ACTIONS
    predicates = (account_field, handset_field, order_field)
    bookkeeping = (Rule("ignore", "journal"), Rule("ignore", "handsets", "restarts"))
    ends_dialogue = ("transfer_to_human",)
    issues = (*faults.ISSUES, *orders.ISSUES)

    def subjects(self) -> list[str]:
        return list(self.base["accounts"])

    def introduction(self, db: Database, subject: str, rng: random.Random) -> Introduction:
        account = db["accounts"].peek(subject)
        return Introduction(
            first=(
                Step("find_account", {"phone_number": account["phone_number"]}),
                Step("get_account", {"account_id": subject}),
            ),
            knows={"phone number": account["phone_number"], "name": account["name"]},
            device=account["line"],
            secrets=(subject, account["line"]),
        )


@environment("helpdesk")
class HelpdeskEnvironment(DomainEnvironment):
    """Plays instances of the helpdesk; see `DomainEnvironment`."""

    def __init__(self, domain: str = "helpdesk", sandbox: Sandbox | None = None):
        super().__init__(domain, sandbox)
