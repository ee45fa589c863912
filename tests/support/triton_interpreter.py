"""Triton without a GPU, in a process of its own: Triton reads TRITON_INTERPRET while it is imported."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch.multiprocessing


@functools.cache
def interpreter() -> ProcessPoolExecutor:
    # Tensors travel in shared memory, so that changes in place arrive
    pool = ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        pool.submit(os.getpid).result()  # starts the process
    return pool
