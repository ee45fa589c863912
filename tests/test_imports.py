"""The import graph: no cycle between files or packages, packages import as docs/architecture.md says, kernels stand alone."""

from __future__ import annotations

import ast
import functools
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pact_fast"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
EVERYWHERE = {
    "errors",
    "files",
    "limits",
    "plugins",
    "registry",
    "streams",
    "text",
}  # leaves that any package may import


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py") if "csrc" not in path.parts}


def imports_of(module: str) -> set[str]:
    """Modules of the package that a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in FILES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in FILES} - {module}


@functools.cache
def graph() -> dict[str, set[str]]:
    return {module: imports_of(module) for module in FILES}


def top(module: str) -> str:
    """The package or top-level module that a file belongs to."""
    return module.split(".")[1] if "." in module else ""


PACKAGES = sorted({top(module) for module in FILES} - {""})


def test_no_two_files_import_each_other_in_a_circle():
    try:
        tuple(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_no_two_packages_import_each_other_in_a_circle():
    packages: dict[str, set[str]] = {name: set() for name in PACKAGES}
    for module, imported in graph().items():
        if top(module):
            packages[top(module)] |= {top(name) for name in imported} - {"", top(module)}
    try:
        tuple(TopologicalSorter(packages).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_exactly_what_the_architecture_page_says(package):
    """Nothing more is imported, and nothing that the row names is unused."""
    row = re.search(rf"^\| `{package}(?:/|\.py)` \|.*\|(.*)\|$", PAGE, re.MULTILINE)
    if package in EVERYWHERE | {"__main__"}:
        return
    assert row, f"docs/architecture.md has no row for {package}"
    named = {name.split(".")[0] for name in re.findall(r"`([\w.]+)`", row[1])}
    imported = {top(name) for module in FILES if top(module) == package for name in graph()[module]}
    assert imported - {package, ""} - EVERYWHERE == named


@pytest.mark.parametrize("package", [name for name in PACKAGES if (PACKAGE / name).is_dir()])
def test_every_package_says_what_it_is_for(package):
    for path in [PACKAGE / package, *(PACKAGE / package).rglob("*/")]:
        if (path / "__init__.py").exists():
            assert ast.get_docstring(ast.parse((path / "__init__.py").read_text("utf-8"))), f"{path} has no docstring"


@pytest.mark.parametrize("package", ["batch", "config", "data", "rewards"])
def test_these_packages_never_import_torch(package):
    for module in FILES:
        if top(module) == package:
            text = FILES[module].read_text(encoding="utf-8")
            assert not re.search(r"^(?:import|from) (?:torch|transformers)\b", text, re.MULTILINE), module


def test_nothing_but_the_command_line_imports_the_trainer():
    assert {top(module) for module, names in graph().items() if any(top(n) == "train" for n in names)} <= {
        "train",
        "cli",
    }
