"""Preloaded state of the fork server: the imports of every run, and objects that every run would otherwise rebuild.

A separate module, because the fork server can only import modules. A process started by `python -m` does the same work
itself.
"""

import atexit
import contextlib
import gc
import os
from unittest import mock

import pytest  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import pact_fast.report
import pact_fast.rollout.embedded.engine
import pact_fast.train.run  # noqa: F401
from pact_fast.algorithms.registry import algorithm
from pact_fast.chat.formats.registry import tool_format
from pact_fast.envs.registry import environment
from pact_fast.rollout.registry import engine
from pact_fast.train.trackers.registry import tracker

with contextlib.suppress(ImportError):  # imported through accelerate when a model is saved
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Imported by every engine of DeepSpeed, and decorated: that would import Inductor, for an optimizer that nobody uses here
    with mock.patch("torch.compile", lambda function, **_: function):
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

for registry in (algorithm, engine, environment, tool_format, tracker):
    registry.names()  # imports all that are registered
get_checkpoint_conversion_mapping("qwen3")  # a thousand regular expressions, compiled once in a process
gc.collect()
atexit.register(gc.unfreeze)  # else libraries report leaks
gc.freeze()  # a process that was forked neither looks through these objects nor copies their pages
