"""A packed tree as recurrent layers compute it: level by level, siblings and cousins in one call.

A segment is a stretch of rows without a branch: it begins in the state that its parent segment ends in.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch

CHUNK = 64  # tokens that a chunked rule computes at a time; padding within a chunk costs nothing
MAX_PADDING = 0.25  # chunks of padding that a group may have, in proportion to its chunks


class Segment(NamedTuple):
    """Rows [start, end), and the segment that they continue; None at the beginning of a sequence."""

    start: int
    end: int
    parent: int | None


class SegmentBatch(NamedTuple):
    """Segments of one level that one call computes: padded to the longest of them, or one after the other.

    parents     int64 [B] numbers, among the states that the level above keeps, of those that the segments begin in;
                None at the beginning of sequences
    segments    B
    rows        rows of the group, padding included
    padding     bool [B, L]: True behind the end of a segment; None if nothing is padded
    boundaries  int32 [B + 1] first rows of segments that lie one after the other; None if they are padded
    keeps       whether a later level continues a segment of this group
    """

    parents: torch.Tensor | None
    segments: int
    rows: int
    padding: torch.Tensor | None
    boundaries: torch.Tensor | None
    keeps: bool


class Levels(NamedTuple):
    """The order in which segments are computed.

    order   int64 [T'] rows in the order of groups; padding repeats the last row of its segment
    place   int64 [T] where in that order every row is
    levels  groups of every level
    """

    order: torch.Tensor
    place: torch.Tensor
    levels: list[list[SegmentBatch]]


def segments_of(subtree_end: np.ndarray) -> list[Segment]:
    """The segments of a pack in the order of their rows. subtree_end: int64 [T], see PackedBatch."""
    rows = len(subtree_end)
    starts = [0, *(np.flatnonzero(np.diff(subtree_end)) + 1), rows] if rows else [0]
    segments: list[Segment] = []
    open_segments: list[int] = []  # those that contain the current row in their subtree, outermost first
    for start, end in itertools.pairwise(starts):
        while open_segments and subtree_end[segments[open_segments[-1]].start] <= start:
            open_segments.pop()
        segments.append(Segment(int(start), int(end), open_segments[-1] if open_segments else None))
        open_segments.append(len(segments) - 1)
    return segments


def levels_of(segments: list[Segment], device: torch.device | str = "cpu", *, padded: bool = True) -> Levels:
    """Levels of a pack.

    Args:
        segments: All segments of the pack.
        device: Of the tensors.
        padded: Groups are batches [B, L] of segments of similar length. False: every level is one group, whose segments
            lie one after the other, for kernels of variable length.
    """
    by_level: list[list[int]] = []
    level_of: list[int] = []
    for index, segment in enumerate(segments):
        level = 0 if segment.parent is None else level_of[segment.parent] + 1
        level_of.append(level)
        if level == len(by_level):
            by_level.append([])
        by_level[level].append(index)
    continued = {segment.parent for segment in segments}
    order: list[np.ndarray] = []
    levels: list[list[SegmentBatch]] = []
    kept: dict[int, int] = {}  # segments of the level above whose states are kept, and their numbers
    for members in by_level:
        parts = _groups(members, segments) if padded else [members]
        order += [_rows(part, segments, padded) for part in parts]
        levels.append([_group(part, segments, kept, continued, device, padded) for part in parts])
        keeping = [part for part, group in zip(parts, levels[-1], strict=True) if group.keeps]
        kept = {index: number for number, index in enumerate(index for part in keeping for index in part)}
    rows = np.concatenate([np.zeros(0, np.int64), *order])
    place = np.empty(segments[-1].end if segments else 0, np.int64)
    place[rows[::-1]] = np.arange(len(rows))[::-1]  # of a repeated row, the first occurrence counts
    return Levels(torch.as_tensor(rows, device=device), torch.as_tensor(place, device=device), levels)


def _groups(members: list[int], segments: list[Segment]) -> list[list[int]]:
    """Segments of similar length, the longest first."""
    groups: list[list[int]] = []
    longest = used = 0
    for index in sorted(members, key=lambda i: segments[i].start - segments[i].end):
        chunks = -(-(segments[index].end - segments[index].start) // CHUNK)
        if groups and longest * (len(groups[-1]) + 1) <= (1 + MAX_PADDING) * (used + chunks):
            groups[-1].append(index)
            used += chunks
        else:
            groups.append([index])
            longest = used = chunks
    return groups


def _rows(part: list[int], segments: list[Segment], padded: bool) -> np.ndarray:
    longest = max(segments[i].end - segments[i].start for i in part)
    rows = [np.arange(segments[i].start, segments[i].end) for i in part]
    return np.concatenate([np.pad(r, (0, longest - len(r)), mode="edge") for r in rows] if padded else rows)


def _group(
    part: list[int],
    segments: list[Segment],
    kept: dict[int, int],
    continued: set[int | None],
    device: torch.device | str,
    padded: bool,
) -> SegmentBatch:
    lengths = np.array([segments[i].end - segments[i].start for i in part])
    parents = [kept[parent] for i in part if (parent := segments[i].parent) is not None]
    padding = np.arange(lengths.max()) >= lengths[:, None]
    boundaries = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    return SegmentBatch(
        parents=torch.as_tensor(parents, device=device) if parents else None,
        segments=len(part),
        rows=padding.size if padded else int(boundaries[-1]),
        padding=torch.as_tensor(padding, device=device) if padded and padding.any() else None,
        boundaries=None if padded else torch.as_tensor(boundaries, device=device),
        keeps=not continued.isdisjoint(part),
    )
