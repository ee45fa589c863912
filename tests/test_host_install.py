"""`pip install pact-fast` into the environment of a host trainer: no version that the host has is asked to change."""

from __future__ import annotations

import importlib.metadata
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
HOST = ("torch", "transformers", "trl")


def requirements(package: str) -> Iterator[Requirement]:
    """Yield the requirements of an installed package on this machine, without extras."""
    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:  # for another platform, or optional
        return
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def closure(packages: list[str]) -> set[str]:
    found: set[str] = set()
    left = [canonicalize_name(name) for name in packages]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += [canonicalize_name(r.name) for r in requirements(name)]
    return found


def demands() -> Iterator[tuple[str, Requirement]]:
    """(who, requirement) of our dependencies, and of everything that only they bring into the environment."""
    ours = [Requirement(line) for line in PROJECT["dependencies"]]
    yield from (("pact-fast", requirement) for requirement in ours)
    for package in closure([r.name for r in ours]) - closure(list(HOST)):
        yield from ((package, requirement) for requirement in requirements(package))


def test_every_version_that_the_host_has_is_allowed():
    pytest.importorskip("trl")
    kept = closure(list(HOST))
    checked = 0
    for who, requirement in demands():
        name = canonicalize_name(requirement.name)
        if name in kept:
            checked += 1
            version = importlib.metadata.version(name)
            assert requirement.specifier.contains(version, prereleases=True), f"{who} asks for {requirement}"
    assert checked > 5


def test_no_dependency_has_an_upper_bound():
    """A host with a newer torch or transformers than ours would be downgraded."""
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert all(part.operator in (">=", "!=") for part in requirement.specifier), str(requirement)
