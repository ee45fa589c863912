"""Whether single-turn calls are accepted: the verdict of the official ast_checker for Python, data against data.

Every argument of the ground truth lists its accepted values; "" among them means that it may be left out. Texts are compared
without case, blanks and `,./-_*^`, and with one kind of quotes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pact_fast.envs.bfcl.entries import Function

Call = Mapping[str, Mapping[str, Any]]  # {name: arguments}
_TYPES: dict[str, type] = {
    "string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list, "dict": dict,
    "any": str,
}  # fmt: skip
_NESTED = ("array", "tuple")
_IGNORED = re.compile(r"[ \,\.\/\-\_\*\^]")


def mismatch(category: str, functions: Sequence[Function], calls: Sequence[Call], truth: Sequence[Call]) -> str | None:
    """The reason why the calls are wrong, or None if they are accepted.

    Args:
        category: `parallel` ones match calls in any order; `multiple` ones and simple ones have one call.
        functions: Documents of the offered functions.
        calls: What the policy called.
        truth: The expected calls with their accepted values.
    """
    if len(calls) != len(truth):
        return f"{len(calls)} calls where {len(truth)} are expected"
    try:
        if "parallel" in category:
            return _any_order(functions, calls, truth)
        name = next(iter(truth[0]))
        function = _document(functions, name) if "multiple" in category else functions[0]
        return _call_mismatch(function, calls[0], truth[0])
    except (KeyError, TypeError, AttributeError, RecursionError) as error:  # the official checker fails there, too
        return f"cannot be compared: {type(error).__name__}"


def _any_order(functions: Sequence[Function], calls: Sequence[Call], truth: Sequence[Call]) -> str | None:
    """Each expected call in turn takes the first call that fits."""
    left = list(calls)
    for expected in truth:
        function = _document(functions, next(iter(expected)))
        found = next((i for i, call in enumerate(left) if _call_mismatch(function, call, expected) is None), None)
        if found is None:
            return f"no call fits the expected {next(iter(expected))}"
        left.pop(found)
    return None


def _document(functions: Sequence[Function], name: str) -> Function:
    found = next((function for function in functions if function["name"] == name), None)
    if found is None:
        raise KeyError(name)
    return found


def _call_mismatch(function: Function, call: Call, expected: Call) -> str | None:
    accepted = next(iter(expected.values()))
    properties = function["parameters"]["properties"]
    if function["name"] not in call:
        return f"the function {function['name']} is not called"
    arguments = call[function["name"]]
    for name in function["parameters"]["required"]:
        if name not in arguments:
            return f"the required argument {name} is missing"
    for name, value in arguments.items():
        if name not in properties or name not in accepted:
            return f"the argument {name} is not expected"
        if not _accepts(properties[name], value, accepted[name]):
            return f"the argument {name} has a wrong value"
    for name, values in accepted.items():
        if name not in arguments and "" not in values:
            return f"the argument {name} is missing"
    return None


def _accepts(schema: Mapping[str, Any], value: Any, accepted: Sequence[Any]) -> bool:
    declared = schema["type"]
    kind = _TYPES[declared]
    nested = _TYPES[schema["items"]["type"]] if declared in _NESTED else None
    if declared == "tuple" and type(value) is tuple:
        value = list(value)
    if declared == "float" and type(value) is int:
        value = float(value)
    if not _type_fits(value, accepted, kind, nested):
        return False
    if not _is_variable(accepted, kind):  # else: a name stands for a value, and is compared as it is
        if kind is dict:
            return any(possible != "" and _dict_fits(value, possible) for possible in accepted)
        if kind is list and nested is dict:
            return any(_dicts_fit(value, possible) for possible in accepted)
        if kind is str:
            return _plain(value) in [_plain(possible) for possible in accepted if type(possible) is str]
        if kind is list:
            return _plain_list(value) in [_plain_list(possible) for possible in accepted]
    return value in accepted


def _is_variable(accepted: Sequence[Any], kind: type) -> bool:
    """Whether the accepted values are of another type than the declared one: they name a variable."""
    first = next((type(possible) for possible in accepted if possible != ""), None)
    return first is not None and first is not kind


def _type_fits(value: Any, accepted: Sequence[Any], kind: type, nested: type | None) -> bool:
    if type(value) is kind:
        return nested is None or any(_items_fit(value, possible, nested) for possible in accepted)
    first = next((type(possible) for possible in accepted if possible != ""), None)
    return first is not None and type(value) is first


def _items_fit(value: Any, possible: Any, nested: type) -> bool:
    return type(possible) is not list or all(_type_fits(item, possible, nested, None) for item in value)


def _dict_fits(value: Mapping[str, Any], possible: Mapping[str, Sequence[Any]]) -> bool:
    for key, item in value.items():
        if key not in possible or _plain(item) not in [_plain(other) for other in possible[key]]:
            return False
    return all(key in value or "" in others for key, others in possible.items())


def _dicts_fit(value: Sequence[Any], possible: Sequence[Any]) -> bool:
    return len(value) == len(possible) and all(
        other != "" and _dict_fits(item, other) for item, other in zip(value, possible, strict=True)
    )


def _plain_list(items: Sequence[Any]) -> list[Any]:
    return [_plain(item) for item in items]


def _plain(value: Any) -> Any:
    """A text in the form that is compared; anything else as it is."""
    return _IGNORED.sub("", value).lower().replace("'", '"') if type(value) is str else value
