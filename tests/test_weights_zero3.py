"""A model that real DeepSpeed ZeRO-3 has partitioned over processes: its weights for an engine, and its gradients."""

import json
from pathlib import Path

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


FAILING = ("weights", "written", "model", ".part")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folders of saves by the same three ranks: one of each that fails, and in this folder itself a last one that does not."""
    folder = tmp_path_factory.mktemp("saved")
    for name in FAILING:
        (folder / name).mkdir()
    run_ranks(zero3_weights.save, folder, FAILING, ranks=3)
    return folder


def test_saved_parts_become_the_tensors_that_gathering_gives(saved):
    """Of a mixture of experts, whose checkpoint has other tensors than the model, in files of 20 kB that three ranks write."""
    model = saved / "step_1" / "model"
    files = sorted(model.glob("model-*.safetensors"))
    stored, expected = TensorFiles(files), TensorFiles([saved / "gathered"])
    assert len(files) > 4 and set(stored) == set(expected) and "model.layers.2.mlp.experts.2.up_proj.weight" in stored
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: file for file in files for name in TensorFiles([file])} == {k: model / v for k, v in index.items()}
    listed = json.loads((saved / "step_1" / "manifest.json").read_text())["files"]
    assert set(listed) == {"state.json", "model/model.safetensors.index.json", *(f"model/{f.name}" for f in files)}
    assert checkpoint.problem(saved / "step_1", verify=True) is None


@pytest.mark.parametrize("failing", FAILING)
def test_a_rank_that_cannot_write_ends_the_save_of_all(failing, saved):
    """Its parts of the weights, the note about them, its files of the model, or the note about those."""
    told = [json.loads((saved / failing / f"{rank}.json").read_text()) for rank in range(3)]
    assert all("No space left" in error for error in told), told
    assert [path.name for path in (saved / failing).iterdir() if path.name.startswith(("step", ".tmp"))] == []
