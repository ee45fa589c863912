"""Reads YAML that may come from a stranger: in a bounded time and memory, and with one-line errors.

An alias (*name) costs nothing to read and stands for all that its anchor stands for, so that a few lines of aliases of
aliases are billions of values when they are written out again. The node graph is therefore measured before it becomes
values.
"""

from __future__ import annotations

from typing import Any

import yaml

from pact_fast.errors import PactError, error_line

MAX_CHARACTERS = 100_000
MAX_VALUES = 10_000  # with aliases written out
MAX_DEPTH = 50
TOO_DEEP = f"is nested more than {MAX_DEPTH} levels deep; settings are not that deep"
TOO_MANY = f"stands for more than {MAX_VALUES:,} values (aliases written out); write fewer"


class _Loader(yaml.SafeLoader):
    """Stops at the limits while it reads: its scanner takes quadratic time in the depth of brackets."""

    values = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level >= MAX_DEPTH:
            raise PactError(TOO_DEEP)
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        self.values += 1
        if self.values > MAX_VALUES:
            raise PactError(TOO_MANY)
        if len(self.states) > 4 * MAX_DEPTH:  # block collections; the parser stacks a state or two for each
            raise PactError(TOO_DEEP)
        return super().compose_node(parent, index)


def load_yaml(text: str) -> Any:
    """The value of a YAML document. PactError, without the place, if it is not valid or too large."""
    if len(text) > MAX_CHARACTERS:
        raise PactError(f"has {len(text):,} characters; settings are at most {MAX_CHARACTERS:,} long")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, 0, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise PactError(f"is not valid YAML: {_explain(error)}") from None
    except yaml.YAMLError as error:
        raise PactError(f"is not valid YAML: {error_line(error)}") from None
    except RecursionError:
        raise PactError(TOO_DEEP) from None
    except (ValueError, TypeError, OverflowError, AttributeError) as error:  # of dates, numbers and keys that are none
        raise PactError(f"has a value that cannot be read: {error_line(error)}; quote it if it is text") from None


def _measure(node: yaml.Node, depth: int, sizes: dict[int, int]) -> int:
    """Number of values below a node with aliases written out. `sizes`: of nodes that were measured; 0 for those above."""
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise PactError("has an alias inside its own anchor; write the values out")
        return sizes[id(node)]
    if depth > MAX_DEPTH:
        raise PactError(TOO_DEEP)
    sizes[id(node)] = 0
    size = 1
    if isinstance(node, yaml.CollectionNode):
        for entry in node.value:
            for part in entry if isinstance(entry, tuple) else (entry,):
                size += _measure(part, depth + 1, sizes)
                if size > MAX_VALUES:
                    raise PactError(TOO_MANY)
    sizes[id(node)] = size
    return size


def _explain(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + " ".join(filter(None, (error.context, error.problem)))[:200]
