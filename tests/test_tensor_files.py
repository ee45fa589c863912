"""Tensors from safetensors files, whole and in part, stored whole or as fragments of several ranks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pact_fast.errors import PactError
from pact_fast.model import shards, snapshot
from pact_fast.model.tensor_files import TensorFiles, fragment_key
from pact_fast.train import checkpoint, checkpoint_writer


def stored(folder, tensors, cuts=None):
    """Files of the tensors: one with whole ones, or one for each rank, with the part between two cuts."""
    if cuts is None:
        shards.write_file(tensors, folder / "whole.safetensors")
        return TensorFiles([folder / "whole.safetensors"])
    paths = []
    for rank in range(len(cuts[next(iter(cuts))]) + 1):
        own = {}
        for name, tensor in tensors.items():
            bounds = [0, *sorted(cuts[name]), tensor.numel()]
            part = tensor.flatten()[bounds[rank] : bounds[rank + 1]]
            if len(part):
                own[fragment_key(name, tensor.shape, bounds[rank])] = part
        paths.append(folder / f"own-{rank:05d}.safetensors")
        shards.write_file(own, paths[-1])
    return TensorFiles(paths)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_parts_and_wholes_equal_the_tensor(tmp_path_factory, data):
    shapes = {"a/m": (3, 5, 2), "b:c@3/m": (7,), "scalar": (), "one": (1, 1)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    cuts = None
    if data.draw(st.booleans()):
        cuts = {name: [data.draw(st.integers(0, math.prod(shape))) for _ in "12"] for name, shape in shapes.items()}
    files = stored(tmp_path_factory.mktemp("files"), tensors, cuts)
    assert set(files) == set(tensors) and len(files) == 4
    for name, tensor in tensors.items():
        assert files.shape(name) == tensor.shape and torch.equal(files[name], tensor)
        start, stop = sorted(data.draw(st.integers(0, tensor.numel())) for _ in "12")
        if start < stop:
            assert torch.equal(files.part(name, start, stop), tensor.flatten()[start:stop])


def test_fragments_that_are_not_the_whole_tensor_are_an_error(tmp_path):
    tensor = torch.arange(12.0).view(3, 4)
    for number, spans in enumerate([[(0, 6), (7, 12)], [(0, 6), (5, 12)], [(0, 6)], [(2, 12)]]):
        path = tmp_path / f"{number}.safetensors"
        shards.write_file({fragment_key("w", (3, 4), a): tensor.flatten()[a:b].clone() for a, b in spans}, path)
        with pytest.raises(ValueError, match="the fragments of 'w' are not the whole tensor"):
            TensorFiles([path])


def test_a_checkpoint_without_the_file_of_a_rank_is_refused(tmp_path):
    """As if another rank had never written its part."""
    own = {fragment_key("w/m", (8,), 0): torch.zeros(4)}
    path = checkpoint_writer.save(
        tmp_path, 1, tensors={}, sharded={"optimizer": own}, state={}, write_model=None, keep=1
    )
    with pytest.raises(PactError, match="not a complete checkpoint: the fragments of 'w/m' are not the whole tensor"):
        checkpoint.load(path)


def test_a_rank_writes_its_own_files_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "SHARD_BYTES", 40)
    tensor = torch.arange(30.0)
    for rank, (begin, end) in enumerate([(0, 14), (14, 30)]):
        writer = snapshot.SnapshotWriter()
        own = [(fragment_key("w", (30,), at), tensor[at : min(at + 8, end)]) for at in range(begin, end, 8)]
        snapshot.write_own(tmp_path, "optimizer", own, writer, rank, 2)
        writer.close(lambda digests: None)
        assert writer.wait_ended() is None
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"optimizer-{number:05d}.safetensors" for number in (0, 1, 2, 3)]
    assert torch.equal(TensorFiles(tmp_path / name for name in names)["w"], tensor)
