"""A model that real DeepSpeed ZeRO-3 has partitioned over processes: its weights for an engine, and its gradients."""

import json

import pytest
import torch

from pact_fast.model.tensor_files import TensorFiles
from pact_fast.train import checkpoint
from tests.support import zero3_weights
from tests.support.optional import needs
from tests.support.processes import run_ranks

needs("deepspeed", reason="deepspeed is not installed")


pytestmark = pytest.mark.slow


def test_every_rank_sees_all_weights_but_never_at_once_and_trees_keep_their_gradients(tmp_path):
    run_ranks(zero3_weights.main, tmp_path)
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result["equal"] and result["announced"]
        assert not result["again"]  # the other process would have to gather along
        assert result["left"] == 0  # partitioned again
        assert result["gradient"] <= 1e-5  # recomputation in the backward pass needs no released weight
        assert result["largest"] <= result["total"] / 3 + 96 * 32  # one layer, or embedding, of three


def test_saved_parts_become_the_tensors_that_gathering_gives(tmp_path):
    """Of a mixture of experts, whose checkpoint has other tensors than the model, in files of 20 kB that three ranks write."""
    run_ranks(zero3_weights.save, tmp_path, ranks=3)
    model = tmp_path / "step_1" / "model"
    files = sorted(model.glob("model-*.safetensors"))
    stored, expected = TensorFiles(files), TensorFiles([tmp_path / "gathered"])
    assert len(files) > 4 and set(stored) == set(expected) and "model.layers.2.mlp.experts.2.up_proj.weight" in stored
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: file for file in files for name in TensorFiles([file])} == {k: model / v for k, v in index.items()}
    listed = json.loads((tmp_path / "step_1" / "manifest.json").read_text())["files"]
    assert set(listed) == {"state.json", "model/model.safetensors.index.json", *(f"model/{f.name}" for f in files)}
    assert checkpoint.problem(tmp_path / "step_1", verify=True) is None


@pytest.mark.parametrize("failing", ["weights", "written", "model", ".part"])
def test_a_rank_that_cannot_write_ends_the_save_of_all(failing, tmp_path):
    """Its parts of the weights, the note about them, its files of the model, or the note about those."""
    run_ranks(zero3_weights.save, tmp_path, failing, ranks=3)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("step", ".tmp"))] == []
