"""Heads and trees in processes of a host: a split vocabulary, DDP, FSDP2 and ZeRO-3."""

from __future__ import annotations

import pytest

from tests.support import host_ranks
from tests.support.processes import run_ranks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_vocabulary_split_over_ranks_equals_one_that_is_whole(ranks):
    run_ranks(host_ranks.vocabulary, ranks=ranks)


@pytest.mark.parametrize("wrapper", host_ranks.WRAPPERS)
def test_a_tree_inside_the_forward_of_a_wrapped_model_has_the_gradients_of_the_model_alone(wrapper):
    run_ranks(host_ranks.guest, wrapper)
