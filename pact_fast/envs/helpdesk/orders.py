"""Issues about orders: what customers ask for. Issues of one group concern the same order and exclude each other."""

from __future__ import annotations

import random

from pact_fast.envs.domain.base import Issue, IssueDraft
from pact_fast.envs.domain.database import Database, Record
from pact_fast.envs.domain.instance import Assertion, Step
from pact_fast.envs.helpdesk.world import address as new_address


def _order(db: Database, subject: str, position: int) -> tuple[str, Record]:
    key = db["accounts"].peek(subject)["orders"][position]
    return key, db["orders"].peek(key)


def _look(key: str) -> Step:
    return Step("get_order", {"order_id": key})


def _assert(key: str, field: str, equals: object) -> tuple[Assertion, ...]:
    return (Assertion("order_field", {"order": key, "field": field}, equals),)


def cancel(db: Database, subject: str, rng: random.Random) -> IssueDraft:
    """Cancel an order."""
    key, order = _order(db, subject, 0)
    return IssueDraft(
        init=(),
        fix=(_look(key), Step("cancel_order", {"order_id": key})),
        assertions=_assert(key, "status", "cancelled"),
        complaint=f"Please cancel my order of the {order['item']}.",
        secrets=(key,),
    )


def move(db: Database, subject: str, rng: random.Random) -> IssueDraft:
    """Send an order to another address."""
    key, order = _order(db, subject, 0)
    address = new_address(rng)
    return IssueDraft(
        init=(),
        fix=(_look(key), Step("change_address", {"order_id": key, "address": address})),
        assertions=_assert(key, "address", address),
        complaint=f"Please send the {order['item']} that I ordered to {address} instead.",
        secrets=(key,),
    )


def refund(db: Database, subject: str, rng: random.Random) -> IssueDraft:
    """Pay back a broken item."""
    key, order = _order(db, subject, 1)
    return IssueDraft(
        init=(),
        fix=(_look(key), Step("refund_order", {"order_id": key})),
        assertions=_assert(key, "refunded", order["price"]),
        complaint=f"The {order['item']} that I got is broken and I want my money back.",
        secrets=(key, str(order["price"])),
        say=(str(order["price"]),),
    )


def when(db: Database, subject: str, rng: random.Random) -> IssueDraft:
    """Say when an order arrives."""
    key, order = _order(db, subject, 2)
    return IssueDraft(
        init=(),
        fix=(_look(key),),
        complaint=f"On which day will the {order['item']} that I ordered arrive?",
        secrets=(key, order["arrives"]),
        say=(order["arrives"],),
    )


ISSUES = (
    Issue("cancel_order", "open order", cancel),
    Issue("move_order", "open order", move),
    Issue("refund_order", "delivered order", refund),
    Issue("when_arrives", "last order", when),
)
