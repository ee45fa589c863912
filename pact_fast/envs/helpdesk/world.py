"""The customers of the helpdesk and their data: healthy, and the same in every process."""

from __future__ import annotations

import functools
import random
from typing import Any

CUSTOMERS = 240
_FIRST = """Ada Ben Cleo Dora Emil Finn Greta Hugo Iris Jonas Kira Liam Mona Nils Olga Paul Rita Sven Tess Ugo Vera Wim
    Yara Zoe Anna Bruno Clara David Elena Felix"""
_LAST = """Abel Brandt Castro Dubois Eklund Farkas Garcia Hansen Ito Jansen Klein Larsen Meyer Novak Olsen Peters Quist
    Rossi Santos Takeda Urban Vogel Weber Xu Young Zimmer"""
_STREETS = ("Mill", "Station", "Garden", "Church", "River", "Market", "Park", "School", "Hill", "Bridge")
_CITIES = ("Oslo", "Turin", "Ghent", "Porto", "Graz", "Lyon", "Bergen", "Delft", "Kiel", "Cork")
_MODELS = ("Nova 3", "Nova 5", "Arc 2", "Arc Mini", "Terra X", "Terra S")
_ITEMS = ("charger", "phone case", "headset", "screen protector", "power bank", "car holder", "spare battery", "stylus")
PLANS = {
    "Basic": {"price": 12, "gigabytes": 5},
    "Plus": {"price": 20, "gigabytes": 20},
    "Max": {"price": 35, "gigabytes": 80},
}

Tables = dict[str, dict[str, dict[str, Any]]]


@functools.cache
def base() -> Tables:
    """All tables: accounts, phones as the company sees them, handsets as they are, orders, plans, and a journal."""
    rng = random.Random("helpdesk/1")
    tables: Tables = {"accounts": {}, "lines": {}, "handsets": {}, "orders": {}, "plans": dict(PLANS), "journal": {}}
    numbers = rng.sample(range(100_000, 1_000_000), CUSTOMERS)
    keys = rng.sample(range(1000, 10_000), CUSTOMERS)
    orders = iter(rng.sample(range(10_000, 100_000), CUSTOMERS * 3))
    for number, key in zip(numbers, keys, strict=True):
        account, line = f"A{key}", f"L{key}"
        plan = rng.choice(list(PLANS))
        tables["accounts"][account] = {
            "name": f"{rng.choice(_FIRST.split())} {rng.choice(_LAST.split())}",
            "phone_number": f"555-{number}",
            "line": line,
            "plan": plan,
            "status": "active",
            "balance": 0,
            "data_left": rng.randint(1, PLANS[plan]["gigabytes"]),
            "roaming": False,
            "orders": [],
        }
        tables["lines"][line] = {"account": account, "sim": "unlocked", "profile": "P5"}
        tables["handsets"][line] = {
            "model": rng.choice(_MODELS),
            "abroad": False,
            "airplane_mode": False,
            "mobile_data": True,
            "roaming": False,
            "sim_seated": True,
            "sim": "unlocked",
            "profile": "P5",
            "restarts": 0,
        }
        for status in ("processing", "delivered", "processing"):
            order = f"R{next(orders)}"
            tables["accounts"][account]["orders"].append(order)
            tables["orders"][order] = {
                "account": account,
                "item": rng.choice([i for i in _ITEMS if i not in _items(tables, account)]),
                "price": rng.randint(8, 90),
                "status": status,
                "address": address(rng),
                "arrives": f"{rng.randint(1, 28)} {rng.choice(('March', 'April', 'May', 'June'))}",
                "refunded": 0,
            }
    return tables


def address(rng: random.Random) -> str:
    """A postal address."""
    return f"{rng.randint(1, 99)} {rng.choice(_STREETS)} Street, {rng.choice(_CITIES)}"


def _items(tables: Tables, account: str) -> set[str]:
    placed = tables["accounts"][account]["orders"]
    return {tables["orders"][order]["item"] for order in placed if order in tables["orders"]}
