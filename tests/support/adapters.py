"""Functions, classes and environments of users, served by the adapters in tests. `RAN` records which of them ran."""

from __future__ import annotations

import asyncio

RAN: list[str] = []


def echo(text: str) -> str:
    """Say it again.

    Args:
        text: What.
    """
    RAN.append("echo")
    return text


def count(state: dict) -> int:
    """How often this was called in the episode."""
    RAN.append("count")
    state["calls"] = state.get("calls", 0) + 1
    return state["calls"]


async def wait(seconds: float) -> dict:
    """Wait.

    Args:
        seconds: How long.
    """
    RAN.append("wait")
    await asyncio.sleep(seconds)
    return {"waited": seconds}


def broken(text: str) -> str:
    """Raise an error.

    Args:
        text: Its text.
    """
    RAN.append("broken")
    raise KeyError(text)


def changes(items: list[str]) -> list[str]:
    """Change what it is given.

    Args:
        items: A list.
    """
    items.append("changed")
    return items


def no_docstring(x: int) -> int:
    return x


def no_hints(x):
    """No hints.

    Args:
        x: A number.
    """
    return x


def anything(**arguments: int) -> int:
    """Any arguments."""
    return len(arguments)


def evaluate(expression: str) -> str:
    """The value of a Python expression.

    Args:
        expression: The expression.
    """
    return str(eval(expression))  # the reason for the sandbox


class Log:
    """A class of tools, with members that are none."""

    def __init__(self):
        self.lines = []

    def write(self, line: str) -> int:
        """Add a line, and say how many there are.

        Args:
            line: The line.
        """
        RAN.append("write")
        self.lines.append(line)
        return len(self.lines)

    def _secret(self) -> str:
        """Never a tool."""
        RAN.append("_secret")
        return "secret"


class Slow:
    """A class with an async method."""

    async def look(self) -> str:
        """Look."""
        return "seen"


class Silent:
    """A class without tools."""


class Trl(Log):
    """In the form of TRL's environment_factory."""

    def reset(self, **row) -> str:
        self.row, self.lines = row, []
        return f"There are {len(row)} columns."

    async def later(self) -> str:
        """Answer later."""
        await asyncio.sleep(0)
        return "later"

    def blocks(self) -> list:
        """Content blocks."""
        return [{"type": "text", "text": "a cat: "}, {"type": "image", "image": object()}]

    def fail(self) -> str:
        """Fail."""
        raise RuntimeError("it failed")

    def get_reward(self) -> float:
        RAN.append("get_reward")
        return len(self.lines) / 2


class TrlOther:
    """Another one, without a reward of its own."""

    def reset(self, **row) -> None:
        self.pushed = 0
        self.row = row

    def push(self) -> None:
        """Push."""
        RAN.append("push")
        self.pushed += 1


class TrlWithoutReset:
    """No reset."""


def pushed(environments, completions, answer, **columns) -> list[float]:
    """A reward function of TRL that reads the environments."""
    assert len(environments) == len(completions) == len(answer) == 1
    return [float(environment.pushed) for environment in environments]
