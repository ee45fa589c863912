"""Quantiles of values that are spread over ranks: exact, from counts alone.

The bits of non-negative floats are ordered as the floats are, so a value of a given rank in the sorted order is found digit
by digit (radix selection): three sums of counts over ranks for any number of values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pact_fast.distributed.world import World

DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, bits) of the digits of 32 bits, most significant first


@dataclass(frozen=True)
class Distribution:
    """Statistics of the values of all ranks. quantiles: linear interpolation between neighbours, as `numpy.quantile`."""

    count: int
    mean: float
    largest: float
    quantiles: tuple[float, ...]


def distributions(columns: Sequence[np.ndarray], fractions: Sequence[float], world: World) -> list[Distribution | None]:
    """The distribution of each column over all ranks; None for one without values. All ranks must call it.

    Args:
        columns: float32 [n] values ≥ 0 of this rank, n may differ; the same number of columns on all ranks.
        fractions: Of the quantiles.
        world: All ranks.
    """
    local = [[len(column), float(column.sum(dtype=np.float64))] for column in columns]
    totals = world.all_reduce_sum(torch.tensor(local, dtype=torch.float64).reshape(-1, 2)).tolist()
    wanted: list[tuple[int, int]] = []  # (column, index in the sorted order of all ranks)
    for column, (count, _) in enumerate(totals):
        if count:
            places = [(count - 1) * fraction for fraction in fractions]
            wanted += [(column, int(index)) for place in places for index in (math.floor(place), math.ceil(place))]
            wanted.append((column, int(count) - 1))
    found = _select([np.ascontiguousarray(c, np.float32).view(np.uint32) for c in columns], wanted, world)
    result: list[Distribution | None] = []
    for column, (count, total) in enumerate(totals):
        if not count:
            result.append(None)
            continue
        places = [(count - 1) * fraction for fraction in fractions]
        ends = [(found[column, math.floor(p)], found[column, math.ceil(p)], p - math.floor(p)) for p in places]
        result.append(
            Distribution(
                int(count), total / count, found[column, int(count) - 1], tuple(a + (b - a) * t for a, b, t in ends)
            )
        )
    return result


def _select(keys: list[np.ndarray], wanted: list[tuple[int, int]], world: World) -> dict[tuple[int, int], float]:
    """The values at places in the sorted order of each column's values of all ranks, by (column, place)."""
    prefix = dict.fromkeys(wanted, 0)  # of the wanted key's digits so far
    place = {selection: selection[1] for selection in wanted}  # among the keys with this prefix
    subsets = {(column, 0): keys[column] for column, _ in wanted}
    for shift, bits in DIGITS:
        names = list(subsets)
        counts = [np.bincount((subsets[n] >> shift) & (2**bits - 1), minlength=2**bits) for n in names]
        summed = world.all_reduce_sum(torch.from_numpy(np.stack(counts))) if names else torch.zeros(0, 1)
        ends = dict(zip(names, np.cumsum(summed.numpy(), axis=1), strict=True))
        following: dict[tuple[int, int], np.ndarray] = {}
        for selection in prefix:
            column, before = selection[0], prefix[selection]
            upto = ends[column, before]
            digit = int(np.searchsorted(upto, place[selection], side="right"))
            place[selection] -= int(upto[digit - 1]) if digit else 0
            prefix[selection] = before << bits | digit
            if (column, prefix[selection]) not in following:
                subset = subsets[column, before]
                following[column, prefix[selection]] = subset[((subset >> shift) & (2**bits - 1)) == digit]
        subsets = following
    values = np.array(list(prefix.values()), np.uint32).view(np.float32).tolist()
    return dict(zip(prefix, values, strict=True))
