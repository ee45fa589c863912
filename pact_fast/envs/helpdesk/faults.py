"""Issues of a line. Each lists the edits that break it, the calls that fix it, and the conditions that hold then."""

from __future__ import annotations

import random

from pact_fast.envs.domain.base import Issue, IssueDraft
from pact_fast.envs.domain.database import Database
from pact_fast.envs.domain.instance import Assertion, Edit, Step

RESTART = Step("restart_phone", {}, "user")


def _user(name: str, **arguments: object) -> Step:
    return Step(name, arguments, "user")


def _account_line(db: Database, subject: str) -> str:
    return db["accounts"].peek(subject)["line"]


def _assert(predicate: str, equals: object = True, **arguments: object) -> tuple[Assertion, ...]:
    return (Assertion(predicate, arguments, equals),)


def suspended(db: Database, subject: str, rng: random.Random) -> IssueDraft:
    """The line is suspended until the balance is paid."""
    balance = rng.randint(10, 99)
    return IssueDraft(
        init=(Edit("accounts", subject, "balance", balance), Edit("accounts", subject, "status", "suspended")),
        fix=(
            Step("take_payment", {"account_id": subject, "amount": balance}),
            Step("resume_line", {"account_id": subject}),
        ),
        assertions=(
            *_assert("account_field", "active", account=subject, field="status"),
            *_assert("account_field", 0, account=subject, field="balance"),
        ),
        complaint="My line was suspended and I want to pay what I owe and have it back.",
        secrets=(str(balance),),
    )


def out_of_data(db: Database, subject: str, rng: random.Random) -> IssueDraft:
    """The data of the month are used up."""
    gigabytes = rng.randint(1, 9)
    return IssueDraft(
        init=(Edit("accounts", subject, "data_left", 0),),
        fix=(Step("add_data", {"account_id": subject, "gigabytes": gigabytes}),),
        assertions=_assert("account_field", gigabytes, account=subject, field="data_left"),
        complaint=f"I have used up my data and want {gigabytes} gigabytes more.",
    )


def abroad(db: Database, subject: str, rng: random.Random) -> IssueDraft:
    """Abroad, with roaming off in the account and on the phone."""
    line = _account_line(db, subject)
    return IssueDraft(
        init=(Edit("handsets", line, "abroad", True),),
        fix=(Step("set_roaming", {"account_id": subject, "allowed": True}), _user("set_phone_roaming", on=True)),
        assertions=(
            *_assert("account_field", True, account=subject, field="roaming"),
            *_assert("handset_field", True, line=line, field="roaming"),
        ),
        complaint="I am abroad and want to use my phone here.",
    )


def locked_sim(db: Database, subject: str, rng: random.Random) -> IssueDraft:
    """The SIM card is locked."""
    line = _account_line(db, subject)
    return IssueDraft(
        init=(Edit("lines", line, "sim", "locked"), Edit("handsets", line, "sim", "locked")),
        fix=(Step("get_line", {"line_id": line}), Step("unlock_sim", {"line_id": line})),
        last=(RESTART,),
        assertions=_assert("handset_field", "unlocked", line=line, field="sim"),
        complaint="My phone says that the SIM card is locked.",
        secrets=(line,),
    )


def old_profile(db: Database, subject: str, rng: random.Random) -> IssueDraft:
    """The line has an old network profile."""
    line, profile = _account_line(db, subject), rng.choice(("P2", "P3", "P4"))
    return IssueDraft(
        init=(Edit("lines", line, "profile", profile), Edit("handsets", line, "profile", profile)),
        fix=(Step("get_line", {"line_id": line}), Step("send_profile", {"line_id": line})),
        last=(RESTART,),
        assertions=_assert("handset_field", "P5", line=line, field="profile"),
        complaint="Pages load very slowly since yesterday.",
        secrets=(line, profile),
    )


def airplane_mode(db: Database, subject: str, rng: random.Random) -> IssueDraft:
    """The phone is in airplane mode."""
    line = _account_line(db, subject)
    return IssueDraft(
        init=(Edit("handsets", line, "airplane_mode", True),),
        fix=(_user("set_airplane_mode", on=False),),
        assertions=_assert("handset_field", False, line=line, field="airplane_mode"),
        complaint="My phone finds no network at all.",
    )


def data_switched_off(db: Database, subject: str, rng: random.Random) -> IssueDraft:
    """Mobile data are off on the phone."""
    line = _account_line(db, subject)
    return IssueDraft(
        init=(Edit("handsets", line, "mobile_data", False),),
        fix=(_user("set_mobile_data", on=True),),
        assertions=_assert("handset_field", True, line=line, field="mobile_data"),
        complaint="Calls work, but I cannot open any page.",
    )


def loose_sim(db: Database, subject: str, rng: random.Random) -> IssueDraft:
    """The SIM card is not in its place."""
    line = _account_line(db, subject)
    return IssueDraft(
        init=(Edit("handsets", line, "sim_seated", False),),
        fix=(_user("reseat_sim"),),
        assertions=_assert("handset_field", True, line=line, field="sim_seated"),
        complaint="My phone says that there is no SIM card.",
    )


ISSUES = (
    Issue("suspended", "billing", suspended),
    Issue("out_of_data", "data", out_of_data),
    Issue("abroad", "roaming", abroad),
    Issue("locked_sim", "sim", locked_sim),
    Issue("old_profile", "profile", old_profile),
    Issue("airplane_mode", "airplane", airplane_mode),
    Issue("data_switched_off", "switch", data_switched_off),
    Issue("loose_sim", "seat", loose_sim),
)
