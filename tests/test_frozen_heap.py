"""Inside, garbage collections see new objects only; afterwards all of them."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from pact_fast.train.frozen_heap import frozen_heap


class Cycle:
    def __init__(self):
        self.me = self


@pytest.fixture
def thawed() -> Iterator[None]:
    """As a run begins; tests/conftest.py has frozen what was imported."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_new_cycles_are_collected_and_old_objects_are_not_walked_through(thawed):
    old = [Cycle() for _ in range(1000)]
    with frozen_heap():
        assert not any(item is old[0] for item in gc.get_objects()) and gc.get_freeze_count() > 1000
        new = weakref.ref(Cycle())
        gc.collect()
        assert new() is None
    assert gc.get_freeze_count() == 0 and any(item is old[0] for item in gc.get_objects())


def test_what_was_garbage_before_does_not_stay(thawed):
    garbage = weakref.ref(Cycle())
    with frozen_heap():
        assert garbage() is None


def test_an_error_thaws(thawed):
    with pytest.raises(ValueError), frozen_heap():
        raise ValueError
    assert gc.get_freeze_count() == 0


def test_what_the_caller_has_frozen_stays_frozen():
    gc.freeze()
    frozen = gc.get_freeze_count()
    with frozen_heap():
        pass
    assert gc.get_freeze_count() == frozen
