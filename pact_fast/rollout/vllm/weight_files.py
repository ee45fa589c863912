"""Weights and adapters for a vLLM server through files, best in shared memory."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import torch

from pact_fast.errors import PactError
from pact_fast.model.adapter import write_adapter
from pact_fast.model.shards import write_model_shards


class WeightFiles:
    """The folder through which a server gets its weights, one subfolder per version.

    Args:
        folder: Seen under the same path by trainer and server.
        model_folder: Configuration and tokenizer, which vLLM reads beside the weights.
    """

    def __init__(self, folder: Path, model_folder: Path):
        self.folder, self._model_folder = folder, model_folder

    def write_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> Path:
        """A checkpoint folder with these weights. It appears under its name only when it is complete."""
        target = self.folder / f"weights-{version}"
        partial = self.folder / f"weights-{version}.partial"
        for path in (target, partial):
            shutil.rmtree(path, ignore_errors=True)
        with self._write_errors():
            shutil.copytree(self._model_folder, partial)
            write_model_shards(weights, partial)
            partial.rename(target)
        return target

    def write_adapter(self, tensors: dict[str, torch.Tensor], version: int) -> Path:
        """A folder with this LoRA adapter in peft's format."""
        target = self.folder / f"adapter-{version}"
        shutil.rmtree(target, ignore_errors=True)
        with self._write_errors():
            write_adapter(target, tensors)
        return target

    def adapter_versions(self) -> list[str]:
        """Versions of the adapters in the folder."""
        return [path.name.partition("-")[2] for path in self.folder.glob("adapter-*")]

    def prune(self, used: Collection[Path]) -> None:
        """Remove all versions but `used`."""
        for path in (*self.folder.glob("weights-*"), *self.folder.glob("adapter-*")):
            if path not in used:
                shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turn an OSError into a PactError, and remove partly written files."""
        try:
            yield
        except OSError as error:
            for partial in self.folder.glob("*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
            raise PactError(
                f"cannot write the weights for the engine to {self.folder}: {error.strerror or error}; set "
                "rollout.vllm_weights_dir to a folder with enough space"
            ) from None
