"""The tool `calculate`: arithmetic of a text that a model wrote, in bounded time and memory.

The package evaluates the text with `eval`; `9**9**9` then runs for minutes and cannot be interrupted. Here the text is
parsed, and only numbers, + - * / // ** and parentheses are computed, by Python's own operators, so that results and
error messages are the same.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

MAX_LENGTH = 500  # characters of an expression
MAX_BITS = 4096  # of an integer result; a float ends at 1024
_ALLOWED = frozenset("0123456789+-*/(). ")

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str:
    """The value of an arithmetic expression, rounded to two decimals.

    Raises:
        ValueError, SyntaxError, ArithmeticError, TypeError: The expression is none, too long or its value too large.
    """
    if not isinstance(expression, str) or not _ALLOWED.issuperset(expression):
        raise ValueError("Invalid characters in expression")
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"the expression is longer than {MAX_LENGTH} characters")
    tree = ast.parse(expression.lstrip(" "), filename="<string>", mode="eval")  # as eval() strips and names it
    return str(round(float(_value(tree.body)), 2))


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _BINARY:
            return _bounded(_BINARY[type(node.op)](left, right))
    raise ValueError("the expression may contain numbers, + - * / and parentheses only")


def _power(base: Any, exponent: Any) -> Any:
    """base ** exponent; the size of an integer result is bounded before it is computed."""
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and abs(base) > 1 and exponent > 0 and exponent * math.log2(abs(base)) > MAX_BITS:
        raise OverflowError("the result is too large")
    return _bounded(base**exponent)


def _bounded(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise OverflowError("the result is too large")
    return value
