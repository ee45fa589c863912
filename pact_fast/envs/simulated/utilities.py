"""Utility tools, computed in code with any backend: a wrong sum of a model would compound over the turns."""

from __future__ import annotations

import datetime
import math
import operator
import re
from collections.abc import Callable
from typing import Any

from pact_fast.envs.simulated.backend import ToolFailure
from pact_fast.envs.simulated.world import SEARCH, ToolSpec, same_text

MAX_EXPRESSION = 200  # characters
MAX_NESTING = 30
_TEXT = {"type": "string", "minLength": 1, "maxLength": 400}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _calculator(arguments: dict[str, Any]) -> dict[str, Any]:
    value = evaluate(arguments["expression"])
    return {"result": int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.12g}")}


def _date_difference(arguments: dict[str, Any]) -> dict[str, Any]:
    start, end = (_date(arguments[name]) for name in ("start", "end"))
    years = end.year - start.year - ((end.month, end.day) < (start.month, start.day))
    return {"days": (end - start).days, "years": years}


def _compare(arguments: dict[str, Any]) -> dict[str, Any]:
    a, b = arguments["a"], arguments["b"]
    if same_text(a, b):
        return {"a_is": "equal"}
    readers: tuple[Callable[[str], Any], ...] = (number, parse_date)
    for read in readers:
        one, other = read(a), read(b)
        if one is not None and other is not None:
            return {"a_is": "equal" if one == other else "smaller" if one < other else "larger"}
    return {"a_is": "different"}


def _values(expression: str) -> list[str]:
    return re.findall(r"\s*(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+|\S)", expression)


class _Parser:
    """Recursive descent over + − * / ( ) and signs."""

    def __init__(self, expression: str):
        self._tokens = [*_values(expression.replace("−", "-").replace("×", "*").replace("÷", "/")), ""]
        self._at = self._depth = 0

    def all(self) -> float:
        value = self._sum()
        if self._tokens[self._at]:
            raise ValueError("it has something after its end")
        return value

    def _sum(self) -> float:
        return self._left({"+": operator.add, "-": operator.sub}, self._product)

    def _product(self) -> float:
        return self._left({"*": operator.mul, "/": operator.truediv}, self._factor)

    def _left(self, operators: dict[str, Callable[[float, float], float]], operand: Callable[[], float]) -> float:
        value = operand()
        while self._tokens[self._at] in operators:
            apply = operators[self._next()]
            value = apply(value, operand())
        return value

    def _factor(self) -> float:
        token = self._next()
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise ValueError("it is nested too deeply")
        try:
            if token in ("+", "-"):
                return self._factor() * (-1 if token == "-" else 1)
            if token == "(":
                value = self._sum()
                if self._next() != ")":
                    raise ValueError("a bracket is not closed")
                return value
            return float(token)
        except ValueError as error:
            raise ValueError(
                "it holds something that is no number" if "convert" in str(error) else str(error)
            ) from None
        finally:
            self._depth -= 1

    def _next(self) -> str:
        token = self._tokens[self._at]
        if token:
            self._at += 1
        return token


def evaluate(expression: str) -> float:
    """The value of an arithmetic expression: + - * / and brackets. ToolFailure if it is none, or not finite."""
    if len(expression) > MAX_EXPRESSION:
        raise ToolFailure("invalid_arguments", f"expression: longer than {MAX_EXPRESSION} characters")
    try:
        value = _Parser(expression).all()
    except ZeroDivisionError:
        raise ToolFailure("invalid_arguments", "expression: division by zero") from None
    except (ValueError, OverflowError) as error:
        raise ToolFailure("invalid_arguments", f"expression: {error}; use numbers, + - * / and brackets") from None
    if not math.isfinite(value):
        raise ToolFailure("invalid_arguments", "expression: the result is not finite")
    return value


_MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
_MONTH = {name[:length]: i for i, name in enumerate(_MONTHS, 1) for length in (3, len(name))} | {"sept": 9}
_DATES = (
    re.compile(r"(?P<d>\d{1,2})(?:st|nd|rd|th)?\s+(?P<m>[a-z]+)\.?,?\s+(?P<y>\d{1,4})"),  # 2 November 1932
    re.compile(r"(?P<m>[a-z]+)\.?\s+(?P<d>\d{1,2})(?:st|nd|rd|th)?,?\s+(?P<y>\d{1,4})"),  # July 23, 1968
    re.compile(r"(?P<y>\d{4})-(?P<m>\d{1,2})-(?P<d>\d{1,2})"),  # 1968-07-23
    re.compile(r"(?P<m>[a-z]+)\.?,?\s+(?P<y>\d{3,4})"),  # July 1968
    re.compile(r"(?P<y>\d{3,4})"),  # 1968
)


def parse_date(text: str) -> tuple[int, int, int] | None:
    """(year, month, day) of a date; 0 for parts that it does not state. None if it is no date."""
    cleaned = " ".join(text.lower().strip(" .").split())
    for pattern in _DATES:
        if (match := pattern.fullmatch(cleaned)) is None:
            continue
        parts = match.groupdict()
        month = parts.get("m") or "0"
        m = int(month) if month.isdigit() else _MONTH.get(month, -1)
        d, y = int(parts.get("d") or 0), int(parts["y"])
        if 0 <= m <= 12 and 0 <= d <= 31 and y > 0:
            return y, m, d
    return None


def _date(text: str) -> datetime.date:
    """Return a date; a missing month is January, a missing day the first."""
    found = parse_date(text)
    try:
        if found is None:
            raise ValueError
        return datetime.date(found[0], found[1] or 1, found[2] or 1)
    except ValueError:
        raise ToolFailure("invalid_arguments", "not a date; write 2 November 1932, July 23, 1968 or 1968") from None


def number(text: str) -> float | None:
    """A number, with commas between thousands; None if the text is none, or not finite."""
    try:
        value = float(text.replace(",", "").strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None


CALCULATOR = ToolSpec(
    "calculator",
    "The value of an arithmetic expression.",
    _object(expression={**_TEXT, "maxLength": MAX_EXPRESSION, "description": "Numbers, + - * / and brackets."}),
    _object(result={"type": "number"}),
    "calculator",
)
DATE_DIFFERENCE = ToolSpec(
    "date_difference",
    "The days and full years from one date to another.",
    _object(start={**_TEXT, "description": "A date."}, end={**_TEXT, "description": "A date."}),
    _object(days={"type": "integer"}, years={"type": "integer"}),
    "date_difference",
)
COMPARE = ToolSpec(
    "compare",
    "Compares two numbers or two dates; an earlier date is smaller.",
    _object(a={**_TEXT, "description": "A number or a date."}, b={**_TEXT, "description": "Another one."}),
    _object(a_is={"type": "string", "enum": ["smaller", "equal", "larger", "different"]}),
    "compare",
)
SEARCH_TOOL = ToolSpec(
    "search",
    "The passages that fit a query best.",
    _object(query={**_TEXT, "maxLength": 1000, "description": "A name or a few words."}),
    _object(passages={"type": "array", "items": {"type": "string"}, "maxItems": 10}),
    SEARCH,
)
UTILITIES: dict[str, tuple[ToolSpec, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "calculator": (CALCULATOR, _calculator),
    "date_difference": (DATE_DIFFERENCE, _date_difference),
    "compare": (COMPARE, _compare),
}  # kinds that no backend is asked for


def run_utility(kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The output of a utility tool. ToolFailure if its arguments make no sense."""
    return UTILITIES[kind][1](arguments)
