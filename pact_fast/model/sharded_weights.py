"""Weights that ZeRO-3 has partitioned, saved without gathering them.

Each rank writes its parts of the flat tensors. When all have, the parts are read again to write files in Hugging Face's
format, which wants whole tensors under other names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from pact_fast.model.tensor_files import TensorFiles, fragment_key
from pact_fast.model.weights import base_parameters, checkpoint_format, needs_all_ranks, weight_buckets

Tensors = dict[str, torch.Tensor]


class ShardedWeights:
    """The weights of a model over all ranks.

    Args:
        model: A model whose parameters ZeRO-3 has partitioned over all ranks.
        rank: Number of this rank.
    """

    def __init__(self, model: PreTrainedModel, rank: int):
        self._model, self._rank = model, rank

    def parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(key of `tensor_files.fragment_key`, flat tensor) of this rank's parts. They change in an optimizer step."""
        for name, parameter in base_parameters(self._model):
            start, part = own_part(parameter, self._rank)
            if len(part):
                yield fragment_key(name, parameter.ds_shape, start), part  # type: ignore[attr-defined]

    def tensors(self, stored: Callable[[], TensorFiles]) -> Iterator[tuple[Tensors, Callable[[], Tensors]]]:
        """The tensors of a checkpoint, a bucket at a time: meta tensors, and a function that reads the real ones.

        Args:
            stored: Opens the parts of all ranks. Called where tensors are read.
        """
        for bucket in weight_buckets(self._model):
            meta = {name: torch.empty(p.ds_shape, dtype=p.dtype, device="meta") for name, p in bucket}  # type: ignore[attr-defined]

            def read(names: list[str] = list(meta)) -> Tensors:  # noqa: B006  # of this bucket
                return checkpoint_format(self._model, {name: stored()[name] for name in names})

            yield checkpoint_format(self._model, meta), read


def sharded_weights(model: PreTrainedModel, rank: int) -> ShardedWeights | None:
    """None if every rank holds all weights, or if parts of them are on a disk, from which DeepSpeed gathers them."""
    if not needs_all_ranks(model):
        return None
    parts = [getattr(parameter, "ds_tensor", None) for _, parameter in base_parameters(model)]
    in_memory = all(part is not None and part.numel() == part.ds_numel for part in parts)
    return ShardedWeights(model, rank) if in_memory else None


def own_part(parameter: Any, rank: int) -> tuple[int, torch.Tensor]:
    """(start, part) of a rank in a flat parameter that ZeRO-3 has partitioned."""
    start, stop = own_range(parameter, rank)
    return start, parameter.ds_tensor.detach()[: stop - start]


def own_range(parameter: Any, rank: int) -> tuple[int, int]:
    """(start, stop) of this part. All ranks have parts of one length; the last ones are padded, or have nothing else."""
    length = parameter.ds_tensor.ds_numel
    return min(rank * length, parameter.ds_numel), min((rank + 1) * length, parameter.ds_numel)
