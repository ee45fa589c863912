"""Rows of datasets of the Hugging Face Hub, read from the dataset's own files as rows of local files are.

`datasets` says which files a split consists of (by the dataset card, or by their names); it loads no code of the dataset.
The files are read by `row_files`: JSON that passed through Arrow would have other types (dates, padded objects).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pact_fast.config import HubDataset
from pact_fast.data.row_files import NumberedRow, not_empty, rows_of
from pact_fast.errors import DataError, PactError, error_line

READABLE = (".jsonl", ".ndjson", ".json", ".parquet")
MISSING = "a dataset of the Hub (hf://…) needs the package datasets: pip install 'pact-fast[datasets]'"


def pin(dataset: HubDataset) -> HubDataset:
    """The dataset at the commit that its branch or tag has now, so that all ranks and every resumed run read the same.

    Raises:
        DataError: There is no such dataset or revision, it is not accessible, or the Hub cannot be reached.
        PactError: `datasets` is not installed.
    """
    if dataset.is_pinned:
        return dataset
    with _hub_errors(dataset):
        from huggingface_hub import HfApi

        commit = HfApi().dataset_info(dataset.repo, revision=dataset.revision, timeout=60).sha
    assert commit
    return dataset.at(commit)


def hub_rows(dataset: HubDataset, part: bool) -> Iterator[NumberedRow]:
    """(row number in the split from 1, the row or the reason why it cannot be read).

    Args:
        dataset: The split.
        part: The caller will stop before the end: read only the requested rows over the network. Else whole files are
            downloaded to the cache of huggingface_hub, one after the other, where the next run finds them.

    Raises:
        DataError: As `pin`; or no such config or split, or a file that cannot be read.
        PactError: `datasets` is not installed.
    """
    dataset = pin(dataset)
    return not_empty(dataset.label, _numbered(dataset, part))


def hub_files(dataset: HubDataset) -> list[tuple[str, Path]]:
    """(name for messages, path in the cache of huggingface_hub) of a split's files, downloaded. Raises as `hub_rows`."""
    dataset = pin(dataset)
    found = []
    for path in _files(dataset):
        with _hub_errors(dataset):
            found.append((f"{dataset.label}: {path}", _download(dataset, path)))
    return found


def _numbered(dataset: HubDataset, part: bool) -> Iterator[NumberedRow]:
    number = 0
    for path in _files(dataset):
        with _hub_errors(dataset), _open(dataset, path, part) as file:
            for _, row in rows_of(f"{dataset.label}: {path}", file):
                number += 1
                yield number, row


def _files(dataset: HubDataset) -> list[str]:
    """Paths of the split's files in the repository, in the order of `datasets`."""
    with _hub_errors(dataset):
        from datasets import load_dataset_builder

        builder = load_dataset_builder(f"hf://datasets/{dataset.repo}", dataset.config, revision=dataset.revision)
        splits = builder.config.data_files or {}
    if dataset.split not in splits:
        known = ", ".join(sorted(map(str, splits))) or "none"
        raise DataError(f"there is no split '{dataset.split}'; its splits: {known}", file=dataset.label)
    start = f"hf://datasets/{dataset.repo}@{dataset.revision}/"
    files = [str(file) for file in splits[dataset.split]]
    other = [file for file in files if not file.startswith(start)]
    if other:  # a card may name files of another repository, which the revision does not hold fast
        raise DataError(f"its file {other[0]} is not in the repository at that revision", file=dataset.label)
    unreadable = [file for file in files if PurePosixPath(file).suffix.lower() not in READABLE]
    if unreadable:
        raise DataError(
            f"its file {unreadable[0].removeprefix(start)} is neither JSON lines, a JSON array nor parquet; convert it",
            file=dataset.label,
        )
    return [file.removeprefix(start) for file in files]


def _open(dataset: HubDataset, path: str, part: bool) -> BinaryIO:
    """An open file of the repository, readable in any order."""
    if part:
        from huggingface_hub import HfFileSystem

        return HfFileSystem().open(f"datasets/{dataset.repo}@{dataset.revision}/{path}", "rb")
    return _download(dataset, path).open("rb")


def _download(dataset: HubDataset, path: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(dataset.repo, path, repo_type="dataset", revision=dataset.revision))


@contextmanager
def _hub_errors(dataset: HubDataset) -> Iterator[None]:
    """Turn any exception of the libraries, which have a dozen families of them, into a DataError with the cure."""
    try:
        yield
    except PactError:
        raise
    except ImportError as error:
        if (error.name or "").partition(".")[0] in ("datasets", "huggingface_hub"):
            raise PactError(MISSING) from None
        raise
    except Exception as error:
        raise DataError(_problem(dataset, error), file=dataset.label) from None


def _problem(dataset: HubDataset, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"{constants.ENDPOINT}/datasets/{dataset.repo}"
    if isinstance(error, GatedRepoError):
        return f"the dataset is gated; accept its terms at {page} and log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"there is no revision '{dataset.revision}'; see {page}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such dataset at {page}, or it is private; check the name, or log in with `hf auth login`"
    if _is_unreachable(error):
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{type(error).__name__}: {error_line(error)}"
        return (
            f"{constants.ENDPOINT} cannot be reached ({reason}); offline, name local files: `hf download {dataset.repo} "
            "--repo-type dataset --local-dir DIR`, then DIR/….parquet"
        )
    return f"cannot be read: {type(error).__name__}: {error_line(error)}"


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether an exception, or its cause, is a failed connection."""
    while error is not None:
        if isinstance(error, ConnectionError) or type(error).__name__ in (
            "ConnectError",
            "ConnectTimeout",
            "ReadTimeout",
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
