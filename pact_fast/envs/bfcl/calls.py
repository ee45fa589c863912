"""Calls in Python's notation, `[f(a=1), g(b="x")]`, read as data. Nothing that a model wrote is ever evaluated.

The text is parsed to a syntax tree with `ast`, and literals are taken from the tree. What the benchmark's own decoder
takes besides literals is text here, too: a bare name (`x=CITY`) is its name, an indexed or nested call is its source.
"""

from __future__ import annotations

import ast
import warnings
from dataclasses import dataclass
from typing import Any

MAX_CHARACTERS = 50_000
MAX_NESTING = 40
MAX_CALLS = 256


@dataclass(frozen=True)
class PythonCall:
    """One call.

    name      dotted name
    args      positional arguments
    kwargs    arguments by name
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        """The call as the benchmark prints it."""
        return f"{self.name}({', '.join([*map(repr, self.args), *(f'{k}={v!r}' for k, v in self.kwargs.items())])})"


def read_turn(text: str) -> list[PythonCall]:
    """The calls of an assistant turn, one or a list, with or without brackets and back quotes around them.

    Positional arguments are dropped, as by the benchmark's decoder. Raises ValueError if the turn is not a list of calls.
    """
    text = text.strip("`\n ")
    text = text if text.startswith("[") else f"[{text}"
    text = text if text.endswith("]") else f"{text}]"
    body = _parse(text.strip().strip("'"))
    if not isinstance(body, ast.List | ast.Tuple):
        raise ValueError("not a list of calls")
    if len(body.elts) > MAX_CALLS:
        raise ValueError(f"more than {MAX_CALLS} calls")
    found = [_call(node) for node in body.elts]
    return [PythonCall(call.name, (), call.kwargs) for call in found]


def read_call(text: str) -> PythonCall:
    """One call, with its positional arguments: a string of the benchmark's ground truth. ValueError if it is none."""
    return _call(_parse(text))


def _parse(text: str) -> ast.expr:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"more than {MAX_CHARACTERS:,} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes such as "\d"
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not Python's notation: {type(error).__name__}") from None


def _call(node: ast.expr) -> PythonCall:
    if not isinstance(node, ast.Call):
        raise ValueError("not a call")
    args = tuple(_value(item, MAX_NESTING) for item in node.args)
    kwargs: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("arguments cannot be unpacked")
        kwargs[keyword.arg] = _value(keyword.value, MAX_NESTING)
    return PythonCall(_name(node.func), args, kwargs)


def _name(node: ast.expr) -> str:
    """`a.b.c`. Something else at its root, such as a call, contributes nothing, as in the benchmark's decoder."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute) and len(parts) < MAX_NESTING:
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        parts.append(node.id)
    return ".".join(reversed(parts))


def _value(node: ast.expr, depth: int) -> Any:
    """The value of a literal. ValueError for anything that would have to be computed."""
    if depth == 0:
        raise ValueError("nested too deeply")
    match node:
        case ast.Constant(value=value):
            return "..." if value is Ellipsis else value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if isinstance(value, int | float | complex):
            return -value
        case ast.List(elts=items):
            return [_value(item, depth - 1) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item, depth - 1) for item in items)
        case ast.Dict(keys=keys, values=values):
            return _dict(keys, values, depth - 1)
        case ast.Name(id=name):
            return name
        case ast.Call() | ast.Subscript():
            return _source(node)
    raise ValueError(f"{type(node).__name__} is no literal")


def _dict(keys: list[ast.expr | None], values: list[ast.expr], depth: int) -> dict[Any, Any]:
    found = {}
    for key, value in zip(keys, values, strict=True):
        if key is None:
            raise ValueError("a dict cannot be unpacked")
        name = _value(key, depth)
        if not isinstance(name, str | int | float | bool | None):
            raise ValueError("the key of a dict must be text or a number")
        found[name] = _value(value, depth)
    return found


def _source(node: ast.expr) -> str:
    try:
        return ast.unparse(node)
    except (RecursionError, MemoryError):
        raise ValueError("nested too deeply") from None
