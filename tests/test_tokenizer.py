"""Tokenizers that are trained: the same tasks give the same one, on any machine."""

from __future__ import annotations

import pytest

from pact_fast.config import load_config, parse_config
from pact_fast.envs.registry import make_tasks
from pact_fast.model.tokenizer import make_tokenizer
from tests.support.runs import TINY_RUN, TOKENIZERS


@pytest.mark.parametrize("name", TOKENIZERS)
def test_training_gives_the_tokenizer_that_tiny_runs_load(name, tmp_path):
    config = load_config("quickstart") if name == "quickstart" else parse_config(TINY_RUN)
    config.model.tokenizer = None
    make_tokenizer(config.model, make_tasks(config)).save_pretrained(tmp_path)
    expected = {path.name: path.read_bytes() for path in TOKENIZERS[name].iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == expected and expected
