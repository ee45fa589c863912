"""Sources of rows: files, glob patterns, and datasets of the Hugging Face Hub, all read in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pact_fast.config import DataConfig, HubDataset, expand_pattern, source_names
from pact_fast.config.data_source import HUB
from pact_fast.data.hub import hub_files, hub_rows, pin
from pact_fast.data.row_files import NumberedRow, file_rows
from pact_fast.errors import DataError

Source = str | Path


@dataclass(frozen=True)
class RowSource:
    """One file, or one split of a dataset.

    name   for messages: the path, or the dataset with its split
    stem   start of the ids of rows without an id
    rows   makes an iterator over (line or row number from 1, the row or the reason why it cannot be read)
    files  finds (name for messages, path) of the local files that hold its rows, one after the other; none: there are no
           such files
    lines  rows are counted as lines of the file
    """

    name: str
    stem: str
    rows: Callable[[], Iterator[NumberedRow]]
    files: Callable[[], list[tuple[str, Path]]]
    lines: bool


def row_sources(sources: Source | Sequence[Source], max_rows: int | None = None) -> list[RowSource]:
    """The sources that names stand for, in their order. Nothing is opened yet.

    Args:
        sources: A path, a pattern of paths, a dataset as `hf://org/name@revision/config:split`, or several of them.
        max_rows: The caller will read at most this many rows of each; None: all.

    Raises:
        DataError: A pattern fits no file, or the name of a dataset is malformed.
    """
    names = [sources] if isinstance(sources, str | Path) else sources
    return [_row_source(name, max_rows) for given in names for name in _expanded(str(given))]


def resolve_data(data: DataConfig, recorded: DataConfig | None = None) -> DataConfig:
    """Return the settings with resolved names: patterns as lists of files, datasets with their commit.

    Args:
        data: The settings as given.
        recorded: Those of the run that is resumed. A dataset without a revision keeps the commit that stands there, though
            its main branch may have moved: the run continues with its original rows.

    Raises:
        DataError: A pattern fits no file, or a dataset cannot be looked up.
    """
    update = {}
    for key in ("train", "eval", "expert"):
        value = getattr(data, key)
        commits = _commits(source_names(getattr(recorded, key, None)))
        found = [_resolved(name, commits) for given in source_names(value) for name in _expanded(given)]
        update[key] = value if found == source_names(value) else found[0] if len(found) == 1 else found
    return data.model_copy(update=update)


def _resolved(name: str, commits: dict[HubDataset, str]) -> str:
    """A name with its commit, if it is a dataset. `commits`: of datasets without a revision."""
    if not name.startswith(HUB):
        return name
    dataset = HubDataset.parse(name)
    return str(dataset.at(commits[dataset]) if dataset in commits else pin(dataset))


def _commits(names: list[str]) -> dict[HubDataset, str]:
    """The recorded commit of every dataset, under the dataset without it."""
    datasets = [HubDataset.parse(name) for name in names if name.startswith(HUB)]
    return {replace(dataset, revision=None): dataset.revision for dataset in datasets if dataset.revision}


def _row_source(name: str, max_rows: int | None) -> RowSource:
    if not name.startswith(HUB):
        path = Path(name)
        return RowSource(name, path.stem, partial(file_rows, path), lambda: [(name, path)], lines=True)
    try:
        dataset = HubDataset.parse(name)
    except ValueError as error:
        raise DataError(str(error)) from None
    stem = f"{dataset.repo.partition('/')[2]}-{dataset.split}"
    part = max_rows is not None  # read over the network
    files: Callable[[], list[tuple[str, Path]]] = list if part else partial(hub_files, dataset)
    return RowSource(dataset.label, stem, partial(hub_rows, dataset, part), files, lines=False)


def _expanded(name: str) -> list[str]:
    try:
        return expand_pattern(name)
    except ValueError as error:
        raise DataError(str(error)) from None
