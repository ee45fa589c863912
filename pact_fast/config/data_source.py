"""Names of data sources in a configuration: paths of files, patterns of paths, and datasets of the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import glob
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

HUB = "hf://"
EXAMPLE = "hf://org/name:train, with a revision and a config hf://org/name@revision/config:train"

_NAME = r"[A-Za-z0-9][\w.-]*"
_REVISION = r"refs/(?:convert|pr)/[^/:@]+|[^/:@]+"
_FORM = re.compile(
    rf"(?:datasets/(?={_NAME}/))?(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>{_REVISION}))?(?:/(?P<config>[^/:@]+))?:(?P<split>\w+(?:\.\w+)*)"
)
_SHA = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubDataset:
    """A split of a dataset of the Hugging Face Hub, written `hf://org/name@revision/config:split`.

    repo      `org/name`
    split     name of the split
    config    name of the dataset's config (subset); None: its default one
    revision  branch, tag or commit; None: the main branch
    """

    repo: str
    split: str
    config: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubDataset:
        """The dataset that a name stands for. ValueError, with the form of such names, if it has another one."""
        found = _FORM.fullmatch(text.removeprefix(HUB))
        if found is None:
            rest = text.removeprefix(HUB)
            if re.search(r":[^:/]*\[", rest):
                raise ValueError(f"{text}: a split cannot be sliced; name the whole split, and set data.max_rows")
            if ":" not in rest:
                raise ValueError(f"{text} names no split; write {EXAMPLE}")
            raise ValueError(f"{text} is not the name of a dataset; write {EXAMPLE}")
        revision = found["revision"]
        return cls(found["repo"], found["split"], found["config"], revision and unquote(revision))

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, so that the rows can never change."""
        return bool(self.revision and _SHA.fullmatch(self.revision))

    @property
    def label(self) -> str:
        """The name for messages, with a commit cut to seven digits."""
        if not self.revision or not self.is_pinned:
            return str(self)
        return str(self.at(self.revision[:7]))

    def at(self, revision: str) -> HubDataset:
        """The same split at another revision."""
        return dataclasses.replace(self, revision=revision)

    def __str__(self) -> str:
        revision = ""
        if self.revision:
            special = self.revision.startswith(("refs/convert/", "refs/pr/"))
            revision = "@" + quote(self.revision, safe="/" if special else "")
        return f"{HUB}{self.repo}{revision}{'/' + self.config if self.config else ''}:{self.split}"


def source_names(value: str | list[str] | None) -> list[str]:
    """The sources of a setting that is one name, a list of names, or null."""
    return [value] if isinstance(value, str) else list(value or ())


def expand_pattern(name: str) -> list[str]:
    """The files that a pattern such as `shards/*.jsonl` stands for, sorted; any other name as it is.

    `**` stands for any number of folders. ValueError if no file fits.
    """
    if name.startswith(HUB) or not glob.has_magic(name) or Path(name).exists():
        return [name]
    found = sorted(path for path in glob.glob(name, recursive=True) if Path(path).is_file())
    if not found:
        raise ValueError(f"no file fits the pattern {name}; check the path, which is relative to the current directory")
    return found
