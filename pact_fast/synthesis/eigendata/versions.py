"""Prompts and workflow as versioned files: `versions/0003/workflow.yaml`. A version is never changed once written.

The rules read settings (`*.yaml`); roles that a model plays read prompts (`*.md`) in the same folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import yaml

from pact_fast.errors import PactError
from pact_fast.files import io_errors, remove, write_text
from pact_fast.registry import did_you_mean

START = Path(__file__).parent / "start"  # version 1 of a new folder
CURE = "free some space and run the command again, which continues"
STAGES = ("synthesis", "verification", "rollout", "assessment")

# file → key → values that it may have; a type stands for any number of it
CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "synthesis.yaml": {
        "combine": ("one_per_group", "any"),  # issues of one task
        "last_steps": ("once", "never", "each"),  # steps after all fixes: made once, not made, made after every fix
        "compare_state": (True, False),
        "assertions": (True, False),
        "normalise": ("bookkeeping", "nothing"),
        "user_tells": ("complaint", "everything"),
        "must_say": (True, False),
    },
    "user.yaml": {"patience": (int,), "greeting": ("none", "short")},
    "workflow.yaml": {
        "stages": (list,),
        "retries": (int,),
        "rollouts": (int,),
        "max_messages": (int,),
        "min_score": (float, int),
        "max_similarity": (float, int),
        "max_issues": (int,),
    },
}


@dataclass(frozen=True)
class Version:
    """One state of prompts and workflow.

    number  from 1
    parent  the version that it was made from; 0: the start
    files   {file name: text}
    """

    number: int
    parent: int
    files: Mapping[str, str]
    _parsed: dict[str, dict[str, Any]] = field(default_factory=dict, compare=False, repr=False)

    def settings(self, file: str) -> dict[str, Any]:
        """The content of a YAML file of the version, checked when the version was made."""
        if file not in self._parsed:
            self._parsed[file] = check(file, self.files[file])
        return self._parsed[file]

    @property
    def digest(self) -> str:
        """SHA-256 of the files, the first 12 digits: equal for equal files."""
        return hashlib.sha256(json.dumps(dict(self.files), sort_keys=True).encode()).hexdigest()[:12]

    def label(self, file: str) -> str:
        """`synthesis.yaml@3:1f2e…`: names the version of one file, as accepted instances do."""
        return f"{file}@{self.number}:{hashlib.sha256(self.files[file].encode()).hexdigest()[:8]}"

    def prompt(self, file: str, **values: str) -> str:
        """A prompt with its $names filled in. PactError if the version has no such file."""
        if file not in self.files:
            raise PactError(f"version {self.number} of prompts and workflow has no {file}; copy it from {START / file}")
        return Template(self.files[file]).safe_substitute(values)

    def changed(self, number: int, changes: Mapping[str, Mapping[str, Any]]) -> Version:
        """A new version with some keys changed, or the `text` of a prompt. PactError if a key or value is unknown."""
        files = dict(self.files)
        for file, values in changes.items():
            if file in files and file.endswith(".md") and isinstance(values.get("text"), str):
                files[file] = values["text"]
                continue
            if file not in CHOICES:
                raise PactError(f"there is no file {file} to change; the files are {', '.join(files)}")
            files[file] = yaml.safe_dump({**self.settings(file), **values}, sort_keys=False)
            check(file, files[file])
        return Version(number, self.number, files)

    def save(self, folder: Path) -> None:
        """Write it to `folder`/0003, replacing leftovers of a killed process."""
        target = folder / f"{self.number:04d}"
        with io_errors(target, CURE):
            remove(target)
            target.mkdir(parents=True)
        for name, text in self.files.items():
            write_text(target / name, text, CURE)
        write_text(target / "parent", f"{self.parent}\n", CURE)

    @classmethod
    def load(cls, folder: Path, number: int) -> Version:
        """PactError if the folder has no such version, or a file of it is wrong."""
        return cls.read(folder / f"{number:04d}", number)

    @classmethod
    def read(cls, folder: Path, number: int = 1) -> Version:
        """A version from the files of a folder. PactError if one is missing or wrong."""
        try:
            files = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.*"))}
            parent = folder / "parent"
            version = cls(number, int(parent.read_text()) if parent.exists() else 0, files)
        except (OSError, ValueError) as error:
            raise PactError(f"{folder} holds no prompts and workflow: {error}; remove it to start again") from None
        for name in CHOICES:
            if name not in version.files:
                raise PactError(f"{folder} has no {name}; copy it from {START}")
            version.settings(name)
        return version


def check(file: str, text: str) -> dict[str, Any]:
    """The settings in a YAML file. PactError that names file and key if they are wrong."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PactError(f"{file} is not YAML: {' '.join(str(error).split())[:120]}; correct it") from None
    known = CHOICES.get(file)
    if known is None or not isinstance(values, dict):
        raise PactError(f"{file} must be a mapping of settings; the files are {', '.join(CHOICES)}")
    for key in known:
        if key not in values:
            raise PactError(f"{file} lacks '{key}'; copy it from {START / file}")
    for key, value in values.items():
        if key not in known:
            raise PactError(f"{file}: unknown key '{key}'{did_you_mean(str(key), list(known))}")
        choices = known[key]
        types = tuple(choice for choice in choices if isinstance(choice, type))
        fits = isinstance(value, types) and not isinstance(value, bool) if types else value in choices
        if not fits:
            expected = ", ".join(choice.__name__ if isinstance(choice, type) else str(choice) for choice in choices)
            raise PactError(f"{file}: {key} is {value!r}; it must be one of: {expected}")
    if file == "workflow.yaml":
        _check_stages(values["stages"])
    return values


def _check_stages(stages: list[Any]) -> None:
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or len(set(stages)) != len(stages) or stages[:1] != ["synthesis"]:
        raise PactError(f"workflow.yaml: stages must begin with synthesis and be among {', '.join(STAGES)}, each once")
    if "assessment" in stages and "rollout" not in stages[: stages.index("assessment")]:
        raise PactError("workflow.yaml: the stage assessment needs rollout before it")
