"""Garbage collections that skip the objects of imports and the model."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Exclude existing objects from garbage collections inside the context; reference counts free them as before.

    The imports alone leave a million objects, and a full collection that walks through them stops sampling for a quarter of a
    second. The turns of a thousand rollouts make enough objects to bring one about.

    A heap that the caller has frozen is left as it is: `gc.unfreeze` would take back all of it.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()  # unused cycles would stay
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
