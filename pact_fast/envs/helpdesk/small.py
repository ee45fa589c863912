"""The helpdesk in small: 120 customers with word-like ids, six tools of the agent, four of the customer.

Made for models that are trained in minutes. An id such as @Elm is one word after a sign of its own, and every word is the
handle of one customer and the account of another, so that models learn to copy ids quickly. Amounts are round. The policy
and the description of every tool are one line each.
"""

from __future__ import annotations

import functools
import random
from typing import Any

from pact_fast.envs.domain.base import Domain, Introduction, Issue, IssueDraft, domain
from pact_fast.envs.domain.checker import Sandbox
from pact_fast.envs.domain.database import Database
from pact_fast.envs.domain.instance import Edit, Rule, Step
from pact_fast.envs.domain.tools import ToolError
from pact_fast.envs.helpdesk import desk, faults, phone
from pact_fast.envs.helpdesk.domain import HelpdeskEnvironment, account_field, handset_field
from pact_fast.envs.helpdesk.world import Tables
from pact_fast.envs.registry import environment

_WORDS = """Ada Ben Cleo Dora Emil Finn Greta Hugo Iris Jonas Kira Liam Mona Nils Olga Paul Rita Sven Tess Ugo Vera Wim Yara
    Zoe Anna Bruno Clara David Elena Felix Alder Ash Beech Birch Cedar Elder Elm Fern Fir Hazel Holly Ivy Larch Lime Maple
    Moss Oak Palm Pine Reed Rose Rowan Rush Sage Sedge Sorrel Spruce Thyme Vine Willow Agate Amber Basalt Chalk Clay Coral
    Flint Garnet Gneiss Granite Gypsum Jade Jasper Jet Lava Marble Marl Mica Onyx Opal Pearl Pumice Quartz Ruby Sand Schist
    Slate Spinel Talc Topaz Alum Barium Boron Brass Bronze Carbon Cerium Chrome Cobalt Copper Gold Helium Iodine Iron Lead
    Lithium Neon Nickel Osmium Oxygen Radium Radon Rhenium Silver Sodium Steel Tin Xenon Zinc Zircon"""


@functools.cache
def base() -> Tables:
    """Accounts and handsets, and a journal: healthy, and the same in every process."""
    rng = random.Random("helpdesk_small/1")
    words = [f"@{word}" for word in _WORDS.split()]
    rng.shuffle(words)
    handles, accounts = words, [*words[1:], words[0]]  # no customer's handle is the name of their own account
    tables: Tables = {"accounts": {}, "handsets": {}, "journal": {}}
    for handle, account in zip(handles, accounts, strict=True):
        tables["accounts"][account] = {
            "handle": handle,
            "line": account,
            "status": "active",
            "balance": 0,
            "data_left": rng.randint(1, 9),
            "roaming": False,
        }
        tables["handsets"][account] = {
            "airplane_mode": False,
            "mobile_data": True,
            "roaming": False,
            "sim_seated": True,
            "abroad": False,
        }
    return tables


def find_account(db: Database, handle: str) -> str:
    """The account of a customer.

    Args:
        handle: What the customer is called.
    """
    found = db["accounts"].find(handle=handle)
    if not found:
        raise ToolError(f"no account of {handle}")
    return found[0]


def get_balance(db: Database, account_id: str) -> int:
    """What the customer owes.

    Args:
        account_id: The account.
    """
    if account_id not in db["accounts"]:
        raise ToolError(f"no account {account_id}")
    return db["accounts"].peek(account_id)["balance"]


def suspended(db: Database, subject: str, rng: random.Random) -> IssueDraft:
    """A suspended line, with a round balance."""
    draft = faults.suspended(db, subject, rng)
    balance = rng.choice(range(10, 100, 10))
    pay, resume = draft.fix
    owes = Edit("accounts", subject, "balance", balance)
    return IssueDraft(
        init=(owes, *(edit for edit in draft.init if edit.field != "balance")),
        fix=(
            Step("get_balance", {"account_id": subject}),
            Step(pay.name, {**pay.arguments, "amount": balance}),
            resume,
        ),
        assertions=draft.assertions,
        complaint="My line was suspended and I want to pay.",
        secrets=(str(balance),),
    )


@domain("helpdesk_small")
class SmallHelpdesk(Domain):
    """Accounts and phones of 120 customers; 6 tools of the agent, 4 of the customer, 6 kinds of issues."""

    name = "helpdesk_small"
    policy = (
        "Ask for the handle and find the account. Pay the whole balance, then resume the line. Only the customer can touch "
        "the phone: ask. Do everything, then say that all is done."
    )
    base = base()
    agent_tools = (find_account, get_balance, desk.take_payment, desk.resume_line, desk.add_data, desk.set_roaming)
    user_tools = (phone.set_airplane_mode, phone.set_mobile_data, phone.set_phone_roaming, phone.reseat_sim)
    user_actions = tuple(action for action in phone.ACTIONS if action.name not in ("look_at_phone", "restart_phone"))
    predicates = (account_field, handset_field)
    bookkeeping = (Rule("ignore", "journal"),)
    issues = (
        Issue("suspended", "billing", suspended),
        *(issue for issue in faults.ISSUES if issue.name in ("out_of_data", "abroad")),
        *(issue for issue in faults.ISSUES if issue.name in ("airplane_mode", "data_switched_off", "loose_sim")),
    )

    def subjects(self) -> list[str]:
        return list(self.base["accounts"])

    def introduction(self, db: Database, subject: str, rng: random.Random) -> Introduction:
        """Swap the handles of two customers, so that pairs of handle and account cannot be memorised."""
        other = rng.choice([key for key in self.base["accounts"] if key != subject and _handle(db, key) != subject])
        handle = _handle(db, other)
        return Introduction(
            first=(Step("find_account", {"handle": handle}),),
            knows={"handle": handle},
            device=subject,
            secrets=(subject,),
            init=(Edit("accounts", subject, "handle", handle), Edit("accounts", other, "handle", _handle(db, subject))),
        )


def _handle(db: Database, account: str) -> Any:
    return db["accounts"].peek(account)["handle"]


@environment("helpdesk_small")
class SmallHelpdeskEnvironment(HelpdeskEnvironment):
    """Plays instances of the small helpdesk; see `DomainEnvironment`."""

    def __init__(self, domain: str = "helpdesk_small", sandbox: Sandbox | None = None):
        super().__init__(domain, sandbox)
