"""Makes the recurrent layers of a transformers model compute packed trees.

The code of a layer finds its functions by name in its module. There they are replaced, once, by dispatchers: a call with
`tree_layout` among its arguments computes the tree (rules.py), any other call is passed on unchanged. Replacing them
for good and not only within `tree_forward` serves gradient checkpointing, which runs layers again in the backward pass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pact_fast.model.recurrence.rules import RULES

STATES = {"torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention", "mamba2_chunk_scan"}  # rules with a state

_inside_tree = False  # in the forward pass of a tree


def recurrent_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that call a function of RULES."""
    return [module for module in model.modules() if called_by(module)]


def follows_tree(layer: torch.nn.Module, kind: str) -> bool:
    """Whether a decoder layer of `kind` (an entry of config.layer_types) has only recurrences of RULES."""
    called = [names for module in layer.modules() if (names := called_by(module))]
    if kind == "conv":
        return bool(called)
    return any(not STATES.isdisjoint(names) for names in called)


def called_by(module: Any) -> frozenset[str]:
    """The names of RULES that the module's forward calls."""
    cls: Any = type(module)
    return _called(cls)


@functools.cache
def _called(cls: Any) -> frozenset[str]:
    code = getattr(_forward(cls), "__code__", None)
    return frozenset(code.co_names if code else ()) & frozenset(RULES)


def _forward(cls: Any) -> Any:
    """The class's forward without its decorators."""
    return inspect.unwrap(cls.forward)


def install(model: torch.nn.Module) -> None:
    """Put the dispatchers into the modules of the model's code."""
    for layer in recurrent_layers(model):
        namespace = _forward(type(layer)).__globals__
        for name in called_by(layer):
            if not hasattr(namespace[name], "tree_rule"):
                namespace[name] = dispatcher(namespace[name], RULES[name])


def dispatcher(original: Callable[..., Any], rule: Callable[..., Any]) -> Callable[..., Any]:
    """A function that computes `rule` on trees and `original` elsewhere. RuntimeError inside a tree without its layout."""
    on_tree = torch.compiler.disable(rule)

    @functools.wraps(original)
    def dispatch(*args: Any, tree_layout: Any = None, **kwargs: Any) -> Any:
        if tree_layout is not None:
            return on_tree(original, tree_layout.recurrence, *args, **kwargs)
        if _inside_tree:
            raise RuntimeError(
                f"{original.__name__} got no tree_layout: the model's layers must pass their keyword arguments on"
            )
        return original(*args, **kwargs)

    dispatch.tree_rule = rule  # type: ignore[attr-defined]
    return dispatch


@contextmanager
def inside_tree() -> Iterator[None]:
    """While a tree is computed, a recurrence that is not told so would run over all branches as one sequence."""
    global _inside_tree
    _inside_tree = True
    try:
        yield
    finally:
        _inside_tree = False
