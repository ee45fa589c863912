"""Tools of the agent."""

from __future__ import annotations

from typing import Any

from pact_fast.envs.domain.database import Database, Record
from pact_fast.envs.domain.tools import ToolError

PROFILE = "P5"  # the network profile that works


def _get(db: Database, table: str, key: str, *, what: str) -> Record:
    if key not in db[table]:
        raise ToolError(f"there is no {what} {key}")
    return db[table][key]


def _account(db: Database, account_id: str) -> Record:
    return _get(db, "accounts", account_id, what="account")


def _line(db: Database, line_id: str) -> Record:
    return _get(db, "lines", line_id, what="line")


def _order(db: Database, order_id: str) -> Record:
    return _get(db, "orders", order_id, what="order")


def _note(db: Database, text: str) -> None:
    """The journal of actions in order: bookkeeping that no verdict compares."""
    db["journal"][db.new_key("journal", "N")] = {"text": text}


def find_account(db: Database, phone_number: str) -> dict[str, Any]:
    """Find the account of a phone number.

    Args:
        phone_number: The number, as the customer says it.
    """
    found = db["accounts"].find(phone_number=phone_number)
    if not found:
        raise ToolError(f"no account has the number {phone_number}")
    return {"account_id": found[0], "name": db["accounts"].peek(found[0])["name"]}


def get_account(db: Database, account_id: str) -> dict[str, Any]:
    """Everything about an account: line, plan, status, balance, data, roaming, orders.

    Args:
        account_id: The account.
    """
    return dict(_account(db, account_id))


def get_line(db: Database, line_id: str) -> dict[str, Any]:
    """What the network knows about a line: SIM card and network profile.

    Args:
        line_id: The line.
    """
    return dict(_line(db, line_id))


def get_order(db: Database, order_id: str) -> dict[str, Any]:
    """An order: item, price, status, address, day of arrival.

    Args:
        order_id: The order.
    """
    return {key: value for key, value in _order(db, order_id).items() if key != "account"}


def take_payment(db: Database, account_id: str, amount: int) -> str:
    """Charge the customer's card, to pay the balance of the account.

    Args:
        account_id: The account.
        amount: How much, at most the balance.
    """
    account = _account(db, account_id)
    if not 0 < amount <= account["balance"]:
        raise ToolError(f"the amount must be between 1 and the balance of {account['balance']}")
    account["balance"] -= amount
    _note(db, f"payment of {amount} for {account_id}")
    return f"paid {amount}, the balance is {account['balance']}"


def resume_line(db: Database, account_id: str) -> str:
    """Resume a suspended account. Its balance must be paid.

    Args:
        account_id: The account.
    """
    account = _account(db, account_id)
    if account["balance"]:
        raise ToolError(f"the balance of {account['balance']} must be paid first")
    account["status"] = "active"
    _note(db, f"{account_id} resumed")
    return "the line is active"


def add_data(db: Database, account_id: str, gigabytes: int) -> str:
    """Add data to an account.

    Args:
        account_id: The account.
        gigabytes: How much, from 1 to 50.
    """
    account = _account(db, account_id)
    if not 1 <= gigabytes <= 50:
        raise ToolError("gigabytes must be between 1 and 50")
    account["data_left"] += gigabytes
    _note(db, f"{gigabytes} GB for {account_id}")
    return f"{account['data_left']} GB left"


def set_roaming(db: Database, account_id: str, allowed: bool) -> str:
    """Allow or forbid the use of networks abroad.

    Args:
        account_id: The account.
        allowed: Whether it is allowed.
    """
    _account(db, account_id)["roaming"] = allowed
    _note(db, f"roaming of {account_id}: {allowed}")
    return f"roaming is {'allowed' if allowed else 'forbidden'}"


def unlock_sim(db: Database, line_id: str) -> str:
    """Unlock the SIM card of a line. The phone must be restarted afterwards.

    Args:
        line_id: The line.
    """
    _line(db, line_id)["sim"] = "unlocked"
    _note(db, f"SIM of {line_id} unlocked")
    return "unlocked; takes effect at the next restart"


def send_profile(db: Database, line_id: str) -> str:
    """Send the current network profile to a line. The phone must be restarted afterwards.

    Args:
        line_id: The line.
    """
    _line(db, line_id)["profile"] = PROFILE
    _note(db, f"profile sent to {line_id}")
    return "sent; takes effect at the next restart"


def cancel_order(db: Database, order_id: str) -> str:
    """Cancel an order that is processing.

    Args:
        order_id: The order.
    """
    order = _order(db, order_id)
    if order["status"] != "processing":
        raise ToolError(f"the order is {order['status']}; only one that is processing can be cancelled")
    order["status"] = "cancelled"
    _note(db, f"{order_id} cancelled")
    return "cancelled"


def refund_order(db: Database, order_id: str) -> str:
    """Refund the price of an order that was delivered.

    Args:
        order_id: The order.
    """
    order = _order(db, order_id)
    if order["status"] != "delivered" or order["refunded"]:
        raise ToolError(f"the order is {order['status']}, {order['refunded']} refunded; it cannot be refunded")
    order["refunded"] = order["price"]
    _note(db, f"{order_id} refunded")
    return f"refunded {order['price']}"


def change_address(db: Database, order_id: str, address: str) -> str:
    """Change where an order is sent, while it is processing.

    Args:
        order_id: The order.
        address: The new address.
    """
    order = _order(db, order_id)
    if order["status"] != "processing":
        raise ToolError(f"the order is {order['status']}; its address cannot be changed")
    order["address"] = address
    _note(db, f"{order_id} goes to {address}")
    return "changed"


def transfer_to_human(db: Database, summary: str) -> str:
    """Hand the conversation over to a human. It ends for you.

    Args:
        summary: What the customer needs.
    """
    db["journal"][db.new_key("journal", "N")] = {"text": f"handed over: {summary}"}
    return "handed over"


TOOLS = (
    find_account, get_account, get_line, get_order, take_payment, resume_line, add_data, set_roaming, unlock_sim,
    send_profile, cancel_order, refund_order, change_address, transfer_to_human,
)  # fmt: skip
