"""A model that real DeepSpeed ZeRO-3 has partitioned over two processes: its weights for an engine, and its gradients."""

import json

import pytest

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
        assert result["gradient"] <= 1e-5  # what the backward pass makes again needs no released weight
        assert result["largest"] <= result["total"] / 3 + 96 * 32  # one layer, or embedding, of three
