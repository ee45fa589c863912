"""Typed Python functions as tools: a function, an async one, one with the episode's state, and a class.

    pact-fast train quickstart env.name=functions "env.args={tools: [examples/function_tools.py:add, examples/function_tools.py:Basket]}" data.train=examples/function_tools.jsonl pretrain=null

Schemas come from the type hints and the docstrings. Every episode has a new `state` and a new `Basket`.
"""  # noqa: E501

from __future__ import annotations

import asyncio
from typing import Any


def add(a: int, b: int) -> int:
    """The sum of two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


async def wait(seconds: float) -> str:
    """Wait, as a call over the network would.

    Args:
        seconds: How long.
    """
    await asyncio.sleep(seconds)
    return f"waited {seconds:g} s"


def remember(fact: str, state: dict[str, Any]) -> int:
    """Keep a fact, and say how many there are.

    Args:
        fact: What to keep.
    """
    facts = state.setdefault("facts", [])
    facts.append(fact)
    return len(facts)


class Basket:
    """A shopping basket; its public methods are tools."""

    def __init__(self) -> None:
        self._items: dict[str, int] = {}

    def put(self, item: str, count: int = 1) -> dict[str, int]:
        """Put something into the basket, and show it.

        Args:
            item: What.
            count: How many.
        """
        self._items[item] = self._items.get(item, 0) + count
        return self._items
